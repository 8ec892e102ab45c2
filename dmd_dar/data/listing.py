"""Which images a folder holds, of which class, and with which content.

    FOLDER/CLASS/...    a class for each folder, its images at any depth; or
    FOLDER/...          no folders and one class

Classes and images stand in the order of their names. Names that start with a dot are left out, and so are files that do
not end as an image does. Links to files inside the folder are followed, all others refused.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmd_dar.data.decode import SUFFIXES, ImageError
from dmd_dar.errors import UserError

SHOWN = 5  # faults that one message names
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageFile:
    """`name` is the path below the folder, `digest` the SHA-256 of the bytes."""

    name: Path
    label: int
    digest: bytes


@dataclass(frozen=True)
class Listing:
    """The images of a folder; `left_out` counts its other files by their endings."""

    folder: Path
    label_names: tuple[str, ...]
    files: tuple[ImageFile, ...]
    left_out: dict[str, int]

    @property
    def hash(self) -> str:
        """SHA-256, hexadecimal, over all names and contents."""
        named_digests = (os.fsencode(file.name) + b"\0" + file.digest for file in self.files)
        return hashlib.sha256(b"".join(named_digests)).hexdigest()


def list_images(path: str | os.PathLike[str]) -> Listing:
    """Every image of the folder `path`, with the digest of its bytes.

    Raises UserError where there is no folder or no image, a class without images, a class whose name cannot be shown,
    an image beside class folders, a link out of the folder or to another one, a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"data.path = {folder}: no folder; name the folder that holds your images")
    visible = sorted(_visible(folder))
    names = [name for name in visible if name.suffix.lower() in SUFFIXES]
    classes = sorted(entry.name for entry in os.scandir(folder) if _is_class(entry))
    if faults := [(name, fault) for name in visible if (fault := _fault(folder, name, bool(classes)))]:
        raise unusable(folder, faults)
    _refuse_classes(folder, classes, {name.parts[0] for name in names})
    digests = in_threads(folder, names, lambda name: _digest(folder / name), "hashing images")
    labels = {name: label for label, name in enumerate(classes)}
    files = (ImageFile(name, labels.get(name.parts[0], 0), digest) for name, digest in zip(names, digests, strict=True))
    left_out = Counter(name.suffix.lower() or "no ending" for name in set(visible) - set(names))
    return Listing(folder, tuple(classes) or (folder.resolve().name,), tuple(files), dict(sorted(left_out.items())))


def unusable(folder: Path, faults: Sequence[tuple[Path, str]]) -> UserError:
    """One error for all faulty files that names the first ones."""
    shown = "; ".join(f"{str(name)!r}: {fault}" for name, fault in faults[:SHOWN])
    more = f"; and {len(faults) - SHOWN} more" * (len(faults) > SHOWN)
    return UserError(f"data.path = {folder}: images that cannot be used: {shown}{more}. Mend them or take them out")


def in_threads(folder: Path, names: Sequence[Path], work: Callable[[Path], Any], title: str) -> Iterator[Any]:
    """work(name) of every name, in order; at the end a UserError for all on which it raised ImageError or OSError."""

    def attempt(name: Path) -> Any:
        try:
            return work(name)
        except (ImageError, OSError) as error:
            return error

    faults = []
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(names), desc=title, disable=None, leave=False) as bar:
        for name, outcome in zip(names, pool.map(attempt, names), strict=True):
            bar.update()
            if isinstance(outcome, Exception):
                faults.append((name, getattr(outcome, "strerror", None) or str(outcome)))
            else:
                yield outcome
    if faults:
        raise unusable(folder, faults)


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _visible(folder: Path) -> Iterator[Path]:
    """Files and links below the folder, relative to it; links to folders are not entered."""

    def stop(error: OSError) -> None:
        raise UserError(f"data.path = {folder}: {error.filename!r} cannot be listed: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name).relative_to(folder) for name in [*links, *files] if not name.startswith("."))


def _fault(folder: Path, name: Path, in_classes: bool) -> str:
    """What is wrong with where a file stands, empty for nothing."""
    path = folder / name
    if os.path.isdir(path):
        return "a link to a folder; put the folder itself there"
    if name.suffix.lower() not in SUFFIXES:
        return ""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return "a link out of the folder; put the file itself there"
    if not os.path.isfile(path):
        return "a link that leads nowhere" if os.path.islink(path) else "no regular file, or out of reach"
    return "beside the class folders, in none of them" if in_classes and len(name.parts) == 1 else ""


def _refuse_classes(folder: Path, classes: list[str], filled: set[str]) -> None:
    """UserError for classes that are empty or have no name to show, and for a folder without any image."""
    if not filled:
        raise UserError(f"data.path = {folder}: holds no images; files that end in {', '.join(SUFFIXES)} are read")
    empty = [name for name in classes if name not in filled]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:SHOWN])
        raise UserError(f"data.path = {folder}: class folders without images: {shown}; fill them or take them out")
    for name in classes:
        if not name.isprintable():
            raise UserError(
                f"data.path = {folder}: the class folder {name!r} has a name that cannot be shown; rename it"
            )


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
