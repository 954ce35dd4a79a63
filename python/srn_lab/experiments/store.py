"""The result store: one JSON line a unit, appended whole or not at all."""

from __future__ import annotations

import datetime
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from srn_lab.experiments.units import Unit, key
from srn_lab.files import SaveError
from srn_lab.machine import environment


@dataclass(frozen=True)
class Row:
    """What one unit gave, and where. ``failed`` says why there is no result."""

    key: str
    slot: str
    seed: int
    unit: dict
    result: dict
    environment: dict
    date: str
    failed: str = ""


def row_of(unit: Unit, result: dict, failed: str = "") -> Row:
    """A row with the time and the machine of now."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Row(
        key(unit),
        unit.slot,
        unit.seed,
        unit.describe(),
        _rounded(result),
        environment(),
        now,
        failed,
    )


class Store:
    """Rows in a file; the newest of a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, Row]:
        """All complete rows by key. A torn last line, which a kill can leave, is left out."""
        if not self.path.exists():
            return {}
        found: dict[str, Row] = {}
        lines = self.path.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = Row(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    warnings.warn(f"{self.path}: the torn last line is left out", stacklevel=2)
                    break
                raise ValueError(f"{self.path}, line {number} is no row: {error}") from error
            found[row.key] = row
        return found

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; on failure the file is what it was. Raises SaveError."""
        text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self._drop_torn_line()
            with self.path.open("ab", buffering=0) as file:
                data = text.encode()
                if file.write(data) != len(data):
                    raise OSError("only a part was written")
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.is_file():
                os.truncate(self.path, min(size, self.path.stat().st_size))
            raise SaveError(
                f"could not add to {self.path}: {error}; the rows before are kept"
            ) from error

    def _drop_torn_line(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)


def _rounded(value: object) -> object:
    """Seven significant digits: what float32 holds, in half the bytes."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
