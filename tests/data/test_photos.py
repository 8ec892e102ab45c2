"""The photographs: held-out pixels stay held out, crops are what the files say, batches are a function of draws."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d, pad

from dmd_dar.data.images import to_model_range, to_pixels
from dmd_dar.data.photos import (
    COLOUR,
    FOLDER,
    MIRRORED,
    NAMES,
    Photos,
    crop_positions,
    data_hash,
    held_out_mask,
    read_photos,
)
from dmd_dar.draws import Draws, sample_range

SIZES = [(300, 451), (400, 600), (512, 512)]


@cache
def photos(size: int = 32, held_out: bool = False) -> Photos:
    return Photos(size, held_out=held_out)


def draws(start: int = 0, stop: int = 64, step: int = 0) -> Draws:
    return Draws(0, "pretrain", step, sample_range(start, stop))


def clear(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(H - size + 1, W - size + 1) bool: crops that touch none of the pixels (H, W)."""
    return highest(pixels, size) == 0


def highest(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The maximum over each square of side `size`."""
    rows = max_pool2d(pixels[None].float(), (size, 1), stride=1)
    return max_pool2d(rows, (1, size), stride=1)[0]


def test_held_out_tiles_are_every_fifth_in_each_direction():
    tiles = held_out_mask(10 * 96, 10 * 96)[48::96, 48::96].int()
    assert (tiles.sum(0) == 2).all() and (tiles.sum(1) == 2).all()
    assert (tiles[:, 1:] + tiles[:, :-1]).max() == 1 and (tiles[1:] + tiles[:-1]).max() == 1
    whole = held_out_mask(10 * 96, 10 * 96)
    assert torch.equal(whole, tiles.bool().repeat_interleave(96, 0).repeat_interleave(96, 1))
    for shape in SIZES:
        assert torch.equal(held_out_mask(*shape), whole[: shape[0], : shape[1]])
        assert 0.19 < held_out_mask(*shape).double().mean() < 0.22


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", SIZES)
def test_no_training_crop_overlaps_a_held_out_pixel_and_no_other_is_left_out(shape, size):
    mask = held_out_mask(*shape)
    for held_out, forbidden in ((False, mask), (True, ~mask)):
        positions = crop_positions(mask, size, held_out)
        allowed = torch.zeros(shape, dtype=torch.bool)
        allowed.view(-1)[positions] = True
        assert allowed.sum() == len(positions) > 0
        expected = pad(clear(forbidden, size), (0, size - 1, 0, size - 1))
        assert torch.equal(allowed, expected)
        painted = highest(pad(allowed, (size - 1, 0, size - 1, 0)), size) > 0
        assert painted.shape == mask.shape and not (painted & forbidden).any()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_crop_is_a_slice_of_its_file(size, held_out):
    data, there = photos(size, held_out), draws()
    labels = torch.arange(64) % len(NAMES)
    crops, mirrored = data.crops(labels, there), 0
    u, mirror = there.uniform("crop"), there.uniform("mirror") < 0.5
    for i, label in enumerate(labels.tolist()):
        picture = np.array(Image.open(FOLDER / f"{NAMES[label]}.png").convert("RGB"))
        positions = crop_positions(held_out_mask(*picture.shape[:2]), size, held_out)
        y, x = divmod(positions[int(u[i] * len(positions))].item(), picture.shape[1])
        expected = picture[y : y + size, x : x + size].transpose(2, 0, 1)
        if mirror[i] and NAMES[label] in MIRRORED and not held_out:
            expected, mirrored = expected[:, :, ::-1], mirrored + 1
        assert np.array_equal(crops[i].numpy(), expected), i
    assert crops.dtype == torch.uint8 and (mirrored > 10) == (not held_out)


def test_grey_classes_have_equal_channels_and_colour_ones_do_not():
    data = photos()
    assert data.num_classes == len(NAMES) == 7 and [NAMES[i] for i in data.colour_labels] == list(COLOUR)
    x0, labels = data.batch(draws(0, 256))
    for label in range(7):
        spread = (x0[labels == label].amax(1) - x0[labels == label].amin(1)).amax((1, 2))
        assert (spread > 0).all() if label in data.colour_labels else (spread == 0).all()


def test_labels_are_uniform_and_mirrors_are_even():
    there = draws(0, 70_000)
    labels = there.integers("label", 7)
    assert (torch.bincount(labels, minlength=7) - 10_000).abs().max() < 4 * 10_000**0.5
    assert abs((there.uniform("mirror") < 0.5).double().mean() - 0.5) < 0.01


def test_a_batch_is_a_function_of_its_draws_and_of_no_split():
    data = photos()
    x0, labels = data.batch(draws())
    assert x0.shape == (64, *data.shape) == (64, 3, 32, 32) and x0.dtype == torch.float32
    assert -1 <= x0.min() < -0.9 and 0.9 < x0.max() <= 1
    parts = [data.batch(draws(*ends)) for ends in ((0, 1), (1, 40), (40, 64))]
    assert torch.equal(torch.cat([part[0] for part in parts]), x0)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    later = data.batch(draws(step=1))
    assert not torch.equal(later[0], x0) and not torch.equal(later[1], labels)


def test_the_pixels_are_the_ones_that_the_teacher_saw():
    assert data_hash() == "45561e11a6a57d8d08d1d9a8e35fa2fa8555c76d3f7901c4b9d5d96eeb2a83ab"
    for name, photo in zip(NAMES, read_photos(), strict=True):
        assert photo.dtype == torch.uint8 and photo.shape[-1] == 3
        assert torch.equal(photo[..., 0], photo[..., 2]) == (name not in COLOUR)


def test_the_files_are_small_lossless_and_attributed():
    files = sorted(file for file in FOLDER.iterdir() if file.name != "ATTRIBUTION.md")
    assert [file.stem for file in files] == list(NAMES)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    lines = (FOLDER / "ATTRIBUTION.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if "|" in line}
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "CC0" in rows[file.name] or "public domain" in rows[file.name]


def test_pixels_round_trip_and_are_quantised_once():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(values)
    assert x[0] == -1 and x[255] == 1 and torch.equal(to_pixels(x), values)
    assert torch.equal(to_pixels(x + 0.49 / 127.5), values)
    assert to_pixels(3 * x)[[0, 255]].tolist() == [0, 255]
