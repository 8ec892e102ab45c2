import json

from runs import tables as table


def test_the_pages_hold_the_tables_of_the_measurements():
    for path, text in table.pages().items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"


def test_the_verdict_on_colour_stands_beside_that_on_detail():
    result = json.loads((table.RESULTS / "demo" / "report.json").read_text())
    student = next(one for one in result["sets"] if one["role"] == "student")
    against = student["against"]["teacher"]
    word = against["verdict"]["word"]
    against.pop("colour", None)
    assert f"| {word} |" in table.row(student, {})
    against["colour"] = {"verdict": {"word": "over-saturated, grid"}}
    assert f"| {word}; over-saturated, grid |" in table.row(student, {})
