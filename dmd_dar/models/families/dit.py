"""DiT (arXiv:2212.09748): conditioned on class labels and t alone."""

from typing import Any

from torch import Tensor

from dmd_dar.models.families.form import Family, FixedInputs, Rows


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    return transformer(x, timestep=time, class_labels=rows["labels"], return_dict=False)[0]


DIT = Family("DiTTransformer2DModel", ask, square=True, time_scale=1.0)
