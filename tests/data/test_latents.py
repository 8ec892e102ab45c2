"""data.name: latents: what a folder of encoded images gives to training, and which folders it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd_dar.data.batches import Batches
from dmd_dar.data.config import DataConfig
from dmd_dar.data.latents import Latents, layout_of
from dmd_dar.data.shards import MANIFEST, ShardFolder, fill, shard_name
from dmd_dar.data.sources import data_hash, open_data, open_images
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DamagedFileError, UserError

SHAPE, COUNTS, NAMES = (4, 8, 8), (2, 5, 3), ("a", "b", "c")


def moments(first: int, stop: int) -> dict[str, Tensor]:
    """Image i of mean i and deviation 1 / (i + 1), so that a latent tells its image."""
    index = torch.arange(first, stop)
    scale = index.float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    return {"mean": 100 * scale, "std": 1 / (scale + 1), "cond": labels[index]}


def stored(path: Path, **content) -> Path:
    layout = layout_of({"codec": "c" * 64, "held_out": False, **content}, NAMES, COUNTS, SHAPE, 4)
    with ShardFolder(path, layout) as folder:
        fill(folder, Batches(moments, 4), stopped=lambda: False)
    return path


def test_a_batch_is_mean_plus_std_eps_of_a_drawn_image_classes_uniform(tmp_path):
    data = open_data(DataConfig("latents", path=str(stored(tmp_path))))
    assert (data.shape, data.size, data.num_classes, data.label_names) == (SHAPE, 8, 3, NAMES)
    draws = Draws(3, "pretrain", 7, sample_range(0, 600))
    x0, labels = data.batch(draws)
    assert x0.shape == (600, *SHAPE) and x0.dtype == torch.float32
    image = (x0.mean((1, 2, 3)) / 100).round().long()
    assert torch.equal(moments(0, 10)["cond"][image], labels)
    eps = draws.normal("latent", *SHAPE)
    scale = image.float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, 100 * scale + eps / (scale + 1), rtol=1e-6, atol=1e-4)
    assert all(abs(count / 200 - 1) < 5 * math.sqrt(2 / 600) for count in labels.bincount().tolist())
    within = image[labels == 1].bincount(minlength=10)[2:7]
    assert within.min() > 20 and set(image.tolist()) == set(range(10))
    part = data.batch(Draws(3, "pretrain", 7, torch.tensor([17, 4])))  # no draw depends on the batch
    assert torch.equal(part[0], x0[[17, 4]]) and torch.equal(part[1], labels[[17, 4]])


def test_the_hash_is_that_of_all_that_the_folder_holds(tmp_path):
    config = DataConfig("latents", path=str(stored(tmp_path / "a")))
    assert data_hash(config) == open_data(config).hash == Latents(str(stored(tmp_path / "b"))).hash
    assert Latents(str(stored(tmp_path / "c", codec="d" * 64))).hash != open_data(config).hash


def test_latents_are_no_images(tmp_path):
    with pytest.raises(UserError, match=r"^data.name = latents: .* holds no images; name images$"):
        open_images(DataConfig("latents", path=str(stored(tmp_path))))


def test_what_does_not_fit_is_refused_with_the_remedy(tmp_path):
    path = str(stored(tmp_path / "a"))
    Latents(path).require("c" * 64, SHAPE)
    with pytest.raises(UserError, match="another VAE.*cccccccccccc.*dddddddddddd.*encode the images again"):
        Latents(path).require("d" * 64, SHAPE)
    with pytest.raises(UserError, match="than the codec .none."):
        Latents(path).require("", SHAPE)
    with pytest.raises(UserError, match=r"\[4, 8, 8\], the network's \[4, 16, 16\]"):
        Latents(path).require("c" * 64, (4, 16, 16))
    with pytest.raises(
        UserError, match="images of training, not of the images that training leaves out.*held_out=true"
    ):
        open_data(DataConfig("latents", path=path), held_out=True)
    assert Latents(str(stored(tmp_path / "h", held_out=True)), held_out=True).num_classes == 3
    with pytest.raises(UserError, match="held_out=false"):
        Latents(str(tmp_path / "h"))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda content: content.update(kind="pairs"), UserError, "holds no latents"),
        (lambda content: content.pop("counts"), DamagedFileError, "counts"),
        (lambda content: content.update(counts=[2, 5, 4]), DamagedFileError, "do not fit"),
        (lambda content: content.update(counts=[0, 7, 3]), DamagedFileError, "a number from 1"),
        (lambda content: content.update(counts=[2.0, 5, 3]), DamagedFileError, "counts"),
        (lambda content: content.update(counts=[7, 3]), DamagedFileError, "for each of label_names"),
        (lambda content: content.update(label_names=3), DamagedFileError, "describes no latents"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(tmp_path, change, kind, said):
    file = stored(tmp_path) / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest["content"])
    file.write_text(json.dumps(manifest))
    with pytest.raises(kind, match=said):
        Latents(str(tmp_path))


def test_damage_and_gaps_are_found(tmp_path):
    path = stored(tmp_path)
    shard = path / shard_name(1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    data = Latents(str(path))
    data.moments(torch.tensor([0, 9]))
    with pytest.raises(DamagedFileError, match=f"{shard_name(1)} is damaged"):
        data.moments(torch.tensor([5]))
    shard.unlink()
    with pytest.raises(DamagedFileError, match=f"{shard_name(1)} is missing"):
        Latents(str(path))


def test_a_path_belongs_to_folders_and_latents(tmp_path):
    with pytest.raises(ValueError, match="path is empty: name the folder of your latents"):
        DataConfig("latents")
    with pytest.raises(ValueError, match="read by data.name folder and latents only"):
        DataConfig("photos", path=str(tmp_path))
