"""The proof that routing left a network's function as it was: both forms are run, and compared block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.messages import LOGGER
from dmd_dar.routing.hooks import owner

# How far a block's output may move in `count`, relative in norm: n alpha_i rounds, and so do differences in half
# precision; in `stream` nothing may move.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def prove(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Run a routed model's forward with and without its routers, at rest, and compare.

    Forms that do not keep the function are measured, and the change is printed. Raises ValueError naming the first
    block whose output differs otherwise, by a bit for `stream`, by more than rounding for `count`, or the first that is
    not finite; and where the routers hold memory that nothing filled.
    """
    with _at_rest(model):
        plain = _outputs(model, args, kwargs, routed=False)
        routed = _outputs(model, args, kwargs, routed=True)
    config, name, far = model.dar.config, type(model).__name__, 0.0
    for path in plain:
        far = change(plain[path], routed[path], path)
        if config.keeps_function and far > (0 if config.scale == "stream" else TOLERANCE[plain[path][0].dtype]):
            raise ValueError(
                f"routing changes the function of {name}: {path} is the first to differ, by {far:.3g} (relative, in"
                " norm); if its routers are not at their start, call model.dar.reset()"
            )
    if not model.dar.was_reset:
        raise ValueError(f"the routers of {name} are not at their start: call model.dar.reset() once it is filled")
    if not config.keeps_function:
        LOGGER.info(f"routing changes the output of {name} by {far:.3g} (relative, in norm)")


def change(plain: list[Tensor], routed: list[Tensor], path: str) -> float:
    """|routed - plain| / |plain| over all tensors, 0 only if all bits agree. Raises ValueError for non-finite ones."""
    if not _finite(plain):
        raise ValueError(f"{path} of the plain network is not finite: check it with other example_inputs")
    if not _finite(routed):
        raise ValueError(
            f"{path} of the routed network is not finite: if its routers are not at their start, call model.dar.reset()"
        )
    if len(plain) == len(routed) and all(map(torch.equal, plain, routed)):
        return 0.0
    pairs = [(x.double(), y.double()) for x, y in zip(plain, routed, strict=True)]
    apart, size = (
        sum(float(x.square().sum()) for x in xs) for xs in ([y - x for x, y in pairs], [x for x, _ in pairs])
    )
    return max((apart / size) ** 0.5 if size else float("inf"), torch.finfo(torch.float64).tiny)


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(model: Any, args: tuple, kwargs: dict, *, routed: bool) -> dict[str, list[Tensor]]:
    """Path of each block -> its output tensors, in the order in which they ran; the model's own as "output"."""
    bank, found = owner(model), {}
    assert bank is not None

    def keep(path: str) -> Callable:
        return lambda module, inputs, output: found.__setitem__(path, tensors(output))

    devices = sorted({x.device.index for x in model.parameters() if x.device.type == "cuda"})
    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in bank.plan.blocks]
    try:
        with torch.random.fork_rng(devices=devices):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(0)
            found["output"] = tensors(bank.run(model, args, kwargs, routed=routed))
    finally:
        for handle in handles:
            handle.remove()
    return found


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output of nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [x for part in parts for x in tensors(part)]
