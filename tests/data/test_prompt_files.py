"""Files of prompts as people write them: whatever the form, the prompts are these; what holds none is named."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dmd_dar.data.prompt_files import LOSSLESS, PLAIN, Entry, copy_of, negative_of, read_entries, read_prompts
from dmd_dar.errors import UserError

PROMPTS = ["a red cat", 'a "cup", of coffee', "größe {0}"]
ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]  # where str.splitlines ends a line


def put(path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def quoted(prompts: list[str]) -> list[str]:
    return ['"' + prompt.replace('"', '""') + '"' for prompt in prompts]


FILES = {
    "a line each": ("p.txt", "\n".join(PROMPTS)),
    "of Windows": ("p.txt", "\ufeff" + "\r\n".join([*PROMPTS, ""])),
    "of an old Mac": ("p.txt", "\r".join(PROMPTS)),
    "blanks around": ("p.txt", f"\n \t\n  {PROMPTS[0]}\t\n\n{PROMPTS[1]}\x0c\n\u2028\n{PROMPTS[2]}\n\n"),
    "two files joined": ("p.txt", f"\ufeff{PROMPTS[0]}\n\ufeff{PROMPTS[1]}\n{PROMPTS[2]}"),
    "no ending": ("prompts", "\n".join(PROMPTS)),
    "JSON Lines": ("p.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps({"prompt": one, "n": 1}) for one in PROMPTS)),
    "JSON Lines of another ending": ("p.txt", "\n".join(json.dumps({"prompt": one, "text": "x"}) for one in PROMPTS)),
    "captions": ("p.ndjson", "\n".join(json.dumps({"file_name": "a.png", "caption": one}) for one in PROMPTS)),
    "texts with blanks": ("p.jsonl", "\n".join(json.dumps({"Text": f" {one}\n"}) for one in PROMPTS)),
    "plain texts": ("p.jsonl", "\n".join(json.dumps(one, ensure_ascii=False) for one in PROMPTS)),
    "a list": ("p.json", json.dumps(PROMPTS, indent=1)),
    "a list of objects": ("p.JSON", json.dumps([{"prompt": one} for one in PROMPTS])),
    "lines called json": ("p.json", "\n".join(json.dumps({"prompt": one}) for one in PROMPTS)),
    "a table": ("p.csv", "\ufeff" + "\r\n".join(["id,Prompt", *(f"7,{one}" for one in quoted(PROMPTS)), ""])),
    "a table of tabs": ("p.tsv", "\n".join(["Prompt\tCategory", *(f"{one}\tPlants" for one in quoted(PROMPTS))])),
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from_any_form(tmp_path, name):
    file, content = FILES[name]
    assert read_prompts(put(tmp_path / file, content)) == PROMPTS


@pytest.mark.parametrize("form", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize("mark", ODD)
def test_a_prompt_is_not_split_at_what_ends_no_line(tmp_path, form, mark):
    texts = [f"one{mark}half", "two"]
    lines = texts if form == "p.txt" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    content = "\n".join(lines)
    assert read_prompts(put(tmp_path / form, content)) == texts


@pytest.mark.parametrize(
    ("form", "content", "said"),
    [
        ("p.txt", b"", "it is empty"),
        ("p.txt", b"\xef\xbb\xbf\r\n \n", "it is empty"),
        ("p.jsonl", b"\n", "it is empty"),
        ("p.json", b"[]", "it is empty"),
        ("p.csv", b"prompt\n", "it is empty"),
        ("p.txt", "a cat\n".encode("utf-16"), "cannot be read as UTF-8 text.*save it as UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "holds NUL characters, as UTF-16 does; save it as UTF-8"),
        ("p.txt", "größe\n".encode("latin-1"), "cannot be read as UTF-8 text.*save it as UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"', "line 3 is no JSON; mend it, or write plain prompts"),
        ("p.txt", b'{"prompt": "a"}\nb\n', "line 2 is no JSON"),
        ("p.jsonl", b"a red cat\n", "line 1 is no JSON"),
        (
            "p.jsonl",
            b'{"id": 1, "label": "b"}\n',
            "line 1 holds 'id', 'label', and none of prompt, caption, text; give",
        ),
        ("p.jsonl", b'{"caption": "a", "text": "b"}\n', "line 1 holds caption and text; give every entry a text named"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "the prompt of line 2 is empty; leave it out"),
        ("p.jsonl", b'{"prompt": ["a", "b"]}\n', r"line 1 has no text for a prompt, but \['a', 'b'\]"),
        ("p.jsonl", rb'{"prompt": "\ud800"}', "the prompt of line 1 holds half a character"),
        ("p.json", b'["a", 3]', "entry 2 has no text for a prompt, but 3"),
        ("p.csv", b"a red cat, sitting\ndogs\n", "line 2 holds 'a red cat', ' sitting', and none of prompt"),
        ("p.csv", b"id,prompt\n1\n", "line 2 has no text for a prompt"),
        ("p.csv", b'id,prompt\n1,"a', "line 2: unexpected end of data; close and double the quotes there"),
        ("p.csv", b"id,prompt\n1,a\n2,a cat, sitting\n", "line 3 has more cells than the first; quote a text with ','"),
        ("p.parquet", b"PAR1\x00", "it is no parquet that can be read"),
        ("p.csv", b"prompt,negative,seed\na,,-1\n", "the seed of line 2 is -1, no integer from 0"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "the seed of line 1 is True, no integer from 0"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1.5}', "the seed of line 1 is 1.5, no integer from 0"),
        ("p.jsonl", b'{"prompt": "a", "negative": ["x"]}', r"the negative of line 1 is \['x'\], no text"),
        ("p.jsonl", rb'{"prompt": "a", "negative": "\ud800"}', "the negative of line 1 holds half a character"),
    ],
)
def test_what_holds_no_prompt_is_named(tmp_path, form, content, said):
    file = put(tmp_path / form, content)
    with pytest.raises(UserError, match=f"^prompts = {file}: .*{said}") as caught:
        read_prompts(file)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder_are_named(tmp_path):
    for file in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match=f"^prompts = {file}: "):
            read_prompts(str(file))


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("p.csv", "de, Negative ,SEED,en\neine Katze,blurry,7,a cat\nein Hund, blurry ,,a dog\n"),
        ("p.jsonl", '{"de": "eine Katze", "negative": "blurry", "seed": 7}\n{"de": "ein Hund", "negative": "blurry"}'),
        (
            "p.json",
            '[{"DE": "eine Katze", "negative": "blurry", "seed": "7"}, {"DE": "ein Hund", "negative": "blurry"}]',
        ),
    ],
)
def test_columns_by_name(tmp_path, form, content):
    file = put(tmp_path / form, content)
    entries = read_entries(file, "De")
    assert [(one.prompt, one.negative, one.seed) for one in entries] == [
        ("eine Katze", "blurry", 7),
        ("ein Hund", "blurry", None),
    ]
    assert negative_of(file, entries) == "blurry"
    with pytest.raises(UserError, match=f"^prompts = {file}: (line|entry) [12] holds .*, and no 'fr'; set column to"):
        read_prompts(file, "fr")


def parquet(path, **columns) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_a_parquet_is_read_by_its_columns_and_images_in_it_are_not(tmp_path, monkeypatch):
    columns = {"image": [b"\x00" * 9] * 3, "Prompt": PROMPTS, "negative": ["dark", None, ""], "seed": [7, None, 0]}
    file, read = parquet(tmp_path / "p.parquet", **columns), []
    batches = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, columns: read.append(columns) or batches(self, batch_size=2, columns=columns),
    )
    assert read_entries(file) == [
        Entry("row 1", PROMPTS[0], "dark", 7),
        Entry("row 2", PROMPTS[1], None, None),
        Entry("row 3", PROMPTS[2], None, 0),
    ]
    assert read == [["Prompt", "negative", "seed"]]
    other = parquet(tmp_path / "other.parquet", de=["eine Katze"], prompt=["a cat"], seed=[-1])
    with pytest.raises(UserError, match="the seed of row 1 is -1, no integer from 0"):
        read_prompts(other, "DE")
    with pytest.raises(UserError, match=f"^prompts = {file}: the table holds .*, and no 'fr'; set column to"):
        read_prompts(file, "fr")
    with pytest.raises(UserError, match="row 2 has no text for a prompt"):
        read_prompts(parquet(tmp_path / "gap.parquet", prompt=["a", None]))
    with pytest.raises(UserError, match="it is empty"):
        read_prompts(parquet(tmp_path / "empty.parquet", prompt=pyarrow.array([], pyarrow.string())))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    file = parquet(tmp_path / "p.parquet", prompt=PROMPTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^pyarrow is not installed: pip install 'dmd-dar\[parquet\]'$"):
        read_prompts(file)
    assert read_prompts(put(tmp_path / "p.csv", "prompt\na\n")) == ["a"]


@pytest.mark.parametrize(("column", "beside"), [("negative", (None, 7)), ("seed", ("dark", None))])
def test_the_prompts_own_column_says_nothing_else(tmp_path, column, beside):
    row = {"prompt": "a cat", "negative": "dark", "seed": 7} | {column: "a dog"}
    (entry,) = read_entries(put(tmp_path / "p.jsonl", json.dumps(row)), column)
    assert (entry.prompt, entry.negative, entry.seed) == ("a dog", *beside)


def test_plain_lines_have_no_columns(tmp_path):
    with pytest.raises(UserError, match="line 1 is a text without columns; leave column = de out"):
        read_prompts(put(tmp_path / "p.txt", "a cat\n"), "de")


@pytest.mark.parametrize(("second", "shown"), [('"dark"', "'dark'"), ("null", "none"), ('""', "none")])
def test_negatives_that_differ_are_refused(tmp_path, second, shown):
    lines = ['{"prompt": "a", "negative": "blurry"}', f'{{"prompt": "b", "negative": {second}}}']
    file = put(tmp_path / "p.jsonl", "\n".join(lines))
    with pytest.raises(UserError, match=f"{file}: .*line 1 has 'blurry' and line 2 has {shown}; .*negative=TEXT"):
        negative_of(file, read_entries(file))
    assert negative_of(file, [Entry("line 1", "a")]) is None


@pytest.mark.parametrize(
    ("prompts", "seed", "name"),
    [
        (PROMPTS, None, PLAIN),
        (["one\u2028half"], None, PLAIN),
        (["a\nb", "c"], None, LOSSLESS),
        (['{"a": 1}'], None, LOSSLESS),
        (PROMPTS, 7, LOSSLESS),
    ],
)
def test_a_copy_reads_as_the_same_prompts_and_seeds(tmp_path, prompts, seed, name):
    entries = [Entry(f"line {i}", prompt, seed=seed if i == 1 else None) for i, prompt in enumerate(prompts, 1)]
    named, text = copy_of(entries)
    assert named == name and read_entries(put(tmp_path / named, text)) == entries
