"""Files of prompts, in the order in which they stand there.

    .txt and any other    a prompt a line; JSON Lines where the first line is a JSON object
    .jsonl, .ndjson       JSON Lines: on each line an object with a field of FIELDS, or a text
    .json                 a list of such objects or texts; JSON Lines
    .csv, .tsv, .parquet  a table with a column of FIELDS; parquet needs pyarrow

Beside the prompt an object or a row may have a negative, a text, and a seed, an integer from 0; others are ignored.
UTF-8, with or without a byte order mark. A line ends at \\n, \\r\\n or \\r and nowhere else; blank ones are skipped.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd_dar.errors import UserError
from dmd_dar.extras import needed

FIELDS = ("prompt", "caption", "text")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
BESIDE = ("negative", "seed")  # of a prompt
SEPARATORS = {".csv": ",", ".tsv": "\t"}
AROUND = re.compile(r"^[\s\ufeff]+|[\s\ufeff]+$")  # blanks, and the marks of files that were joined
ENDINGS = re.compile(r"[\r\n]")
PLAIN, LOSSLESS = "prompts.txt", "prompts.jsonl"  # of `copy_of`


@dataclass(frozen=True)
class Entry:
    """A prompt and what stands beside it, without the blanks around them; None for what does not."""

    place: str  # in its file, such as "line 3"
    prompt: str
    negative: str | None = None
    seed: int | None = None


def read_entries(file: str, column: str = "") -> list[Entry]:
    """The prompts of `file`, from the field or column `column`; empty: from the one of FIELDS.

    Raises UserError naming the file, and the line, for what is no UTF-8 text, holds no prompt, or has an entry without
    one: no such field or several of FIELDS, a value that is no text, an empty text; and for a negative or a seed that
    is none.
    """
    try:
        column = column.strip().lower()
        return [_entry(place, value, column) for place, value in _values(Path(file), column)]
    except (OSError, ValueError) as error:
        raise UserError(f"prompts = {file}: {' '.join(str(error).split())}") from error


def read_prompts(file: str, column: str = "") -> list[str]:
    """The prompts alone, as `read_entries` reads them."""
    return [entry.prompt for entry in read_entries(file, column)]


def negative_of(file: str, entries: list[Entry]) -> str | None:
    """The negative of all entries of `file`, None where none has one. UserError where they differ."""
    first = entries[0]
    for entry in entries:
        if entry.negative != first.negative:
            told = " and ".join(f"{one.place} has {_shown(one.negative)}" for one in (first, entry))
            remedy = "guidance leads all away from one, so name it for all, negative=TEXT, or split the file"
            raise UserError(f"prompts = {file}: the negatives differ, {told}; {remedy}")
    return first.negative


def _shown(negative: str | None) -> str:
    return "none" if negative is None else repr(negative if len(negative) <= 40 else f"{negative[:40]}...")


def copy_of(entries: list[Entry]) -> tuple[str, str]:
    """The name and the text of a file that is read as these prompts and seeds: a prompt a line, if that says it all."""
    prompts = [entry.prompt for entry in entries]
    seeded = any(entry.seed is not None for entry in entries)
    if not seeded and not any(map(ENDINGS.search, prompts)) and not isinstance(_json(prompts[0]), dict):
        return PLAIN, "\n".join([*prompts, ""])
    seeds = ({} if entry.seed is None else {"seed": entry.seed} for entry in entries)
    lines = (json.dumps({"prompt": one, **seed}, ensure_ascii=False) for one, seed in zip(prompts, seeds, strict=True))
    return LOSSLESS, "\n".join([*lines, ""])


def _values(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, text or object) of everything in the file; ValueError where nothing is."""
    kind, empty = file.suffix.lower(), True
    text = "" if kind == PARQUET else _decoded(file)
    if kind == PARQUET:
        found = _parquet(file, column)
    elif kind in SEPARATORS:
        found = _table(text, SEPARATORS[kind])
    elif kind == ".json" and (whole := _json(text)) is not None:
        found = ((f"entry {i}", entry) for i, entry in enumerate(whole if isinstance(whole, list) else [whole], 1))
    else:
        found = _lines(text, kind in (*JSON_LINES, ".json"))
    for value in found:
        empty = False
        yield value
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
    try:
        for row in rows:
            if any(row.pop(None, ())):  # type: ignore[call-overload]
                raise ValueError(
                    f"line {rows.line_num} has more cells than the first; quote a text with {separator!r} in it"
                )
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num + 1}: {error}; close and double the quotes there") from error


def _parquet(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """The rows, of the columns that are read: others may hold images."""
    needed("pyarrow")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names, number = table.schema_arrow.names, 0
            read = {_column("the table", names, column), *BESIDE}
            for batch in table.iter_batches(columns=[name for name in names if name.strip().lower() in read]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no parquet that can be read ({error}); save it anew") from error


def _entry(place: str, value: Any, column: str) -> Entry:
    """ValueError naming its place where there is no prompt, or where what stands beside it is wrong."""
    if not isinstance(value, dict):
        if column:
            raise ValueError(f"{place} is a text without columns; leave column = {column} out")
        return Entry(place, _text(place, value))
    named = {name.strip().lower(): one for name, one in value.items()}
    prompt = _text(place, named.pop(_column(place, list(value), column)))  # what it is taken from is nothing else
    return Entry(place, prompt, _negative(place, named.get("negative")), _seed(place, named.get("seed")))


def _column(place: str, names: list[str], column: str) -> str:
    """The name of the prompt among those of an entry, in lower case."""
    held = ", ".join(map(repr, names[:8])) or "nothing"
    named = {name.strip().lower() for name in names}
    present = [name for name in FIELDS if name in named]
    if column and column not in named:
        raise ValueError(f"{place} holds {held}, and no {column!r}; set column to a name that every entry has")
    if not column and not present:
        remedy = f"give every entry a text named {FIELDS[0]}, or name its column, column=NAME"
        raise ValueError(f"{place} holds {held}, and none of {', '.join(FIELDS)}; {remedy}")
    if not column and len(present) > 1 and present[0] != FIELDS[0]:
        remedy = f"give every entry a text named {FIELDS[0]}, or name its column, column={present[0]}"
        raise ValueError(f"{place} holds {' and '.join(present)}; {remedy}")
    return column or present[0]


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        remedy = f"give every entry a text named {FIELDS[0]}"
        raise ValueError(f"{place} has no text for a prompt, but {str(value)[:40]}; {remedy}")
    prompt = AROUND.sub("", value)
    if not prompt:
        raise ValueError(f"the prompt of {place} is empty; leave it out, the empty prompt is added by itself")
    _require_whole(place, "prompt", prompt)
    return prompt


def _require_whole(place: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} of {place} holds half a character ({error.reason}); mend it") from error


def _negative(place: str, value: Any) -> str | None:
    """None for nothing and for a cell that is empty."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"the negative of {place} is {str(value)[:40]}, no text; quote it, or leave it out")
    _require_whole(place, "negative", value)
    return AROUND.sub("", value) or None


def _seed(place: str, value: Any) -> int | None:
    """None for nothing and for a cell that is empty."""
    if value is None or isinstance(value, str) and not value.strip():
        return None
    seed = int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value) else value
    if type(seed) is not int or seed < 0:
        raise ValueError(f"the seed of {place} is {str(value)[:40]}, no integer from 0; mend it, or leave it out")
    return seed
