"""A student as a complete pipeline of diffusers: of its base's class, with the base's own text encoders and tokenizers.

Parts of a base on this machine are links to them, those of a hub id are named (`BasePart`). Loading needs `import
dmd_dar` before, for the scheduler and for a routed transformer; see docs/sampling.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.models.hub import HUB_ID, read_json

PACKAGE, PART, NAMED = "dmd_dar", "BasePart", "base_part.json"
INDEX = "model_index.json"
SCHEDULER = "StudentScheduler"
OURS = ("transformer", "scheduler")  # the student's own


@dataclass(frozen=True)
class Base:
    """The pipeline that a student was distilled in."""

    folder: Path  # on this machine
    name: str = ""  # its hub id; empty where it is a folder alone
    revision: str = ""  # of the hub id, a commit where it is known

    @property
    def origin(self) -> dict[str, str]:
        """What a student's card says of it, for `base_of`."""
        said = {"base": self.name or str(self.folder), "base_revision": self.revision}
        return {name: value for name, value in said.items() if value}

    @property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / INDEX)

    def parts(self) -> dict[str, list[str]]:
        """(library, class) by name of what the student takes over: all parts but its own and those left out."""
        entries = self.index.items()
        found = {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
        return {name: entry for name, entry in found.items() if name not in OURS and entry != [None, None]}


def base_at(place: Path, path: str, revision: str) -> Base | None:
    """The base at `place`, the folder of `path`, a local path or a hub id; None where it is no pipeline.

    A folder of the hub's cache is its commit's.
    """
    if not (place / INDEX).is_file():
        return None
    if Path(path).exists():
        return Base(place.absolute())
    return Base(place, path, place.name if place.parent.name == "snapshots" else revision)


def base_of(origin: dict[str, Any]) -> Base | None:
    """The base that a student's card names, as far as it is on this machine; the hub is not asked."""
    path, revision = str(origin.get("base", "")), str(origin.get("base_revision", ""))
    if path and (Path(path) / INDEX).is_file():
        return Base(Path(path))
    if not HUB_ID.fullmatch(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(path, INDEX, revision=revision or None)
    return Base(Path(file).parent, path, revision) if isinstance(file, str) else None


def lay_parts(base: Base, folder: Path) -> dict[str, list[str]]:
    """Put the base's parts into a student's folder as links or names; returns their entries of model_index.json.

    But for its VAE, which is small: a student has its own copy, without which it could make no images elsewhere.
    """
    entries = {}
    for name, entry in base.parts().items():
        linked = base.folder / name
        if name == "vae":
            continue
        if base.name:
            named = {"base": base.name, "revision": base.revision, "part": name, "class": entry}
            write_atomic(make_folder(folder / name) / NAMED, json.dumps(named, indent=1))
            entries[name] = [PACKAGE, PART]
        elif linked.is_dir():
            (folder / name).symlink_to(linked.resolve(), target_is_directory=True)
            entries[name] = entry
    return entries


def index_of(base: Base, transformer: str, routed: bool, parts: dict[str, list[str]]) -> dict[str, Any]:
    """model_index.json of a student: the base's, with its own transformer and scheduler, and with these `parts`."""
    kind = [PACKAGE if routed else "diffusers", transformer]
    return {**base.index, **parts, "transformer": kind, "scheduler": [PACKAGE, SCHEDULER]}
