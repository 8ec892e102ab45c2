"""What a run hands out: a network's folder with its README.md; of a LoRA student merged weights, adapter or both."""

from pathlib import Path
from typing import Literal

from dmd_dar.atomic import replaced_folder, write_atomic
from dmd_dar.models.adapters import write_adapter
from dmd_dar.models.codecs import Codec
from dmd_dar.models.hub import read_json
from dmd_dar.models.pipeline_folder import INDEX
from dmd_dar.models.saved import CARD, PARTS, Denoiser, ModelCard, write_network
from dmd_dar.models.shared_lora import LoraDenoiser
from dmd_dar.train.disk.readme import readme

Export = Literal["both", "merged", "adapter"]
WITHOUT_NETWORK = (*PARTS, CARD, "scheduler", "vae", INDEX)  # of no use beside an adapter alone


def export(
    place: Path,
    network: Denoiser | LoraDenoiser,
    card: ModelCard,
    codec: Codec | None = None,
    what: Export = "both",
) -> None:
    """Fill RUN/student, or another folder of the run; what stood there stays whole until all is on the disk.

    `what` is handed out of a LoRA student; its adapter alone costs no second base.
    """
    factor = 1 if codec is None else codec.factor
    if not isinstance(network, LoraDenoiser):
        with replaced_folder(place, PARTS) as new:
            digest = write_network(new, network, card, codec)
            write_atomic(new / "README.md", readme(place.parent, network, card, digest, factor))
        return
    with replaced_folder(place, _useless(place) if what == "adapter" else PARTS) as new:
        digest = "" if what == "adapter" else write_network(new, network, card, codec)
        if what != "merged":
            digest = write_adapter(new / "adapter", network, card, digest)
        text = readme(place.parent, network.network, card, digest, factor, alone=what == "adapter")
        write_atomic(new / "README.md", text)


def _useless(place: Path) -> tuple[str, ...]:
    """What an adapter alone does not leave in the folder: a network and the other parts of its pipeline."""
    file = place / INDEX
    named = read_json(file) if file.is_file() else {}
    return (*WITHOUT_NETWORK, *(name for name, entry in named.items() if isinstance(entry, list)))
