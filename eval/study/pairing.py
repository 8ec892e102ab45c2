"""Which runs may be compared: arms that differ in their routing alone, run for run from the same training seed."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.saved import weight_count
from dmd_dar.train.loop.optimise import OptimiserConfig

from .runs import Run, read_run
from .wording import MATCHED_WITHIN

ArmName = Literal["residual", "dar", "matched", "frozen"]
RunsByArm = dict[ArmName, list[Run]]  # every arm in the order of the training seeds

BOOK_KEEPING = (
    "out_dir",
    "resume",
    "log.",
    "checkpoint.",
    "launch.",
    "regression.cache",
)
NUMERICAL = ("launch.precision", "launch.gradient_free")  # keys under one of those that change what is learned
ROUTING = "student.routing."
# How a student learns: keys of `student` that no arm may differ in, whatever its network is.
LEARNING = tuple(f"student.{field.name}" for field in fields(OptimiserConfig)) + ("student.ema",)


def book_keeping(name: str) -> bool:
    """Whether a key says only where and by what machines a run was made."""
    return name.startswith(BOOK_KEEPING) and name not in NUMERICAL


@dataclass(frozen=True)
class ArmsConfig:
    """The runs of each arm, one for each training seed; the same seeds in every arm."""

    residual: tuple[str, ...] = key((), "run folders of students with plain residual additions", path=True)
    dar: tuple[str, ...] = key((), "run folders of students with DAR", path=True)
    matched: tuple[str, ...] = key((), "control: residual students with as many parameters as DAR's", path=True)
    frozen: tuple[str, ...] = key((), "control: as arms.dar, trained with student.routing.query=static", path=True)


def read_groups(arms: ArmsConfig) -> RunsByArm:
    """The finished runs of every arm that is given, sorted by training seed.

    A ConfigError naming runs, key and values where a run is unfinished, a seed is missing or double, an arm has the
    wrong routing, or runs differ in more than their arm's own keys, the seed and book-keeping.
    """
    groups: RunsByArm = {}
    for arm in get_args(ArmName):
        if folders := getattr(arms, arm):
            groups[arm] = _read(arm, folders)
    for arm, runs in groups.items():
        _same_seeds(arm, runs, groups["residual"])
        for run in runs[1:]:
            _alike(arm, run, arm, runs[0], ())
    _alike("dar", groups["dar"][0], "residual", groups["residual"][0], (ROUTING,))
    if "matched" in groups:
        _alike("matched", groups["matched"][0], "residual", groups["residual"][0], ("student.",), LEARNING)
        _same_size(groups["matched"][0], groups["dar"][0])
    if "frozen" in groups:
        _alike("frozen", groups["frozen"][0], "dar", groups["dar"][0], (ROUTING + "query",))
    same_data(groups)
    return groups


def _read(arm: ArmName, folders: Sequence[str]) -> list[Run]:
    try:
        runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.cfg.seed)
    except config.ConfigError as error:
        raise config.ConfigError(f"arms.{arm}: {str(error).removeprefix('runs: ')}") from error
    for first, second in zip(runs, runs[1:], strict=False):
        if first.cfg.seed == second.cfg.seed:
            fault = f"{first.folder} and {second.folder} both have seed = {first.cfg.seed}"
            raise config.ConfigError(f"arms.{arm}: {fault}; name one run for each training seed")
    different_networks(arm, runs)
    for run in runs:
        query = run.cfg.student.routing.query
        if not _fits(arm, query):
            wanted = {"dar": "timestep, dynamic or static", "frozen": "static"}.get(arm, "residual")
            fault = f"{run.folder} has student.routing.query = {query}, where {wanted} is expected"
            raise config.ConfigError(f"arms.{arm}: {fault}; name runs of that arm")
    return runs


def different_networks(arm: ArmName, runs: list[Run]) -> None:
    """Refuse a copy under another seed: it would count one training twice."""
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(run.saved.digest, run)
        if other is not run:
            fault = f"{other.folder} and {run.folder} hold the same student"
            raise config.ConfigError(f"arms.{arm}: {fault}; train one from another seed")


def _fits(arm: ArmName, query: str) -> bool:
    if arm == "dar":
        return query != "residual"
    return query == ("static" if arm == "frozen" else "residual")


def _same_seeds(arm: ArmName, runs: list[Run], others: list[Run]) -> None:
    ours, theirs = ({run.cfg.seed: run.folder for run in group} for group in (runs, others))
    for has, lacks, here, there in ((theirs, ours, "residual", arm), (ours, theirs, arm, "residual")):
        for seed in sorted(has.keys() - lacks.keys()):
            fault = f"no run of seed = {seed}, the partner of {has[seed]} in arms.{here}"
            raise config.ConfigError(f"arms.{there}: {fault}; add it, or leave that one out")


def _alike(
    arm: ArmName, run: Run, other_arm: ArmName, other: Run, own: tuple[str, ...], never: tuple[str, ...] = ()
) -> None:
    """Refuse a difference beyond the keys that the arm is made of (`own`, but for `never`), seed and book-keeping."""
    for name, ours, theirs in config.differences(run.cfg, other.cfg):
        if name == "seed" or book_keeping(name) or (name.startswith(own) and name not in never):
            continue
        fault = f"{run.folder} has {name} = {ours}, but {other.folder} in arms.{other_arm} has {theirs}"
        may = f"{', '.join(own)} (and seed)" if own else "seed"
        raise config.ConfigError(f"arms.{arm}: {fault}; these runs may differ in {may} only, train one of them anew")


def same_data(groups: RunsByArm) -> None:
    """Refuse students trained on other images than the first; the configuration names the data, a hash tells it."""
    first = groups["residual"][0]
    theirs = first.origin.get("data")
    for arm, runs in groups.items():
        for run in runs:
            ours = run.origin.get("data")
            if ours != theirs:
                fault = f"{run.folder} was trained on data of hash {ours}, {first.folder} on {theirs}"
                raise config.ConfigError(f"arms.{arm}: {fault}; train one of them anew")


def _same_size(matched: Run, routed: Run) -> None:
    ours, theirs = (weight_count(run.folder / "student") for run in (matched, routed))
    if abs(ours / theirs - 1) > MATCHED_WITHIN:
        fault = f"{matched.folder} has {ours} parameters, {routed.folder} in arms.dar has {theirs}"
        raise config.ConfigError(f"arms.matched: {fault}; a matched arm is within {100 * MATCHED_WITHIN:.0f} %")
