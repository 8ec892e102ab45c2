"""Models whose parameters are elsewhere until they are called: accelerate's and diffusers' offloading."""

from typing import Any

import torch
from torch import nn


def runs_on(model: nn.Module) -> torch.device:
    """The device on which `model` computes: its first parameter's, or the one to which an offloader brings it.

    "meta" where nothing will bring it: the model is still to be filled.
    """
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)  # accelerate's
            if device is None:
                device = getattr(getattr(hook, "config", None), "onload_device", None)  # diffusers' group offloading
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(model.parameters()).device


def is_offloaded(model: nn.Module) -> bool:
    """Whether something moves its values to where they compute, a call at a time."""
    return any(_hooks(module) for module in model.modules())


def keeper(model: nn.Module) -> str:
    """Who keeps values of the state dict where `model.state_dict()` does not reach them, and how to get them back.

    Empty where the model holds them all. diffusers' group offloading to disk leaves memory without values in their
    place, accelerate's offloading tensors on the meta device, as a model has that was never filled.
    """
    configs = [getattr(hook, "config", None) for module in model.modules() for hook in _hooks(module)]
    if any(getattr(config, "offload_to_disk_path", None) for config in configs):
        return "diffusers' group offloading keeps them on the disk: save the model before it is applied"
    if any(value.is_meta for value in model.state_dict().values()):
        return (
            "they are on the meta device: end accelerate's offloading, by"
            " accelerate.hooks.remove_hook_from_module(model, recurse=True), or fill the model"
        )
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    """What accelerate and diffusers have hooked to a module's call."""
    hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
    grouped = [] if registry is None else [registry.get_hook("group_offloading")]
    chained = getattr(hook, "hooks", [hook])  # accelerate chains hooks in one that has `hooks`
    return [each for each in (*chained, *grouped) if each is not None]
