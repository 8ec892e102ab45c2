"""What a run hands out: a network's folder with its README.md, and beside merged weights their LoRA adapter."""

from pathlib import Path

from dmd_dar.atomic import replaced_folder, write_atomic
from dmd_dar.models.adapters import write_adapter
from dmd_dar.models.codecs import Codec
from dmd_dar.models.saved import PARTS, Denoiser, ModelCard, write_network
from dmd_dar.models.shared_lora import LoraDenoiser, merged
from dmd_dar.train.disk.readme import readme


def export(place: Path, network: Denoiser | LoraDenoiser, card: ModelCard, codec: Codec | None = None) -> None:
    """Fill RUN/student, or another folder of the run; what stood there stays whole until all is on the disk."""
    plain = merged(network)
    with replaced_folder(place, PARTS) as new:
        digest = write_network(new, plain, card, codec)
        if isinstance(network, LoraDenoiser):
            write_adapter(new / "adapter", network, card, digest)
        write_atomic(new / "README.md", readme(place.parent, plain, card, digest))
