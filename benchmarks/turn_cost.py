"""What a turn of a distillation costs: launches, calls of its networks, time by part, peak memory.

Of any turn, ours or another library's: it has three networks, optimisers, and a call that makes the next one.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmd_dar.draws import Draws
from dmd_dar.models.footprint import nbytes, tensors
from eval.samples.cost import peak_memory

# Operations that start no kernel: they make views or allocate.
FREE = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
)
FREE += ("unbind", "as_strided", "detach", "alias", "empty", "empty_like", "new_empty", "split_with_sizes", "chunk")
FREE += ("empty_strided", "new_empty_strided", "lift_fresh", "unfold", "_reshape_alias", "is_same_size", "unflatten")


@dataclass(frozen=True)
class Turn:
    """A call that makes the next turn, and what it trains."""

    run: Callable[[], None]
    networks: dict[str, nn.Module]  # student, teacher, fake_score
    averages: list[nn.Module]
    optimisers: list[torch.optim.Optimizer]
    optimising: list[tuple[Any, str]]  # object and method: each call clips and updates


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches(turn: Turn, turns: int = 2) -> dict[str, float]:
    """Operations of a turn without views and allocations, mean over `turns`: all, and those of the draws."""
    turn.run()  # the draws of the next are foreseen
    drawn: Counter[str] = Counter()

    def counted(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with Launches() as mode:  # inside the other, which counts them too
            made = original(*given, **named)
        drawn.update(mode.counts)
        return made

    with Launches() as whole, patch.object(Draws, "uniform", _method(counted, Draws.uniform)):
        for _ in range(turns):
            turn.run()
    return {"all": whole.counts.total() / turns, "draws": drawn.total() / turns}


def _method(around: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *given, **named: around(original, self, *given, **named)


def call_of(name: str) -> str:
    """What a call of a network is, by whether a gradient may go through it."""
    return f"{name}, forward" if torch.is_grad_enabled() else f"{name}, without gradient"


@contextmanager
def counted_calls(turn: Turn) -> Iterator[Counter[str]]:
    """Counts the calls of a turn's networks within, by network and `call_of`."""
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, network in turn.networks.items():
            hook = network.register_forward_pre_hook(lambda *_, name=name: calls.update([call_of(name)]))
            stack.callback(hook.remove)
        yield calls


@contextmanager
def timed_parts(turn: Turn, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by part of what runs within, on a CPU; `rest` is left to the caller."""
    spent: dict[str, float] = Counter()  # type: ignore[assignment]

    def timed(part: str, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        start = clock()
        try:
            return original(*given, **named)
        finally:
            spent[part] += clock() - start

    def call(name: str, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return timed(call_of(name), original, *given, **named)

    with ExitStack() as stack:
        for name, network in turn.networks.items():
            stack.enter_context(patch.object(network, "forward", partial(call, name, network.forward)))
        for owner, method in turn.optimising:
            original = getattr(owner, method)
            stack.enter_context(patch.object(owner, method, partial(timed, "optimiser", original)))
        for owner, method, part in ((torch.Tensor, "backward", "backward"), (Draws, "uniform", "draws")):
            changed = _method(partial(timed, part), getattr(owner, method))
            stack.enter_context(patch.object(owner, method, changed))
        yield spent


def shares(turn: Turn, turns: int = 3) -> dict[str, float]:
    """What part of a turn's CPU time each part takes."""
    turn.run()
    with timed_parts(turn, time.process_time) as spent:
        start = time.process_time()
        for _ in range(turns):
            turn.run()
        whole = time.process_time() - start
    found = {part: seconds / whole for part, seconds in sorted(spent.items(), key=lambda pair: -pair[1])}
    return {**found, "rest": 1 - sum(found.values())}


def peak(build: Callable[[], Turn], device: torch.device) -> dict[str, int]:
    """Bytes of networks and averages, of optimisers, and what two turns need at the most beside both."""
    made: list[Turn] = []

    def build_and_run() -> None:  # together: what a first turn frees, an allocator keeps for the second
        made.append(build())
        made[0].run()
        made[0].run()

    most = peak_memory(build_and_run, device, gradients=True).peak_bytes
    turn = made[0]
    held = {id(x): x for network in (*turn.networks.values(), *turn.averages) for x in tensors(network)}
    state = [x for optimiser in turn.optimisers for entry in optimiser.state.values() for x in entry.values()]
    stored, moments = nbytes(held.values()), nbytes(state)
    return {"networks": stored, "optimisers": moments, "step": most - stored - moments}
