"""Which runs may be compared: arms that differ in their routing alone, run for run from the same training seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.saved import weight_count
from dmd_dar.train.loop.optimise import OptimiserConfig

from ..metrics.intervals import LARGEST_EXACT
from .few_steps import FewSteps, titles
from .runs import Run, own_prompts, read_run, require_shared
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
STEPS = ("rungs", "guidance_scale", "sampler")  # keys of which arms are compared one by one
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
    may_differ: tuple[str, ...] = key(
        (), "keys in which residual, dar and frozen may differ, too: student.lr, searched for in each"
    )


def read_groups(arms: ArmsConfig, prompts: Callable[[Run], str] = own_prompts) -> dict[FewSteps, RunsByArm]:
    """The finished runs of every arm that is given, sorted by training seed, for each of the few steps that they take.

    A ConfigError naming runs, key and values where a run is unfinished, steps or a seed are missing in an arm, a seed
    is double, an arm has the wrong routing, or runs of equal steps differ in more than their arm's own keys, the seed
    and book-keeping. Controls may be missing at some steps. prompts: as of `read_runs`, from the first residual run.
    """
    read = {arm: _read(arm, folders) for arm in get_args(ArmName) if (folders := getattr(arms, arm))}
    named = prompts(read["residual"][0])
    read = {arm: [replace(run, prompts=named) for run in runs] for arm, runs in read.items()}
    for arm, runs in read.items():
        _require_same_steps(arm, runs, "residual", read["residual"])
    _require_same_steps("residual", read["residual"], "dar", read["dar"])
    groups: dict[FewSteps, RunsByArm] = {
        few: {arm: own for arm, runs in read.items() if (own := [run for run in runs if run.sampled_with == few])}
        for few in titles(run.sampled_with for run in read["residual"])
    }
    for group in groups.values():
        _require_alike(group, arms.may_differ)
    require_shared([group["residual"][0] for group in groups.values()], "arms")
    require_same_data(read)
    return groups


def _require_alike(group: RunsByArm, may_differ: tuple[str, ...] = ()) -> None:
    """Of runs of equal steps: the same seeds in every arm, and no difference beyond what the arms are made of and
    `may_differ`.
    """
    count = len(group["residual"])
    if not 2 <= count <= LARGEST_EXACT:
        rungs = list(group["residual"][0].cfg.rungs)
        fault = f"names {count} runs of rungs = {rungs}: name 2 to {LARGEST_EXACT}, one for each training seed"
        raise config.ConfigError(f"arms.residual {fault}")
    for arm, runs in group.items():
        _require_same_seeds(arm, runs, group["residual"])
        for run in runs[1:]:
            _require_same_keys(arm, run, arm, runs[0], ())
    _require_same_keys("dar", group["dar"][0], "residual", group["residual"][0], (ROUTING, *may_differ))
    if "matched" in group:
        _require_same_keys("matched", group["matched"][0], "residual", group["residual"][0], ("student.",), LEARNING)
        _require_same_size(group["matched"][0], group["dar"][0])
    if "frozen" in group:
        _require_same_keys("frozen", group["frozen"][0], "dar", group["dar"][0], (ROUTING + "query", *may_differ))


def _read(arm: ArmName, folders: Sequence[str]) -> list[Run]:
    """The arm's runs by training seed. Refuses a seed that is double, one student twice, and another arm's routing."""
    try:
        runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.cfg.seed)
    except config.ConfigError as error:
        raise config.ConfigError(f"arms.{arm}: {str(error).removeprefix('runs: ')}") from error
    seen: dict[tuple[FewSteps, int], Run] = {}
    for run in runs:
        first = seen.setdefault((run.sampled_with, run.cfg.seed), run)
        if first is not run:
            fault = f"{first.folder} and {run.folder} both have seed = {run.cfg.seed}"
            raise config.ConfigError(f"arms.{arm}: {fault}; name one run for each training seed")
    require_different_networks(arm, runs)
    for run in runs:
        query = run.cfg.student.routing.query
        if not _routes_as(arm, query):
            wanted = {"dar": "timestep, dynamic or static", "frozen": "static"}.get(arm, "residual")
            fault = f"{run.folder} has student.routing.query = {query}, where {wanted} is expected"
            raise config.ConfigError(f"arms.{arm}: {fault}; name runs of that arm")
    return runs


def _require_same_steps(arm: ArmName, runs: list[Run], other_arm: ArmName, others: list[Run]) -> None:
    """Refuse a run of steps of which the other arm has none."""
    for run in runs:
        if run.sampled_with in {other.sampled_with for other in others}:
            continue
        name, ours, _ = next(one for one in config.differences(run.cfg, others[0].cfg) if one[0] in STEPS)
        fault = (
            f"{run.folder} has {name} = {ours}, but no run in arms.{other_arm} has it with the same {', '.join(STEPS)}"
        )
        raise config.ConfigError(f"arms.{arm}: {fault}; add its partner, or leave it out")


def require_different_networks(arm: ArmName, runs: list[Run]) -> None:
    """Refuse a copy under another seed: it would count one training twice."""
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(run.saved.digest, run)
        if other is not run:
            fault = f"{other.folder} and {run.folder} hold the same student"
            raise config.ConfigError(f"arms.{arm}: {fault}; train one from another seed")


def _routes_as(arm: ArmName, query: str) -> bool:
    """Whether runs of the arm may have that query."""
    if arm == "dar":
        return query != "residual"
    return query == ("static" if arm == "frozen" else "residual")


def _require_same_seeds(arm: ArmName, runs: list[Run], residual: list[Run]) -> None:
    """Refuse a run whose training seed the other arm, residual or this one, does not have."""
    ours, theirs = ({run.cfg.seed: run.folder for run in group} for group in (runs, residual))
    for has, lacks, its_arm, other_arm in ((theirs, ours, "residual", arm), (ours, theirs, arm, "residual")):
        for seed in sorted(has.keys() - lacks.keys()):
            fault = f"no run of seed = {seed}, the partner of {has[seed]} in arms.{its_arm}"
            raise config.ConfigError(f"arms.{other_arm}: {fault}; add it, or leave that one out")


def _require_same_keys(
    arm: ArmName,
    run: Run,
    other_arm: ArmName,
    other: Run,
    may_differ: tuple[str, ...],
    must_agree: tuple[str, ...] = (),
) -> None:
    """Refuse students as of different steps, and a difference in any key but the seed, book-keeping, and those that
    begin with one of `may_differ`. Of the latter, `must_agree` are refused all the same.
    """
    if run.updates != other.updates:
        theirs = f"{other.folder} in arms.{other_arm} one of {other.updates}"
        fault = f"{run.folder} is a student of {run.updates} steps, {theirs}"
        raise config.ConfigError(f"arms.{arm}: {fault}; name students as of the same step")
    for name, ours, theirs in config.differences(run.cfg, other.cfg):
        if name == "seed" or book_keeping(name) or (name.startswith(may_differ) and name not in must_agree):
            continue
        fault = f"{run.folder} has {name} = {ours}, but {other.folder} in arms.{other_arm} has {theirs}"
        may = f"{', '.join(may_differ)} (and seed)" if may_differ else "seed"
        raise config.ConfigError(f"arms.{arm}: {fault}; these runs may differ in {may} only, train one of them anew")


def require_same_data(groups: RunsByArm) -> None:
    """Refuse students trained on other images than the first; the configuration names the data, a hash tells it."""
    first = groups["residual"][0]
    theirs = first.origin.get("data")
    for arm, runs in groups.items():
        for run in runs:
            ours = run.origin.get("data")
            if ours != theirs:
                fault = f"{run.folder} was trained on data of hash {ours}, {first.folder} on {theirs}"
                raise config.ConfigError(f"arms.{arm}: {fault}; train one of them anew")


def _require_same_size(matched: Run, routed: Run) -> None:
    """Refuse a matched student whose number of parameters is not DAR's."""
    ours, theirs = (weight_count(run.place) for run in (matched, routed))
    if abs(ours / theirs - 1) > MATCHED_WITHIN:
        fault = f"{matched.folder} has {ours} parameters, {routed.folder} in arms.dar has {theirs}"
        raise config.ConfigError(f"arms.matched: {fault}; a matched arm is within {100 * MATCHED_WITHIN:.0f} %")
