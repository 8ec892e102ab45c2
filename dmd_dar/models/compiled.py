"""Networks compiled by torch.compile, in place: names, weights, copies and checkpoints stay as they are."""

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.shared_lora import LoraDenoiser, Plain

# Student, teacher and fake score run the same code: with one count for all, torch soon computes the last ones eagerly.
OWN_COUNT = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def compile_network(network: Plain | LoraDenoiser, backend: str = "inductor") -> None:
    """From now on its calls are compiled, each at the first call of its kind: with or without gradients, batch size.

    Hooks are seen if they are there at that first call, later ones are not: call the network within `eagerly` where
    they matter. A deep copy is not compiled. No batch size is symbolic: which graph serves a call depends on the call
    alone, not on those before it, and so do its bits.
    """
    plain = network.network if isinstance(network, LoraDenoiser) else network
    if plain.prompts is not None:
        plain.prompts.whole = True  # a graph for each length of prompts would soon be too many
    called = plain.transformer if isinstance(plain, DiffusersDenoiser) else plain
    called.compile(backend=backend, dynamic=False, **OWN_COUNT)


def eagerly() -> AbstractContextManager[None]:
    """Within it compiled networks compute as if they were not."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; to load the compiler takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[return-value]
