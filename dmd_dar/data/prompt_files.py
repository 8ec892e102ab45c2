"""Files of prompts, in the order in which they stand there.

    .txt and any other    a prompt a line; JSON Lines where the first line is a JSON object
    .jsonl, .ndjson       JSON Lines: on each line an object with a field of FIELDS, or a text
    .json                 a list of such objects or texts; JSON Lines
    .csv, .tsv            a table with a column of FIELDS

UTF-8, with or without a byte order mark. A line ends at \\n, \\r\\n or \\r and nowhere else; blank ones are skipped.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmd_dar.errors import UserError

FIELDS = ("prompt", "caption", "text")
JSON_LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
AROUND = re.compile(r"^[\s\ufeff]+|[\s\ufeff]+$")  # blanks, and the marks of files that were joined
ENDINGS = re.compile(r"[\r\n]")
PLAIN, LOSSLESS = "prompts.txt", "prompts.jsonl"  # of `copy_of`


def read_prompts(file: str) -> list[str]:
    """The prompts of `file`, without the blanks around them.

    Raises UserError naming the file, and the line, for what is no UTF-8 text, holds no prompt, or has an entry without
    one: no field or several of FIELDS, a value that is no text, an empty text.
    """
    try:
        return [_checked(place, entry) for place, entry in _entries(Path(file))]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"prompts = {file}: {' '.join(str(error).split())}") from error


def copy_of(prompts: list[str]) -> tuple[str, str]:
    """The name and the text of a file that `read_prompts` reads as these: a prompt a line, if each fits on one."""
    if not any(ENDINGS.search(prompt) for prompt in prompts) and not isinstance(_json(prompts[0]), dict):
        return PLAIN, "\n".join([*prompts, ""])
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    return LOSSLESS, "\n".join([*lines, ""])


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, text or object) of everything in the file; ValueError where nothing is."""
    text = _decoded(file)
    kind, empty = file.suffix.lower(), True
    if kind in SEPARATORS:
        entries = _table(text, SEPARATORS[kind])
    elif kind == ".json" and (whole := _json(text)) is not None:
        entries = ((f"entry {i}", entry) for i, entry in enumerate(whole if isinstance(whole, list) else [whole], 1))
    else:
        entries = _lines(text, kind in (*JSON_LINES, ".json"))
    for entry in entries:
        empty = False
        yield entry
    if empty:
        raise ValueError("it is empty; write one prompt a line, the empty prompt is added by itself")


def _decoded(file: Path) -> str:
    """The text, whose lines all end with \\n."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("holds NUL characters, as UTF-16 does; save it as UTF-8")
    return text


def _lines(text: str, as_json: bool) -> Iterator[tuple[str, Any]]:
    lines = [(number, AROUND.sub("", line)) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    as_json = as_json or bool(lines) and isinstance(_json(lines[0][1]), dict)
    for number, line in lines:
        entry = _json(line) if as_json else line
        if entry is None:
            raise ValueError(f"line {number} is no JSON; mend it, or write plain prompts, one a line, to a .txt file")
        yield f"line {number}", entry


def _json(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _table(text: str, separator: str) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True)
    for row in rows:
        yield f"line {rows.line_num}", {name: value for name, value in row.items() if name is not None}


def _checked(place: str, entry: Any) -> str:
    """The prompt of an entry; ValueError naming its place where there is none."""
    remedy = f"give every entry a text named {FIELDS[0]}"
    if isinstance(entry, dict):
        named = {name.strip().lower(): value for name, value in entry.items()}
        present = [name for name in FIELDS if name in named]
        if len(present) > 1 and present[0] != FIELDS[0]:
            raise ValueError(f"{place} holds {' and '.join(present)}; {remedy}")
        if not present:
            held = ", ".join(map(repr, list(entry)[:8])) or "nothing"
            raise ValueError(f"{place} holds {held}, and none of {', '.join(FIELDS)}; {remedy}")
        entry = named[present[0]]
    if not isinstance(entry, str):
        raise ValueError(f"{place} has no text for a prompt, but {str(entry)[:40]}; {remedy}")
    prompt = AROUND.sub("", entry)
    if not prompt:
        raise ValueError(f"the prompt of {place} is empty; leave it out, the empty prompt is added by itself")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt of {place} holds half a character ({error.reason}); mend it") from error
    return prompt
