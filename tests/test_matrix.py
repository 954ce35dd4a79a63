"""make test-matrix says what it covered, and calls nothing green that it did not."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import matrix
import pytest


def run(monkeypatch, outcomes: dict[str, Exception | str]) -> int:
    def cover(folder: Path, interpreter: Path, *rest: object) -> str:
        outcome = outcomes[str(interpreter)]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(matrix, "uv", lambda *arguments: (0, ""))
    monkeypatch.setattr(matrix, "pythons", lambda: {name: Path(name) for name in outcomes})
    monkeypatch.setattr(matrix, "test", cover)
    monkeypatch.setattr(matrix, "TORCHES", {"newest": "torch"})
    monkeypatch.setattr(sys, "argv", ["matrix", "--only", "Python"])
    return matrix.main()


def test_only_what_ran_is_covered(monkeypatch, capsys) -> None:
    assert run(monkeypatch, {"3.10": "1 passed", "3.11": "1 passed"}) == 0
    assert "covered 2 of 2; failed: none; not covered: none" in capsys.readouterr().out
    assert run(monkeypatch, {"3.10": "1 passed", "3.11": matrix.Missing("no wheel")}) == 3
    said = capsys.readouterr().out
    assert "Python 3.11, torch newest: NOT covered\n    no wheel" in said
    assert "covered 1 of 2; failed: none; not covered: Python 3.11, torch newest" in said
    assert "macOS: never run here" in said
    gone = {"3.10": matrix.Failed("1 failed"), "3.11": matrix.Missing("no wheel")}
    assert run(monkeypatch, gone) == 1
    assert "failed: Python 3.10, torch newest" in capsys.readouterr().out


def test_a_run_that_reports_nothing_is_counted_as_nothing(tmp_path: Path) -> None:
    assert matrix.counts(tmp_path / "none.xml") == "no test ran"
    (tmp_path / "some.xml").write_text(
        "<testsuites><testsuite><testcase/><testcase><failure/></testcase><testcase><error/>"
        "</testcase><testcase><skipped message='no GPU'/></testcase></testsuite></testsuites>"
    )
    assert matrix.counts(tmp_path / "some.xml") == "1 passed, 2 failed; 1 skipped: no GPU"


def test_objects_of_another_processor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernel.o"
    elf = b"\x7fELF" + bytes(14)
    path.write_bytes(elf + struct.pack("<H", 183))
    matrix.check_object(path, "aarch64-linux-gnu")
    with pytest.raises(matrix.Failed, match="no object for aarch64-macos"):
        matrix.check_object(path, "aarch64-macos")
    path.write_bytes(elf + struct.pack("<H", 62))  # x86-64
    with pytest.raises(matrix.Failed, match="no object for aarch64-linux-gnu"):
        matrix.check_object(path, "aarch64-linux-gnu")
    path.write_bytes(b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01" + bytes(12))
    matrix.check_object(path, "aarch64-macos")
