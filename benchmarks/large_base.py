"""What reading a base and handing out its LoRA student take of the host's memory: python -m benchmarks.large_base

A DiT transformer of about 300 M random parameters in bfloat16, made in a temporary folder. Each row is a process of its
own; what it held before it began, libraries above all, is left out. Linux only.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown_table
from benchmarks.memory import alone
from dmd_dar.models.diffusers_denoiser import Reading
from dmd_dar.models.frozen import Kept
from dmd_dar.models.saved import ModelCard
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, merged
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.routing.tensor_files import without_weights, write
from dmd_dar.train.disk.export import export

WIDTH, HEADS, DEPTH = 1024, 16, 16
CLASSES = 10
LORA = LoraConfig(rank=4)


def make(folder: str) -> int:
    """The transformer's folder as diffusers writes it; its number of parameters."""
    from diffusers import DiTTransformer2DModel

    shape = dict(num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH, norm_num_groups=1)
    with without_weights():
        model = DiTTransformer2DModel(**shape, num_embeds_ada_norm=CLASSES, out_channels=8)  # type: ignore[arg-type]
    model.save_config(folder)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    numbers = 0.02 * torch.randn(8 * WIDTH * WIDTH, dtype=torch.bfloat16)
    entries = {name: (torch.bfloat16, tuple(one)) for name, one in shapes.items()}
    file = Path(folder) / "diffusion_pytorch_model.safetensors"
    write(file, entries, lambda name: numbers[: shapes[name].numel()].view(shapes[name]))
    return sum(one.numel() for one in shapes.values())


def held(name: str) -> int:
    """Bytes: VmRSS, what the process holds now, or VmHWM, the most that it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that this process held at the most during work(), and at its end, beyond what it held before."""
    import diffusers  # noqa: F401
    import diffusers.models.transformers.dit_transformer_2d  # noqa: F401

    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = work()
    found = held("VmHWM") - before, held("VmRSS") - before
    del kept
    return found


def read(folder: str) -> Any:
    """The base of `weights=shared_lora frozen_dtype=bfloat16`."""
    given = TeacherConfig(folder, prediction="dit")
    return load_teacher(given, reading=Reading(Kept(torch.bfloat16)))


def read_whole(folder: str) -> Any:
    """As `from_pretrained` reads, then widened."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).float()


def handed_out(folder: str, out: str, whole: bool = False) -> None:
    teacher = read(folder)
    student = LoraDenoiser(teacher.network, LORA, seed=0, role="student")
    card = ModelCard(teacher.prediction, (1.0,), (), {"teacher": teacher.digest})
    if whole:
        merged(student).transformer.save_pretrained(out)
    else:
        export(Path(out), student, card)


def peak_of(name: str, *arguments: Any) -> tuple[int, int]:
    """`peak` of a function of this module."""
    return peak(lambda: globals()[name](*arguments))


def measured(root: Path) -> dict[str, float]:
    """Peak bytes of the host by row, for one parameter; 2 are the base itself."""
    folder = str(root / "base")
    count = alone(make, folder)
    rows = {
        "read whole, then in float32": ("read_whole", folder),
        "read": ("read", folder),
        "read and hand out merged, whole in float32": ("handed_out", folder, str(root / "whole"), True),
        "read and hand out merged": ("handed_out", folder, str(root / "student")),
    }
    return {name: alone(peak_of, *given)[0] / count for name, given in rows.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        found = measured(Path(root))
    rows = [[name, f"{value:.2f}", f"{value / 2:.2f}"] for name, value in found.items()]
    print(markdown_table(["in a process of its own", "bytes per parameter", "of the base in bfloat16"], rows))


if __name__ == "__main__":
    main()
