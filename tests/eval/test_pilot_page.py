import json
from pathlib import Path

from eval.conclusion import table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_what_was_measured():
    """docs/pilot.md quotes the terminal table and the conclusion of docs/results/pilot/compare.json, word for word."""
    result = json.loads((DOCS / "results" / "pilot" / "compare.json").read_text())
    page = (DOCS / "pilot.md").read_text()
    assert table(result) in page and page.startswith("# Pilot")
    assert result["conclusion"] in " ".join(page.split())
