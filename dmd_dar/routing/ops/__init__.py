"""The routing operation; the choice among implementations is made here and nowhere else.

`naive` is the equations, `triton` fused kernels, the default on CUDA where Triton is installed, `torch` the fast
default everywhere else. A backend that cannot serve a forward pass gives way to another, and says so once in the log.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, compiler, is_grad_enabled
from torch import dtype as Dtype
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from dmd_dar.routing.ops import naive
from dmd_dar.routing.ops.forward import ForwardReader
from dmd_dar.routing.ops.listed import ListedReader
from dmd_dar.routing.ops.torch import TorchReader
from dmd_dar.routing.router import RouterBank

BACKENDS = ("torch", "naive", "triton")
VARIABLE = "DMD_DAR_ROUTING_BACKEND"
Reader = ListedReader | TorchReader | ForwardReader
_preferred: ContextVar[str | None] = ContextVar("preferred routing backend", default=None)

log = logging.getLogger(__name__)


def reader(bank: RouterBank, v_0: Tensor, t_embedding: Tensor | None, dtype: Dtype) -> Reader:
    """What holds the sources of one forward pass and builds the states from them. v_0 (B, T, d); dtype: the sources'.

    Raises ValueError for an unknown backend in `bank.backend` or the environment variable DMD_DAR_ROUTING_BACKEND.
    """
    if compiler.is_compiling():
        _compiled()
        return ListedReader(bank, v_0.device, t_embedding, naive.route)
    name = chosen(bank.backend, v_0.device.type)
    if name == "triton":
        fused, reason = _triton(bank, v_0, dtype)
        if fused is not None:
            return ListedReader(bank, v_0.device, t_embedding, fused)
        name = give_way("triton", "torch", reason)
    if name == "torch" and _functorch.peek_interpreter_stack() is not None:
        name = give_way("torch", "naive", "it does not work inside torch.func transforms")
    if name == "torch" and bank.config.query != "dynamic" and not is_grad_enabled():
        return ForwardReader(bank, v_0, t_embedding, dtype)
    if name == "torch":
        return TorchReader(bank, v_0, t_embedding, dtype)
    return ListedReader(bank, v_0.device, t_embedding, naive.route)


def _triton(bank: RouterBank, v_0: Tensor, dtype: Dtype) -> tuple[Callable[..., Tensor] | None, str]:
    """The fused router, or why it cannot serve."""
    try:
        from dmd_dar.routing.ops import triton
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    reason = triton.refusal(bank, v_0, dtype)
    return (triton.route, "") if reason is None else (None, reason)


def chosen(backend: str | None, device: str) -> str:
    """`backend`, else what `preferring` says, else the environment, else the default of a type of device."""
    usual = "triton" if device == "cuda" and _has_triton() else "torch"
    name = backend or _preferred.get() or os.environ.get(VARIABLE) or usual
    if name not in BACKENDS:
        raise ValueError(f"unknown routing backend {name!r} (bank.backend or {VARIABLE}): choose one of {BACKENDS}")
    return name


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Within it, and in this thread, the backend of banks that name none."""
    before = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(before)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def give_way(name: str, other: str, reason: str) -> str:
    """The backend that serves instead; logged once for each reason. name: a backend, or `fast` for any such."""
    log.warning("routing backend %s gives way to %s: %s", name, other, reason)
    return other


def _compiled() -> str:
    return give_way("fast", "naive", "under torch.compile the equations are traced, and the compiler fuses them")


# Runs while a graph is traced, not in it: torch.compiler.assume_constant_result, but that loads the compiler at once.
_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
