"""The weights of a transformer by the names of its class, where `fuse_qkv_projections` put copies beside them."""

from collections.abc import Iterator

from torch import Tensor, nn

# Layers that diffusers makes -> those whose rows they hold, in order. The latter stay, but are not called.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def unfused(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without fused layers, their rows in the layers that they were made from: those that compute."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for fused, parts in _fused(module):
            for name in [f"{prefix}{fused}.{kind}" for kind in ("weight", "bias")]:
                rows = weights.pop(name, None)
                if rows is not None and _computes(module):
                    sizes = [getattr(module, part).out_features for part in parts]
                    kind = name.rpartition(".")[2]
                    weights |= {f"{prefix}{part}.{kind}": x for part, x in zip(parts, rows.split(sizes), strict=True)}
    return weights


def _fused(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers of an attention that fusing added; a layer of that name without its parts is the class's own."""
    if not getattr(module, "fused_projections", False):
        return
    for fused, parts in FUSED.items():
        if isinstance(getattr(module, fused, None), nn.Module) and all(hasattr(module, part) for part in parts):
            yield fused, parts


def _computes(module: nn.Module) -> bool:
    """Whether an attention calls its fused layers: the older form's processors do so by class, and may be set back."""
    return hasattr(module, "unfuse_projections") or type(getattr(module, "processor", None)).__name__.startswith(
        "Fused"
    )
