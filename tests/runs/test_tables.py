import json

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig
from runs import tables as table
from runs.ablations import row
from tests.stages import MODULES, STAGES


def test_the_pages_hold_the_tables_of_the_measurements():
    for path, text in table.pages().items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"


def test_the_families_are_those_of_the_family_table_and_their_tests_are_there():
    recorded = json.loads(table.FAMILIES.read_text())
    assert list(recorded["families"]) == list(MODULES) and recorded["stages"] == STAGES
    for test in {one["test"] for tests in recorded["families"].values() for each in tests.values() for one in each}:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (table.ROOT / path).read_text(), test


def test_a_cell_says_what_its_tests_did():
    def one(test: str, outcome: str, **more: str) -> dict[str, str]:
        return {"test": test, "outcome": outcome, **more}

    refused, skipped = one("r", "passed", refused="labels alone"), one("s", "skipped", reason="no GPU")
    rows = {
        "b": [one("p", "passed"), skipped],
        "c": [refused],
        "d": [skipped],
        "e": [],
        "f": [one("x", "failed"), refused],
    }
    stages = {name: f"what {name} is" for name in "bcdef"}
    lines = table.families_table({"stages": stages, "families": {"dit": rows}}).splitlines()
    assert lines[0] == "| family | b | c | d | e | f |"
    assert lines[2] == "| `dit` | yes | no [1] | skipped [2] | not tested | **failed** [3] |"
    assert lines[4:7] == ["- [1] labels alone", "- [2] no GPU", "- [3] x"] and lines[8] == "- b: what b is"


def test_the_verdict_on_colour_stands_beside_that_on_detail():
    result = json.loads((table.RESULTS / "demo" / "report.json").read_text())
    student = next(one for one in result["sets"] if one["role"] == "student")
    against = student["against"]["teacher"]
    word = against["verdict"]["word"]
    against.pop("colour", None)
    assert f"| {word} |" in table.row(student, {}, True)
    against["colour"] = {"verdict": {"word": "over-saturated, grid"}}
    assert f"| {word}; over-saturated, grid |" in table.row(student, {}, True)
    for converged, told in (
        (False, f"{word}, unconverged reference; over-saturated"),
        (True, f"{word}; over-saturated"),
    ):
        again = table.report_table("demo", {**result, "discretisation": {"converged": converged}})
        assert f"| {told}, grid |" in again


def test_the_rows_of_the_recipes_begin_with_base_and_bear_what_is_undefined(tmp_path, monkeypatch):
    result = json.loads((table.RESULTS / "demo" / "report.json").read_text())
    kept = ("residual", *(one["name"] for one in result["sets"] if one["role"] != "student"))
    result["sets"] = [one for one in result["sets"] if one["name"] in kept]
    result |= {"checks": result["checks"][:1], "discretisation": {"converged": True}}
    student = next(one for one in result["sets"] if one["role"] == "student")
    student["against"]["teacher"]["colour"] = {"verdict": {"word": "colour ok"}}
    (tmp_path / "ablations").mkdir()
    for name in ("bands_above", "base"):
        one = {"row": name, "arm": "residual", "seed": 3, **row.extract(result)}
        if name == "base":
            one["flat_noise_db"]["value"] = None
        else:
            one["converged"] = False
        (tmp_path / "ablations" / f"{name}.json").write_text(json.dumps(one))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table.recipes_table().splitlines()
    gain = student["against"]["teacher"]["gain_db"]["HF"]["value"]
    updates = student["facts"]["updates"]
    assert lines[2].startswith(f"| `base` | residual | 4 | {updates} | 1024 | 3 |")
    assert f"; colour ok | {gain:+.2f} |" in lines[2]
    assert f"| {table.NOTHING} |" in lines[2] and f"| {table.NOTHING} |" not in lines[3]
    assert "unconverged" not in lines[2] and f", unconverged reference; colour ok | {gain:+.2f} |" in lines[3]
    assert [line.partition(":")[0] for line in lines[5:]] == ["- `base`", "- `bands_above`"]


def test_a_row_is_two_commands_and_every_file_of_one_is_read():
    first, second = row.commands(row.RowConfig("base", "dar", 2))
    assert (
        "student.routing.query=timestep" in first and "seed=2" in first and "config=runs/ablations/base.yaml" in first
    )
    assert "runs=[out/ablations/base/dar_seed2]" in second
    for path in row.ROWS.glob("*.yaml"):
        config.load(DistillConfig, [f"config={path}", "out_dir=out"])
        assert table.meaning_of(path.stem).endswith(".")
