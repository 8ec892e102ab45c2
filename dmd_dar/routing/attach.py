"""A pretrained diffusers transformer becomes a DAR transformer that computes the same function, and back.

    from dmd_dar.routing import attach, detach
    attach(transformer, query="timestep", chunk_size=4)     # transformer.dar holds the routers
    optimizer = AdamW([{"params": transformer.dar.parameters(), "lr": 2e-3}, ...])

Class, parameters and state-dict keys of the backbone stay as they are; the routers' keys begin with `dar.`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack

import torch
from torch import nn

from dmd_dar.errors import DamagedFileError
from dmd_dar.routing.backbone import guard_config, release_config
from dmd_dar.routing.caches import cached
from dmd_dar.routing.check import prove
from dmd_dar.routing.consumers import Plan, plan_of, wrapped
from dmd_dar.routing.examples import example_inputs as inputs_for
from dmd_dar.routing.folder import FORM, WEIGHTS, Saved, class_of, computed_buffers, read_folder, save_routed
from dmd_dar.routing.hooks import DarBank, owner
from dmd_dar.routing.layout import FormOptions, Query, RoutingConfig, routing_form
from dmd_dar.routing.offload import runs_on
from dmd_dar.routing.tensor_files import faults_of, fill, without_weights

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    query: Query | RoutingConfig,
    *,
    granularity: Literal["sublayer", "block"] = "sublayer",
    example_inputs: Mapping[str, Any] | None = None,
    check: bool = True,
    allow_change: bool = False,
    **options: Unpack[FormOptions],
) -> Model:
    """Route the residual additions of a diffusers transformer, in place; returns `model`.

    `query` and `options` (chunk_size, summary, scale, final) are the fields of `RoutingConfig`; `query` may be a whole
    one. `chunk_size` counts sublayers, or blocks at granularity "block". Classes of `consumers.SUBLAYERS` are routed
    per sublayer, any other with a list of blocks per block, with a warning.
    `check` runs the network with and without its routers and compares them, bit for bit for scale "stream"; where the
    model is on the meta device or spread over devices, it does so at the first forward. Classes outside the table need
    `example_inputs` for it, keyword arguments of the model's forward. `allow_change` permits forms that change the
    function; the change is then measured and printed.

    The routers are float32 (float64 in a float64 model), and stay so when the model is cast to less. Attach before
    `fully_shard` and `torch.compile`, and call `model.dar.reset()` after filling a model that was on the meta device.
    PEFT freezes all that is not its own, and saves nothing else: attach before adding an adapter, and name the routers
    in its configuration, modules_to_save=["dar"].
    Checkpointing must not be reentrant (diffusers' is not).

    Raises ValueError, with `model` as it was, where it is no transformer, has routers already or no blocks, the options
    do not fit it, the form would change its function, or the check finds that it did, naming the first block that
    differs.
    """
    _refuse_wrapped(model)
    if getattr(model, "dar", None) is not None:
        raise ValueError(f"this {type(model).__name__} already has routers at .dar: detach it first")
    routing = routing_form(query, **options)
    if not routing.keeps_function and not allow_change:
        raise ValueError(
            f"scale {routing.scale!r} with summary {routing.summary!r} changes the function of a pretrained network:"
            " use scale 'stream', or 'count' with summary 'sum', or pass allow_change=True to have the change measured"
        )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ValueError("attach before fully_shard: later, the routers' gradients would stay apart on each process")
    plan = plan_of(model, granularity)
    inputs = None
    if check and not _later(model):
        inputs = inputs_for(model) if example_inputs is None else dict(example_inputs)
    bank = install(model, routing, plan)
    if inputs is not None:
        _prove(model, (), inputs)
    elif check:
        bank.proof = _prove
    return model


def _refuse_wrapped(model: Any) -> None:
    """Raises ValueError for what holds a transformer but is none."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{name} is compiled: attach before torch.compile, or pass model._orig_mod and compile again")
    if not isinstance(model, nn.Module):
        held = isinstance(getattr(model, "transformer", None), nn.Module)
        raise ValueError(f"{name} is not a transformer: pass " + ("pipe.transformer" if held else "an nn.Module"))
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ValueError(
            f"{name} is an adapter around a transformer, whose file would not hold the routers: attach to the"
            " transformer before get_peft_model, with modules_to_save=['dar'] in the adapter's configuration, or pass"
            " model.get_base_model() and save its dar.state_dict() yourself"
        )
    if path := wrapped(model):
        inner = type(model.get_submodule(path)).__name__
        raise ValueError(f"{name} only wraps a {inner}: attach to that, model.{path}, before it is wrapped")


def _prove(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The proof; where it fails, `model` is as it was before `attach`."""
    try:
        prove(model, args, kwargs)
    except BaseException:
        _strip(model)
        raise


def detach(model: Model) -> Model:
    """Take the routers and all that came with them off again, in place; returns the plain `model`.

    Raises ValueError where `model` has no routers, or an adapter holds them.
    """
    name = type(model).__name__
    if owner(model) is None:
        raise ValueError(f"this {name} has no routers that attach put there")
    if not isinstance(model.dar, DarBank):
        raise ValueError(f"an adapter holds the routers of this {name} (modules_to_save): merge or unload it first")
    _strip(model)
    return model


def _strip(model: Any) -> None:
    bank = owner(model)
    assert bank is not None
    bank.remove(model)
    del model.dar
    vars(model).pop("save_pretrained", None)
    release_config(model)


def load_routed(folder: str | os.PathLike[str]) -> Any:
    """The transformer that a routed model's `save_pretrained` wrote, on the CPU, in evaluation mode, routers in place.

    Raises MissingWeightsError or DamagedFileError, naming the file, where the folder is not of that form or its parts
    do not fit each other.
    """
    model, saved = routed_outline(folder)
    if faults := faults_of(model, saved.stored):
        raise DamagedFileError(f"{Path(folder) / WEIGHTS}: the weights do not fit what {FORM} says: {faults}")
    fill(model, saved.stored, lambda old, value: value.clone())
    return model.eval()


def routed_outline(folder: str | os.PathLike[str]) -> tuple[Any, Saved]:
    """That transformer with its routers, without weights (parameters on the meta device), and what its folder holds.

    Raises what `load_routed` does, but for weights that do not fit.
    """
    saved, form = read_folder(folder), Path(folder) / FORM
    name = saved.backbone["_class_name"]
    model_class = class_of(name)
    if model_class is None:
        raise DamagedFileError(f"{form}: backbone._class_name: diffusers has no model class {name!r}")
    with _blamed(f"{form}: backbone"), without_weights():
        model: Any = model_class.from_config(saved.backbone)
    with _blamed(f"{form}: granularity"):
        plan = plan_of(model, saved.granularity)
    with _blamed(f"{form}: routing"):
        install(model, saved.routing, plan)
    buffers = computed_buffers(model)
    if buffers.keys() != saved.buffer_dtypes.keys():
        raise DamagedFileError(f"{form}: buffer_dtypes must name {[*buffers]}, got {[*saved.buffer_dtypes]}")
    for key, buffer in buffers.items():
        path, _, own = key.rpartition(".")
        setattr(model.get_submodule(path), own, buffer.to(saved.buffer_dtypes[key]))
    return model, saved


@contextmanager
def _blamed(part: str) -> Iterator[None]:
    """DamagedFileError naming `part` for whatever its values make other code raise."""
    try:
        yield
    except Exception as error:
        raise DamagedFileError(f"{part}: {type(error).__name__}: {error}") from error


def install(model: Any, config: RoutingConfig, plan: Plan) -> DarBank:
    """Put the routers of `plan` at `model.dar` and their hooks in place, unchecked; returns the routers.

    Where the hooks find no place, `model` is as it was.
    """
    dtype = getattr(model, "dtype", next(model.parameters()).dtype)
    with runs_on(model):
        bank = DarBank(model, plan, config).to(torch.promote_types(dtype, torch.float32))
    bank.install(model)
    model.dar = bank
    guard_config(model, bank.config, plan.granularity)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(save_routed, model)  # a bound method could not be unpickled
    return bank


def _later(model: nn.Module) -> bool:
    """Whether the model cannot run yet, or not here: on the meta device, spread over devices, or under a cache."""
    return hasattr(model, "hf_device_map") or runs_on(model).type == "meta" or cached(model)
