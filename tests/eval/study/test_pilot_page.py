import json
from pathlib import Path

from eval.study.records import jsonable, read_study, run_records
from eval.study.wording import conclusion, seed_table

DOCS = Path(__file__).parents[3] / "docs"
PILOT = DOCS / "results" / "pilot"


def test_the_page_shows_what_was_measured():
    """docs/pilot.md quotes the terminal table and the conclusion of docs/results/pilot/compare.json, word for word."""
    result = read_study(PILOT / "compare.json")
    page = (DOCS / "pilot.md").read_text()
    assert seed_table(result) in page and page.startswith("# Pilot")
    assert result.conclusion in " ".join(page.split())


def test_a_file_that_was_written_before_is_read_key_by_key():
    result = read_study(PILOT / "compare.json")
    assert json.dumps(jsonable(result), indent=1) == (PILOT / "compare.json").read_text().rstrip("\n")
    assert conclusion(result) == result.conclusion


def test_each_run_has_its_record():
    records = {path.name: json.loads(path.read_text()) for path in (PILOT / "runs").iterdir()}
    written = run_records(read_study(PILOT / "compare.json"))
    assert records == {name: jsonable(record) for name, record in written.items()} and len(records) == 24


def test_the_report_draws_that_comparison():
    result, report = (json.loads((PILOT / f"{name}.json").read_text()) for name in ("compare", "report"))
    assert report["forest"]["conclusion"] == result["conclusion"]
    assert report["forest"]["curve"]["dar"]["value"] == result["primary"]["curve"]["dar"]["value"]
    assert report["provenance"]["contract_hash"] == result["provenance"]["contract_hash"]
