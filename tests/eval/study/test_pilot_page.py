import json
from pathlib import Path

from eval.compare import run_records
from eval.study.wording import table

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_shows_what_was_measured():
    """docs/pilot.md quotes the terminal table and the conclusion of docs/results/pilot/compare.json, word for word."""
    result = json.loads((DOCS / "results" / "pilot" / "compare.json").read_text())
    page = (DOCS / "pilot.md").read_text()
    assert table(result) in page and page.startswith("# Pilot")
    assert result["conclusion"] in " ".join(page.split())


def test_each_run_has_its_record():
    folder = DOCS / "results" / "pilot"
    result = json.loads((folder / "compare.json").read_text())
    records = {path.name: json.loads(path.read_text()) for path in (folder / "runs").iterdir()}
    assert records == run_records(result) and len(records) == 24


def test_the_report_draws_that_comparison():
    result, report = (
        json.loads((DOCS / "results" / "pilot" / f"{name}.json").read_text()) for name in ("compare", "report")
    )
    assert report["forest"]["conclusion"] == result["conclusion"]
    assert report["forest"]["curve"]["dar"]["value"] == result["primary"]["curve"]["dar"]["value"]
    assert report["provenance"]["contract_hash"] == result["provenance"]["contract_hash"]
