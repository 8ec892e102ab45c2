"""Are the measured numbers of two JSON files the same? python runs/same_numbers.py BEFORE.json AFTER.json

Compares report.json, compare.json, quality.json or log lines key by key, exactly. Left out are times, memory, hashes,
versions, commands and paths, which differ between two runs of one measurement. Exit code 1 where anything differs.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Keys that tell of one run, its clock, memory, files and version, and not of what was measured.
PASSING = {
    *("latency_ms", "latency_ms_per_image", "latency_ms_range", "latency_runs", "training_step_seconds"),
    *("steps_per_second", "seconds", "time", "peak_memory_mb", "peak_memory_method"),
    *("provenance", "contract_hash", "versions", "git", "machine", "command", "network", "checkpoints"),
    *("folder", "out", "out_dir", "path", "data_hash"),
}
COST_WORDS = re.compile(r"[\d.]+ times (its|the) (time per image|time of a training step|time|peak memory)")


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and null with the place at which it stands, without what is passing."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in PASSING:
                yield from leaves(part, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from leaves(part, f"{place}[{index}]")
    else:
        yield place, COST_WORDS.sub("its cost", value) if isinstance(value, str) else value


def differences(before: Any, after: Any) -> list[str]:
    """One line for each place that only one of them has, or at which they hold different values."""
    old, new = dict(leaves(before)), dict(leaves(after))
    lines = [f"{place}: only before" for place in old.keys() - new.keys()]
    lines += [f"{place}: only after" for place in new.keys() - old.keys()]
    lines += [f"{place}: {old[place]} -> {new[place]}" for place in old.keys() & new.keys() if old[place] != new[place]]
    return sorted(lines)


def read(path: Path) -> Any:
    """A JSON file, or the lines of a JSONL file as a list."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    chosen = parser.parse_args(argv)
    before, after = read(chosen.before), read(chosen.after)
    told = differences(before, after)
    for line in told:
        print(line)
    compared = len(dict(leaves(before)))
    print(f"{compared} values compared, {len(told)} differ: {chosen.before} and {chosen.after}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
