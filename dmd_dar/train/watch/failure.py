"""What a run leaves when it fails in a network: the last batch of each, what went wrong, and where it began.

    RUN/failure/rank0.json  rank0.safetensors  rank0.txt

Legend: a *call* is one call of a network's velocity, with x_t (B, C, S, S), t (B,), cond (B,), its output v and,
of the fake score, rung (1,).
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.errors import DivergedError, UserError
from dmd_dar.models.denoiser import NetworkVelocity
from dmd_dar.train.processes.memory import out_of_memory
from dmd_dar.train.processes.parts import local

FOLDER = "failure"
ASIDE = {  # what else calls networks, and how to do without it
    "health": "log.health_every=0 leaves the health signals out",
    "pictures": "a larger log.samples_every puts the pictures off",
}
OUTPUT = "v"


class NetworkError(UserError):
    """An exception in a step, a measurement or a picture; the message names it and any network whose call failed,
    `__cause__` is the exception."""


class Calls:
    """The last call of each network, by name, held by reference: nothing is copied, no graph is kept."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Tensor]] = {}  # the newest last
        self.running = ""  # the network that is being called

    def watch(self, name: str, velocity: Callable[..., Tensor]) -> NetworkVelocity:
        """The same velocity; its last call is remembered under `name`."""

        def watched(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
            self.last.pop(name, None)
            self.running, self.last[name] = name, {"x_t": x_t.detach(), "t": t.detach(), "cond": cond}
            self.last[name] |= {"rung": torch.tensor(rung)} if rung else {}
            v = velocity(x_t, t, cond, *rung)
            self.running, self.last[name][OUTPUT] = "", v.detach()
            return v

        return watched

    def culprit(self) -> str:
        """What the last calls say of the cause: the call that raised, or the first whose output is not finite."""
        if self.running:
            shape = list(self.last[self.running]["x_t"].shape)
            return f"in a call of the {self.running} on x_t {shape}"
        for name, call in self.last.items():
            if not finite(call[OUTPUT]):
                return f"the {name}'s output is not finite"
        return ""


@dataclass(frozen=True)
class Place:
    """Where in the run a phase, or one of ASIDE, failed."""

    phase: str
    optimiser_step: int  # made before by the phase's network, or by the run's main one
    seed: int
    rank: int


def finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


def failed(error: Exception, place: Place, network: nn.Module | None, calls: Calls, out_dir: Path | None) -> UserError:
    """The error to raise in the place of `error`: one line of cause and remedy; the last batch lies in `out_dir`.

    `network` is the one in training, if any was.

    A DivergedError for a number that is not finite, a NetworkError for any other exception.
    """
    diverged = isinstance(error, FloatingPointError)
    message = " ".join(str(error).split()) or type(error).__name__
    cause = message if diverged else f"{type(error).__name__}: {message}"
    where = "; ".join(part for part in (calls.culprit(), _gradients(network) if network and diverged else "") if part)
    line = f"{place.phase}, optimiser step {place.optimiser_step}: {cause}{f' ({where})' if where else ''}"
    remedy = _remedy(error, place.phase)
    left = "" if out_dir is None else f"; {_dump(error, line, place, calls, out_dir)}"
    return (DivergedError if diverged else NetworkError)(f"{line}; {remedy}{left}")


def _remedy(error: Exception, phase: str) -> str:
    if "closed by peer" in str(error).lower():  # gloo, where the other end of an exchange is gone
        return "another process has ended; its own message says why"
    if phase in ASIDE:
        return f"{ASIDE[phase]}; the same command with it continues from the last checkpoint"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return (
            "launch.compile=off goes on without the compiler; if a process was killed while it compiled, remove torch's"
            " compiled files (TORCHINDUCTOR_CACHE_DIR, else torchinductor_USER in the temporary folder)"
        )
    if out_of_memory(error):
        return "set launch.microbatch to fewer samples (auto finds a number when a run starts), or lower batch_size"
    if not isinstance(error, FloatingPointError):
        return "its weights are those of the last complete step; the same command continues from the last checkpoint"
    section = {"pretrain": "optimiser", "discriminator": "gan"}.get(phase, phase)  # of the phase's optimiser's keys
    rates = f"{section}.lr or {section}.clip"
    return f"its weights are untouched: lower {rates}, or set launch.precision=no, and run again from a checkpoint"


def _gradients(network: nn.Module) -> str:
    """Which parameters hold a gradient that is not finite, in this process's part of it: others may not be here."""
    held = [(name, local(p.grad)) for name, p in network.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in held if not finite(gradient)]
    return f"gradients not finite in {len(bad)} of {len(held)} parameters, first {bad[0]}" if bad else ""


def _dump(error: Exception, line: str, place: Place, calls: Calls, out_dir: Path) -> str:
    """Write the three files; says where they are, or why there are none: the cause must not be lost to a full disk."""
    tensors = {f"{name}.{part}": x for name, call in calls.last.items() for part, x in call.items()}
    record = {
        "error": line,
        "phase": place.phase,
        "optimiser_step": place.optimiser_step,
        "seed": place.seed,
        "calls": {name: {part: described(x) for part, x in call.items()} for name, call in calls.last.items()},
    }
    try:
        folder, name = make_folder(out_dir / FOLDER), f"rank{place.rank}"
        write_atomic(folder / f"{name}.safetensors", save({key: x.cpu().clone() for key, x in tensors.items()}))
        write_atomic(folder / f"{name}.txt", "".join(traceback.format_exception(error)))
        write_atomic(folder / f"{name}.json", json.dumps(record, indent=1))
    except (OSError, RuntimeError, UserError) as fault:
        return f"the last batch could not be written ({' '.join(str(fault).split())})"
    return f"the last batch and the traceback are in {folder}/{name}.*"


def described(x: Tensor) -> dict[str, Any]:
    """Shape, type and statistics over the finite entries of x, and how many are not finite; plain JSON."""
    values = x.double().flatten()
    good = values[torch.isfinite(values)]
    facts: dict[str, Any] = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
    facts["not_finite"] = len(values) - len(good)
    if len(good):
        facts |= {"min": good.min().item(), "max": good.max().item(), "mean": good.mean().item()}
        facts["std"] = good.std(correction=0).item()
    return facts
