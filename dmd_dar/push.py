"""A student onto the Hugging Face hub: python -m dmd_dar.push student=RUN/student repo=OWNER/NAME

--dry-run lists what would be uploaded; it needs no network and no token.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # its client's own
from huggingface_hub.utils import validate_repo_id

from dmd_dar import config, models
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.models import adapters
from dmd_dar.models.hub import HUB_ID, read_json
from dmd_dar.models.pipeline_folder import INDEX, PACKAGE, SCHEDULER
from dmd_dar.models.saved import CARD, holds_network, read_card
from dmd_dar.train.disk.folder import FolderError, kept_still

README = "README.md"
# In these, and in all folders that are sent, nothing of an earlier student may remain.
REPLACED = ("transformer/*", "adapter/*", "scheduler/*", "vae/*", "text_encoder*/*", "tokenizer*/*")
PATHS_SHOWN = 5
LOCAL_PATH = re.compile(r"(?<![\w/.:<&;~-])/(?:[\w.+@\\-]+/)+[\w.+@\\-]+")  # absolute, two parts or more
OF_NO_MODEL = re.compile(r"\.gitattributes|README\.md|LICENSE.*", re.IGNORECASE)  # of a repo that was only made


@dataclass(frozen=True)
class PushConfig:
    """python -m dmd_dar.push"""

    student: str = key("", "folder of a student, RUN/student, RUN/student_best or another that a run saved", path=True)
    repo: str = key("", "where to on the hub, OWNER/NAME; made if it is not there")
    private: bool = key(True, "the repo is for its owner alone; false: for everybody")
    revision: str = key("", "branch, made if it is not there, or refs/pr/N; empty: the default branch")
    message: str = key("", "of the commit; empty: it names the student and its steps of training")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student is empty: name the folder of a student, student=RUN/student")
        if not HUB_ID.fullmatch(self.repo):
            raise ValueError("repo is not OWNER/NAME: name your account or organisation and the model, repo=OWNER/NAME")
        try:
            validate_repo_id(self.repo)
        except ValueError as error:
            raise ValueError(f"repo is no name on the hub: {error}; choose another") from error


@dataclass(frozen=True)
class Upload:
    """What is sent: files by their names in the repo, and lines for people about the whole."""

    files: dict[str, Path]
    facts: list[str]
    message: str

    def listing(self) -> str:
        """A line for each file with its size, the total, and the facts."""
        sizes = {name: file.stat().st_size for name, file in self.files.items()}
        lines = [f"{size / 1e6:>12.3f} MB  {name}{_linked(self.files[name], name)}" for name, size in sizes.items()]
        total = f"{sum(sizes.values()) / 1e6:>12.3f} MB  in {len(sizes)} files"
        return "\n".join([*lines, total, *self.facts])


def upload_of(cfg: PushConfig) -> Upload:
    """All that `push` sends, found without any network. UserError where the folder is no whole student."""
    folder = Path(cfg.student)
    _require_student(folder)
    card = read_card(folder).card  # all parts belong together
    files = dict(sorted([*_files(folder, "", (folder.resolve(),)), *_code(folder)]))
    steps = card.origin.get("steps")
    trained = f" after {steps} steps" if steps is not None else ""
    kind = "private" if cfg.private else "public"
    where = f"to {cfg.repo}, {cfg.revision or 'the default branch'}; {kind} if it is made for this"
    facts = [where, f"{folder.resolve().name}{trained}", *_front(files.get(README)), *_paths_told(files)]
    return Upload(files, facts, cfg.message or f"{folder.resolve().name}{trained}, by dmd_dar")


@contextmanager
def _unchanged(cfg: PushConfig) -> Iterator[None]:
    """Its run cannot go on meanwhile and replace the student. UserError where it goes on already."""
    with ExitStack() as held:
        try:
            held.enter_context(kept_still(Path(cfg.student).resolve().parent))
        except FolderError as error:
            fault = f"student = {cfg.student}: its run has not finished and may replace the folder meanwhile"
            raise UserError(f"{fault}; wait until it ends, or copy the folder elsewhere and push that") from error
        yield


def _require_student(folder: Path) -> None:
    if holds_network(folder):
        return
    remedy = "name the folder that a run exported, RUN/student"
    if (folder / adapters.CARD).is_file():
        remedy = f"it is an adapter, which is uploaded with its student: name {folder.parent}"
    elif holds_network(folder / "student"):
        remedy = f"name {folder / 'student'}"
    elif folder.is_dir() and (folder.parent / "checkpoints").is_dir() and not any(folder.iterdir()):
        remedy = "its run has not finished: the command that began the run continues it"
    raise UserError(f"student = {folder}: it holds no student; {remedy}")


def _files(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """(name in the repo, file) of all in and below a folder but what is hidden; links are followed."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield prefix + entry.name, entry
        elif entry.is_dir() and entry.resolve() not in above:
            yield from _files(entry, f"{prefix}{entry.name}/", (*above, entry.resolve()))
        else:
            raise UserError(f"{entry} is no file and leads to none: put the file there, or remove it")


def _code(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the repo, file) of the code with which diffusers loads parts of a pipeline that are none of its own.

    Of a repo it runs nothing else, and this with trust_remote_code alone.
    """
    file = folder / INDEX
    entries = read_json(file) if file.is_file() else {}
    if entries.get("scheduler") != [PACKAGE, SCHEDULER]:
        return
    here = Path(models.__file__).parent
    for name, entry in entries.items():
        if isinstance(entry, list) and entry[:1] == [PACKAGE]:
            yield f"{name}/{PACKAGE}.py", here / ("student_scheduler.py" if name == "scheduler" else "in_a_repo.py")


def _linked(file: Path, name: str) -> str:
    """Where the content of a file comes from, where it or a folder between is a link."""
    linked = any(os.path.islink(place) for place in (file, *list(file.parents)[: name.count("/")]))
    return f"  (a link; the content of {file.resolve()})" if linked else ""


def _front(readme: Path | None) -> list[str]:
    """What README.md tells the hub of base and licence, and where to say what it does not tell."""
    if readme is None:
        return [f"no {README}: the hub will know neither base nor licence; write one"]
    try:
        front = huggingface_hub.metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        fault = f"{readme}: its front matter is no YAML ({' '.join(str(error).split())})"
        raise UserError(f"{fault}; mend it") from error
    unsaid = {"base_model": "card.base_model=OWNER/NAME", "license": "card.license=ID"}
    return [
        f"{name}: {front[name]}"
        if front.get(name, "unknown") != "unknown"
        else f"{name}: unknown; {remedy} at the run's command, or a line of {README}, says it"
        for name, remedy in unsaid.items()
    ]


def _paths_told(files: dict[str, Path]) -> Iterator[str]:
    """A line for each file whose readers learn of paths on this machine."""
    for name, file in files.items():
        if file.suffix in (".json", ".md"):
            paths = list(dict.fromkeys(LOCAL_PATH.findall(file.read_text(encoding="utf-8", errors="replace"))))
            more = f" and {len(paths) - PATHS_SHOWN} more" if len(paths) > PATHS_SHOWN else ""
            if paths:
                yield f"{name} tells of paths on this machine: {', '.join(paths[:PATHS_SHOWN])}{more}"


def listing_of(cfg: PushConfig) -> str:
    """What `push` would send, in lines for people."""
    with _unchanged(cfg):
        return upload_of(cfg).listing()


def push(cfg: PushConfig) -> None:
    """Upload the student. Raises UserError where it cannot be, without a token, or where the hub refuses it."""
    with _unchanged(cfg):
        _push(cfg)


def _push(cfg: PushConfig) -> None:
    upload = upload_of(cfg)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: set HF_HUB_OFFLINE=0")
    if not huggingface_hub.get_token():
        raise UserError(f"repo = {cfg.repo}: no token of the hub is here; log in by `hf auth login`, or set HF_TOKEN")
    print(upload.listing(), flush=True)
    url = send(HfApi(), cfg, upload)
    print(f"{len(upload.files)} files at {url}")


@contextmanager
def _asking(cfg: PushConfig, *faults: type[Exception]) -> Iterator[None]:
    """Around calls of the hub alone: its refusals, and `faults` of the way to it, as one UserError."""
    try:
        yield
    except (OSError, HTTPError, *faults) as error:
        fault = f"repo = {cfg.repo}: the upload failed ({' '.join(str(error).split()) or type(error).__name__})"
        raise UserError(f"{fault}; mend that and run the same command again, which sends what is missing") from error


def send(api: HfApi, cfg: PushConfig, upload: Upload) -> str:
    """The calls of the hub, in order; returns where the student is then."""
    with _asking(cfg):
        made = api.create_repo(cfg.repo, private=cfg.private, exist_ok=True)
        found = api.model_info(cfg.repo)
    if cfg.private and found.private is False:  # it was there before
        raise UserError(f"repo = {cfg.repo}: it is there and public; private=false uploads to it all the same")
    print(f"{cfg.repo} is {'public' if found.private is False else 'private'}", flush=True)
    _require_ours(cfg.repo, found)
    if cfg.revision:
        with _asking(cfg):
            if not cfg.revision.startswith("refs/"):
                api.create_branch(cfg.repo, branch=cfg.revision, exist_ok=True)
            found = api.model_info(cfg.repo, revision=cfg.revision)
        _require_ours(cfg.repo, found)
    with tempfile.TemporaryDirectory() as staged:  # upload_folder leaves out what lies behind linked folders
        for name, file in upload.files.items():
            place = Path(staged, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file.resolve())
        with _asking(cfg, ValueError, RuntimeError):  # which the hub's library makes of a transfer that breaks off
            api.upload_folder(
                repo_id=cfg.repo,
                folder_path=staged,
                revision=cfg.revision or None,
                commit_message=upload.message,
                delete_patterns=_replaced(upload),
            )
    return str(made)


def _replaced(upload: Upload) -> list[str]:
    return sorted({*REPLACED, *(f"{name.partition('/')[0]}/*" for name in upload.files if "/" in name)})


def _require_ours(repo: str, found: ModelInfo) -> None:
    """UserError where the repo holds another model, parts of which the upload would remove."""
    names = [entry.rfilename for entry in found.siblings or ()]
    others = [name for name in names if not OF_NO_MODEL.fullmatch(name)]
    if others and CARD not in names and found.library_name != "dmd_dar":
        fault = f"repo = {repo}: it holds files ({', '.join(others[:3])}) and no {CARD}, so it is no student's"
        raise UserError(f"{fault}, and some would be removed; choose another name, repo=OWNER/NAME")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(PushConfig, push, argv, description=__doc__ or "", plan=listing_of)


if __name__ == "__main__":
    main()
