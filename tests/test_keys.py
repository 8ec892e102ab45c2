"""In which keys two configurations differ."""

from dmd_dar.keys import differences


def test_differences_tell_types_and_sections_apart() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": True, "b": {"c": 2}}) == [("a", 1, True)]
    assert differences({"a": {"b": 1}}, {"a": None}) == [("a", {"b": 1}, None)]
    assert differences({"a": 1}, {"b": 1}) == [("a", 1, "(absent)"), ("b", "(absent)", 1)]
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
