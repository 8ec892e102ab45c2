"""Prompts that nobody has encoded yet, for a plan: what a family's transformer reads of one, by its config.json."""

from typing import Any

import torch
from torch import Tensor

from dmd_dar.models.families.form import Family
from dmd_dar.models.prompts import Prompts


class Unencoded(Prompts):
    """One prompt of zeros, as long as the pipeline `name` pads it (the family's first where it has no such), unmasked.

    `config` is the transformer's. It has no folder, and takes no memory where tensors have no data.
    """

    def __init__(self, family: Family, config: Any, name: str = ""):
        self.pipeline = name if name in family.pipelines else next(iter(family.pipelines))
        prompting = family.pipelines[self.pipeline]
        self.folder = self.hash = self.encoder = ""
        self.count, self.width = 1, config[family.width]
        self.small = self.whole = True
        self.names = ("embedding", family.beside) if family.beside else ("embedding",)
        self.shapes: dict[str, tuple[int, ...]] = {"embedding": (prompting.before + prompting.tokens, self.width)}
        if family.beside == "pooled":
            self.shapes["pooled"] = (config["pooled_projection_dim"],)

    def blank(self, device: torch.device | str = "cpu") -> None:
        """It is."""

    def texts(self) -> tuple[str, ...]:
        return ()

    def rows(self, cond: Tensor) -> dict[str, Tensor]:
        """Zeros, each (B, ...), for cond (B,)."""
        return {name: torch.zeros(len(cond), *shape, device=cond.device) for name, shape in self.shapes.items()}
