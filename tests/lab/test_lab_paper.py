"""The smoke preset from the command to the page, and the document against its rows."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from srn_lab.cli.app import app
from srn_lab.cli.paper import COMMITTED, DOCUMENTS
from srn_lab.experiments.catalogue import EXPERIMENTS
from srn_lab.experiments.presets import PRESETS
from srn_lab.experiments.results import Results
from srn_lab.experiments.store import Store
from srn_lab.report.document import BEGIN, END, disagreement, publish
from typer.testing import CliRunner

IMAGE = re.compile(r'<img src="data:image/png;base64,([^"]+)"')


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole round of the smoke preset; the tests below look at what it left."""
    out = tmp_path_factory.mktemp("paper")
    # The first part alone, then everything: what the first stored is not run again.
    first = invoke("paper", "--preset", "smoke", "--only", "fig2b", "--out", out)
    assert first.exit_code == 0, first.output
    kept = (out / "rows.jsonl").read_bytes()
    whole = invoke("paper", "--preset", "smoke", "--out", out)
    assert whole.exit_code == 0, whole.output
    assert (out / "rows.jsonl").read_bytes().startswith(kept)
    return out


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def test_every_experiment_has_its_rows(smoke):
    found = metrics(smoke)
    assert len(found["rows"]) >= 20
    assert found["failures"] == {}
    assert not any(row["failed"] for row in found["rows"])
    results = Results(PRESETS["smoke"], Store(smoke / "rows.jsonl").rows())
    assert not any(results.missing(name) for name in EXPERIMENTS)
    # The feature networks have rows too, but belong to no experiment.
    assert len(results.rows) == len(found["rows"])


def test_claims_below_three_seeds_are_undecided_without_an_interval(smoke):
    claims = metrics(smoke)["claims"]
    assert len(claims) >= 12
    assert {claim["verdict"] for claim in claims} == {"undecided"}
    assert all(claim["interval"] is None and claim["source"] for claim in claims)
    assert all(claim["effect"] is not None for claim in claims)


def test_a_second_round_runs_nothing_and_ends_with_the_same_numbers(smoke, tmp_path):
    before = metrics(smoke)
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(smoke / "rows.jsonl", rows)
    again = invoke("paper", "--preset", "smoke", "--out", tmp_path, "--store", rows)
    assert again.exit_code == 0, again.output
    assert "0 units to run" in again.output
    assert metrics(tmp_path) == before


def test_a_unit_done_again_gives_the_same_result(smoke, tmp_path):
    shutil.copytree(smoke / "features", tmp_path / "features")
    rows = (smoke / "rows.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in rows if json.loads(line)["slot"] == "gan/first/cond. SRN-50"]
    assert len(lost) == 1
    (tmp_path / "rows.jsonl").write_text("".join(line for line in rows if line not in lost))
    again = invoke("paper", "--preset", "smoke", "--only", "fig6", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert "1 units to run" in again.output
    last = (tmp_path / "rows.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["result"] == json.loads(lost[0])["result"]


def test_the_page_is_self_contained_and_has_no_broken_image(smoke):
    page = (smoke / "index.html").read_text()
    images = IMAGE.findall(page)
    assert len(images) >= 20
    for encoded in images:
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()
    assert page.count("<img ") == len(images)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for name in EXPERIMENTS:
        assert f'id="{name}"' in page


def test_a_browser_shows_the_page(smoke, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine; the test above has opened every image")
    # The script counts, after loading, what the browser could not draw.
    script = """<script>addEventListener("load", () => {
      const images = [...document.images];
      const broken = images.filter(i => !i.complete || i.naturalWidth === 0).length;
      const rows = document.querySelectorAll("tr").length;
      const wide = document.documentElement.scrollWidth - innerWidth;
      document.title = [images.length, broken, rows, wide].join(" ");
    });</script>"""
    page = (smoke / "index.html").read_text()
    copy = tmp_path / "page.html"
    copy.write_text(page.replace("</body>", script + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run(
        [browser, *options, f"file://{copy}"], capture_output=True, text=True, timeout=240
    )
    title = re.search(r"<title>([^<]*)</title>", run.stdout)
    assert title, run.stderr[-2000:]
    images, broken, rows, wide = map(int, title.group(1).split())
    assert images == len(IMAGE.findall(page))
    assert broken == 0
    assert rows > len(metrics(smoke)["claims"])
    assert wide <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("paper --preset tiny", "preset must be one of smoke, cpu, gpu, got 'tiny'"),
        ("paper --only fig3", "experiment must be one of"),
        ("paper --seeds 0", "Invalid value for '--seeds'"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(arguments, message, tmp_path):
    result = invoke(*arguments.split(), "--out", tmp_path)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_reported_for_each_unit_and_the_rest_runs(tmp_path):
    arguments = ["--preset", "gpu", "--only", "example_a2", "--only", "fig1a", "--seeds", 1]
    result = invoke("paper", *arguments, "--root", tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 1
    text = "".join(result.output.split())  # lines are wrapped anywhere
    assert "cifar-100-python.tar.gz" in text
    assert "pass--download" in text
    assert len(metrics(tmp_path / "out")["rows"]) == 1


def test_documents_are_made_from_rows_and_disagreement_is_seen(smoke, tmp_path):
    results = Results(PRESETS["smoke"], Store(smoke / "rows.jsonl").rows())
    document = tmp_path / "paper.md"
    document.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    assert disagreement(document, results) != ""
    publish(document, results)
    assert disagreement(document, results) == ""
    text = document.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nAfter.\n")
    document.write_text(text.replace("undecided", "supported", 1))
    assert "-" in disagreement(document, results)
    document.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        publish(document, results)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_published_documents_agree_with_the_committed_rows(document):
    results = Results(PRESETS["cpu"], Store(COMMITTED).rows())
    assert results.rows
    assert disagreement(document, results) == ""


def test_two_processes_share_every_unit_and_store_it_once(tmp_path):
    # What accelerate's own launcher starts where there are GPUs; on CPUs it wants MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "srn_lab", "paper", "--preset", "smoke", "--out", str(tmp_path)]
    result = subprocess.run(
        [*command, "--only", "linear", "--only", "fig6"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    slots = [json.loads(line)["slot"] for line in (tmp_path / "rows.jsonl").open()]
    assert sorted(slots) == [
        "features/digits",
        "gan/first/cond. SN",
        "gan/first/cond. SRN-50",
        "gan/first/cond. SRN-70",
        "linear",
    ]
    assert metrics(tmp_path)["failures"] == {}
