"""The VAE between images and latents: the only place that knows the latents' scale and shift."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.hub import DIFFUSERS, VAE_FILES, configurations, local_safetensors, read_json, resolve

Decoding = Literal["whole", "slices", "tiles"]
CHUNK = 8  # images at a time through the VAE, whose activations are large; 32 of 128 pixels at a time were slower
ADVICE = ("sample_size", "force_upcast")  # in a VAE's config, but without effect on what it computes here


@dataclass(frozen=True)
class VaeForm:
    """How one class of VAEs is asked; raw latents are (B, C, h, w)."""

    channels: Callable[[Any], int]
    factor: Callable[[Any], int]  # pixels for each latent cell, along one side
    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # (vae, images) -> mean and std of the raw latents
    decode: Callable[[Any, Tensor], Tensor]  # (vae, raw latents) -> images
    scale: Callable[[Any], tuple[Tensor, Tensor]]  # (vae) -> scale and shift, each (1,) or (C,)


class Codec(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> the latents (B, C, h, w) that denoisers see: scale (raw - shift).

    Raw latents are the VAE's own. Scale and shift are its config's: scaling_factor and shift_factor, or per channel
    latents_mean and scaling_factor / latents_std; of FLUX.2, whose latents are patches of 2 x 2 raw cells, they are the
    batch norm's. All in float32, outside autocast; frozen, but differentiable.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae.float().eval().requires_grad_(False)
        self.form = FORMS[type(vae).__name__]
        self.chunk, self.tiled = CHUNK, False
        scale, shift = self.form.scale(vae)
        self.register_buffer("scale", scale.reshape(-1, 1, 1))
        self.register_buffer("shift", shift.reshape(-1, 1, 1))

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.form.channels(self.vae)

    @property
    def factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return self.form.factor(self.vae)

    def decode_in(self, decoding: Decoding) -> None:
        """From now on decode several images at a time, one (slices), or one in overlapping tiles where it is large.

        Tiles need the least memory; where they meet they are blended, which is not quite the whole image.
        """
        self.chunk, self.tiled = CHUNK if decoding == "whole" else 1, decoding == "tiles"
        if self.tiled:
            self.vae.enable_tiling()

    def digest(self) -> str:
        """SHA-256, hexadecimal, of all that decides its values: weights, scale, shift and form, but no file's name."""
        form = {name: value for name, value in self.vae.config.items() if name[0] != "_" and name not in ADVICE}
        total = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            total.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std), each (B, C, h, w), of the latents' normal distribution; scale and shift are in them.

        The std of an AutoencoderDC, whose latents are no distribution, is 0.
        """
        with torch.autocast(images.device.type, enabled=False), self._untiled():
            parts = [self.form.encode(self.vae, part.float()) for part in images.split(CHUNK)]
        mean, std = (torch.cat(moment) for moment in zip(*parts, strict=True))
        return (mean - self.shift) * self.scale, std * self.scale

    @contextmanager
    def _untiled(self) -> Iterator[None]:
        """diffusers' one switch is for encoding, too."""
        self.vae.use_tiling = False
        try:
            yield
        finally:
            self.vae.use_tiling = self.tiled

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            raw = latents.float() / self.scale + self.shift
            return torch.cat([self.form.decode(self.vae, part) for part in raw.split(self.chunk)])


def sample_latents(mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """mean + std eps: latents from what `Codec.encode` returns, which needs no further scale."""
    return mean + std * eps


def scale_and_shift(config: Any) -> tuple[Tensor, Tensor]:
    """Each (1,) or (C,), of latent = scale (raw - shift). Raises ValueError for two shifts at once."""
    scale, shift = torch.tensor([float(config.scaling_factor)]), torch.tensor([float(config.get("shift_factor") or 0)])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and config.get("shift_factor"):
        raise ValueError("latents_mean and shift_factor are both set: which one the latents were made with is unknown")
    if mean is not None:
        shift = torch.tensor(mean, dtype=torch.float32).flatten()
    if std is not None:
        scale = scale / torch.tensor(std, dtype=torch.float32).flatten()
    return scale, shift


def _factor(vae: Any) -> int:
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)


def _encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    made = vae.encode(images)
    if hasattr(made, "latent"):
        return made.latent, torch.zeros_like(made.latent)
    return made.latent_dist.mean, made.latent_dist.std


def _decode(vae: Any, raw: Tensor) -> Tensor:
    return vae.decode(raw, return_dict=False)[0]


def _encode_frame(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of a VAE of films, an image being one frame."""
    mean, std = _encode(vae, images[:, :, None])
    return mean[:, :, 0], std[:, :, 0]


def _decode_frame(vae: Any, raw: Tensor) -> Tensor:
    """Past the VAE's own decode, which clamps, so that a loss on images would have no gradient beyond [-1, 1]."""
    factor = vae.spatial_compression_ratio
    tile = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    if vae.use_tiling and any(side * factor > most for side, most in zip(raw.shape[-2:], tile, strict=True)):
        return vae.tiled_decode(raw[:, :, None], return_dict=False)[0][:, :, 0]
    return vae.decoder(vae.post_quant_conv(raw[:, :, None]))[:, :, 0]


def _channel_scale(vae: Any) -> tuple[Tensor, Tensor]:
    return 1 / torch.tensor(vae.config.latents_std), torch.tensor(vae.config.latents_mean)


def _encode_patches(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = _encode(vae, images)
    return pixel_unshuffle(mean, 2), pixel_unshuffle(std, 2)


def _batch_norm(vae: Any) -> tuple[Tensor, Tensor]:
    return (vae.bn.running_var + vae.config.batch_norm_eps).rsqrt(), vae.bn.running_mean.clone()


PLAIN = VaeForm(
    lambda vae: vae.config.latent_channels, _factor, _encode, _decode, lambda vae: scale_and_shift(vae.config)
)
FORMS = {
    "AutoencoderKL": PLAIN,
    "AutoencoderDC": PLAIN,
    "AutoencoderKLQwenImage": VaeForm(
        lambda vae: vae.config.z_dim,
        lambda vae: vae.spatial_compression_ratio,
        _encode_frame,
        _decode_frame,
        _channel_scale,
    ),
    "AutoencoderKLFlux2": VaeForm(
        lambda vae: 4 * vae.config.latent_channels,
        lambda vae: 2 * _factor(vae),
        _encode_patches,
        lambda vae, raw: _decode(vae, pixel_shuffle(raw, 2)),
        _batch_norm,
    ),
}


def load_codec(path: str, revision: str = "") -> Codec:
    """The VAE, of a class of FORMS, of a folder, of a pipeline folder's vae/, or of a hub id that is either.

    Raises MissingWeightsError or DamagedFileError naming what is missing or does not fit, UserError for another class.
    """
    import diffusers

    folder = _own_folder(resolve(path, revision, VAE_FILES))
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise MissingWeightsError(
            f"{folder} holds no {' or '.join(FORMS)} in safetensors: name the folder of one, or a hub id"
        )
    name = _class_in(folder)
    options = local_safetensors(folder, DIFFUSERS)
    try:
        vae, info = getattr(diffusers, name).from_pretrained(
            folder, low_cpu_mem_usage=False, output_loading_info=True, **options
        )
        faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
        if faults:
            raise ValueError(f"the weights do not fit config.json: {faults}")
        return Codec(vae)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DamagedFileError(f"{folder} is no {name} that can be used: {error}") from error


def planned_factor(path: str, revision: str = "") -> int:
    """`Codec.factor` of the VAE that `load_codec` would load, by its config.json alone.

    Raises MissingWeightsError where there is none, DamagedFileError for one that fits no class, UserError for a class
    that is not known.
    """
    import diffusers

    folder = _own_folder(configurations(path, revision))
    name, config = _class_in(folder), read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            return FORMS[name].factor(getattr(diffusers, name).from_config(config))
    except (ValueError, RuntimeError, TypeError) as error:
        raise DamagedFileError(f"{folder / 'config.json'} is of no {name}: {error}") from error


def _own_folder(folder: Path) -> Path:
    """The VAE's own folder, of a pipeline's or of itself."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _class_in(folder: Path) -> str:
    """The VAE's class, one of FORMS; UserError for another."""
    name = read_json(folder / "config.json").get("_class_name") or "AutoencoderKL"
    if name not in FORMS:
        raise UserError(f"{folder} holds a {name}: a codec must be one of {', '.join(FORMS)}")
    return name


def vae_of(folder: Path) -> str:
    """The VAE that comes with a pipeline folder, as `load_codec` takes it; empty if none does."""
    return str(folder / "vae") if (folder / "vae" / "config.json").is_file() else ""
