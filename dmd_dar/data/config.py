"""The configuration keys that say what the networks learn from."""

from dataclasses import dataclass
from typing import Literal

from dmd_dar.keys import key

MOST_PHOTOS = 64  # larger crops hardly fit between the held-out tiles of the photographs
WITH_PATH = {"folder": "images", "latents": "latents"}


@dataclass(frozen=True)
class DataConfig:
    """What the networks learn from. The keys after `size` are those of `folder`."""

    name: Literal["photos", "textures", "folder", "latents"] = key(
        "photos",
        "photos: seven vendored photographs; textures: procedural ones; folder: images of your own; latents: what"
        " dmd_dar.encode made of them",
    )
    size: int = key(
        32,
        f"side of a crop; of photos at most {MOST_PHOTOS}, latents have their own",
        unit="pixels",
        least=32,
        most=1024,
    )
    path: str = key(
        "",
        "of data.name=folder, as all keys below: a folder for each class, or images alone; of latents: their folder",
        path=True,
    )
    shorter_side: int = key(
        0, "larger images are shrunk to this shorter side first, none is enlarged; 0: leave all", unit="pixels", least=0
    )
    flip: bool = key(False, "mirror half of the training crops left to right")
    held_out_share: float = key(0.1, "share of each class's images that is kept out of training", least=0, most=0.5)
    max_megapixels: float = key(100.0, "images with more pixels are refused before they are decoded", above=0, most=178)
    cache_gb: float = key(4.0, "decoded images kept in the memory of each process", unit="GB", least=0)

    def __post_init__(self) -> None:
        if self.name == "photos" and self.size > MOST_PHOTOS:
            raise ValueError(f"size must be at most {MOST_PHOTOS} for photos, got {self.size}")
        if self.name in WITH_PATH and not self.path:
            raise ValueError(f"path is empty: name the folder of your {WITH_PATH[self.name]}, data.path=FOLDER")
        if self.name not in WITH_PATH and self.path:
            named = " and ".join(WITH_PATH)
            raise ValueError(f"path is read by data.name {named} only, not by {self.name}: set both, or leave it out")
        if 0 < self.shorter_side < self.size:
            raise ValueError(f"shorter_side must be 0 or at least size {self.size}, got {self.shorter_side}")
