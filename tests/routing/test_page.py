import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def test_the_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert (tmp_path / "routed" / "dar.json").exists()
    assert not hasattr(scope["model"], "dar") and len(scope["groups"][1]["params"]) > 0
