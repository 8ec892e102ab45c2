"""What a run says while it runs: `log.jsonl` always, wandb and TensorBoard on request, and one line of progress."""

import dataclasses
import json
import math
import os
import secrets
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal, Self

from tqdm import tqdm

from dmd_dar import extras
from dmd_dar.atomic import write_atomic
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.train.disk.folder import FolderError, RunFolder
from dmd_dar.train.processes.runtime import tensorboard_tracker, wandb_tracker
from dmd_dar.train.watch.stopping import StopWord

UNNAMEABLE = ("/", "\\", "#", "?", "%", ":")  # in names on wandb's server


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged, how often; free to change when a run is resumed."""

    every: int = key(10, "interval of log records", unit="steps", least=1)
    samples_every: int = key(100, "interval of sample grids", unit="steps", least=1)
    health_every: int = key(50, "interval of a distillation's health signals; 0: none", unit="steps", least=0)
    health_samples: int = key(64, "samples of the student, and of the teacher, behind them", least=2)
    stop_when: tuple[StopWord, ...] = key(
        (), "faults of a distillation's health that end it, as finished; see docs/health.md"
    )
    stop_patience: int = key(2, "health records in a row in which a fault of stop_when has to stand", least=1)
    stop_after: int = key(0, "steps before which stop_when counts nothing", unit="steps", least=0)
    wandb: Literal["disabled", "offline", "online"] = key(
        "offline", "where wandb keeps its copy; offline stays in the run folder"
    )
    project: str = key("dmd_dar", "wandb project")
    name: str = key("", "wandb run name; empty takes the run folder's")
    tensorboard: bool = key(False, "write the records for TensorBoard, too, into the run folder's tensorboard")

    def __post_init__(self) -> None:
        if self.stop_when and not self.health_every:
            raise ValueError("stop_when needs health signals, and health_every is 0: set it, or leave stop_when out")
        for name, text in (("project", self.project), ("name", self.name)):
            if not text.isprintable() or any(sign in text for sign in UNNAMEABLE):
                raise ValueError(f"{name} must be printable and without {' '.join(UNNAMEABLE)}, got {text!r}")


class RunLog:
    """One JSON line per record, handed to the system when `write` returns. Without a path it does nothing."""

    def __init__(self, path: Path | None, wandb: Any = None, tensorboard: Any = None):
        self.file = None if path is None else path.open("a", encoding="utf-8")
        self.wandb, self.tensorboard = wandb, tensorboard  # accelerate's trackers

    @classmethod
    def open(cls, folder: RunFolder | None, settings: LogConfig, config: dict[str, Any], step: int) -> Self:
        """The log of a run that starts or resumes at `step`; `folder` is the main process's, None elsewhere.

        Records that a dead run left beyond `step` are dropped, so the log holds every step once. Raises FolderError
        naming the key of a tracker whose package is missing or that does not start.
        """
        if folder is None:
            return cls(None)
        path = folder.path / "log.jsonl"
        keep_until(path, step)
        tensorboard = _open_tensorboard(folder.path, step) if settings.tensorboard else None
        wandb = _open_wandb(folder.path, settings, config) if settings.wandb != "disabled" else None
        return cls(path, wandb, tensorboard)

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds numbers, texts and lists of them; "step" is the step it belongs to."""
        if self.file is None:
            return
        self.file.write(json.dumps(_json(record), allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(record)  # which finds the step in the record
        if self.tensorboard is not None:
            shown = {name: value for name, value in record.items() if name != "step"}
            self.tensorboard.log(shown, step=record.get("step"))

    def sync(self) -> None:
        """Have all that was written outlast a power cut."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        for tracker in (self.wandb, self.tensorboard):
            if tracker is not None:
                tracker.finish()
        self.wandb = self.tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, up to a line that a kill cut short or a power cut spoilt."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            records.append(json.loads(line if line.endswith(b"\n") else b""))
        except ValueError:
            break
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop the records beyond `step` and a line cut short, in one atomic replacement."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read(path) if record.get("step", 0) <= step]
        write_atomic(path, "".join(kept))


class Progress:
    """Steps done, speed, time left: a bar on a terminal, else a message every `interval` seconds."""

    def __init__(
        self, steps: int, start: int = 0, *, enabled: bool = True, interval: float = 30.0, stream: IO[str] | None = None
    ):
        self.steps, self.start, self.step = steps, start, start
        self.stream = sys.stderr if stream is None else stream
        self.enabled, self.interval = enabled, interval
        self.began = self.printed = time.monotonic()
        self.bar: tqdm | None = None
        if enabled and self.stream.isatty():
            self.bar = tqdm(total=steps, initial=start, file=self.stream, unit="step", dynamic_ncols=True)

    @property
    def rate(self) -> float:
        """Steps per second since the start of this process's part."""
        return (self.step - self.start) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, step: int) -> None:
        """`step` is done."""
        done, self.step = step - self.step, step
        if self.bar is not None:
            self.bar.update(done)
        elif self.enabled and (step == self.steps or time.monotonic() - self.printed >= self.interval):
            self.printed = time.monotonic()
            left = tqdm.format_interval((self.steps - step) / max(self.rate, 1e-9))
            LOGGER.info(f"step {step}/{self.steps}  {self.rate:.3g} steps/s  ETA {left}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _json(value: Any) -> Any:
    """Plain JSON; a number that is not finite becomes its name, so that the line stays valid and tells the truth."""
    if isinstance(value, dict):
        return {str(name): _json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _open_wandb(folder: Path, settings: LogConfig, config: dict[str, Any]) -> Any:
    """accelerate's tracker of a wandb run that lives in the run folder; a resumed run keeps its id."""
    fault, remedy = f"log.wandb = {settings.wandb}", "use log.wandb=disabled"
    try:
        import wandb
    except ImportError as error:
        raise FolderError(
            f"{fault}: wandb cannot be imported ({error}); {extras.remedy('wandb')}, or {remedy}"
        ) from error
    known = folder / "wandb" / "id.txt"
    if not known.exists():
        known.parent.mkdir(exist_ok=True)
        write_atomic(known, secrets.token_hex(4))
    try:
        if settings.wandb == "online" and not wandb.login(prompt=False, verify=False):
            raise FolderError(f"{fault}: no API key is set; run `wandb login` once or set WANDB_API_KEY, or {remedy}")
        tracker = wandb_tracker(
            settings.project,
            dir=folder,
            mode=settings.wandb,
            name=settings.name or folder.name,
            config=config,
            id=known.read_text().strip(),
            resume="allow" if settings.wandb == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise FolderError(f"{fault}: wandb did not start ({reason}); {remedy}") from error
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker


def _open_tensorboard(folder: Path, step: int) -> Any:
    """accelerate's tracker that writes into RUN/tensorboard; TensorBoard hides what a dead run left beyond `step`."""
    try:
        return tensorboard_tracker(folder / "tensorboard", purge_step=step + 1)
    except ImportError as error:
        raise FolderError(
            f"log.tensorboard = true: tensorboard cannot be imported; {extras.remedy('tensorboard')}, or use"
            " log.tensorboard=false"
        ) from error
