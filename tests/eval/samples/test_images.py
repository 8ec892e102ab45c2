"""Streams give the same images in any split, from any kind of source; what is no set of images is refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar.data.images import png_bytes
from eval.samples.images import UnfitError, as_pixels, open_images

IMAGES = torch.randint(0, 256, (11, 3, 6, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def folder_of(path, images=IMAGES):
    for i, image in enumerate(images):
        (path / f"{i:06d}.png").write_bytes(png_bytes(image))
    return path


def npy_folder(path):
    np.save(path / "a.npy", IMAGES[:4].numpy())
    np.save(path / "b.npy", IMAGES[4:10].permute(0, 2, 3, 1).numpy())  # channels last
    np.save(path / "c.npy", IMAGES[10].numpy())
    return path


def npy_file(path):
    np.save(path / "all.npy", IMAGES.numpy())
    return path / "all.npy"


def floats_of(dtype):
    def floats(path):
        np.save(path / "all.npy", (IMAGES.numpy() / 255).astype(dtype))
        return path / "all.npy"

    return floats


FLOATS = [floats_of(dtype) for dtype in ("<f8", ">f8", "<f4", ">f4", "<f2", ">f2", "longdouble")]


@pytest.mark.parametrize(
    "make", [folder_of, npy_folder, npy_file, *FLOATS, lambda path: IMAGES, lambda path: IMAGES / 255]
)
def test_any_source_gives_the_images_in_any_split(tmp_path, make):
    stream = open_images(make(tmp_path), "set")
    assert (stream.name, stream.count, stream.size) == ("set", 11, (6, 10))
    assert torch.equal(stream.all(), IMAGES)
    for batch_size in (1, 3, 11, 64):
        firsts, batches = zip(*stream.batches(batch_size), strict=True)
        assert torch.equal(torch.cat(batches), IMAGES) and firsts[1:] == tuple(range(0, 11, batch_size))[1:]
        assert max(map(len, batches)) <= batch_size


def test_processes_share_the_images():
    stream = open_images(IMAGES, "set")
    shares = [torch.cat([images for _, images in stream.batches(2, rank, 3)]) for rank in range(3)]
    assert torch.equal(torch.cat(shares), IMAGES) and [len(share) for share in shares] == [3, 4, 4]
    assert [first for first, _ in stream.batches(2, 1, 3)] == [3, 5]


def test_the_contact_sheet_of_a_sample_folder_is_no_sample(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "grid.png").write_bytes(png_bytes(IMAGES[0, :, :4]))
    with pytest.raises(UnfitError, match="grid.png: 4 x 10"):
        open_images(tmp_path)
    (tmp_path / "samples.json").write_text("{}")
    assert open_images(tmp_path).count == 11


def test_what_else_lies_in_the_folder_is_counted_by_its_endings(tmp_path):
    assert open_images(folder_of(tmp_path)).others == ""
    for name in ("a.jpg", "b.JPG", "c.webp", "d", ".hidden", "grid.png"):
        (tmp_path / name).write_bytes(png_bytes(IMAGES[0]))
    (tmp_path / "more").mkdir()
    stream = open_images(tmp_path)
    assert (stream.count, stream.others) == (12, "2 .jpg, 1 .webp, 1 folder, 1 no ending")
    (tmp_path / "samples.json").write_text("{}")
    assert open_images(tmp_path).others == stream.others and open_images(tmp_path).count == 11


def deep_png() -> bytes:
    """Ten columns of six pixels, 16 bits a channel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 6, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(6 * 61))) + chunk(b"IEND", b"")


def npz_of_another_name(path):
    with path.open("wb") as file:
        np.savez(file, images=IMAGES.numpy())


def save(path, mode, size=(10, 6)):
    Image.new(mode, size).save(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: save(path / "z.png", "RGB", (9, 6)), "z.png: 6 x 9, but 6 x 10 in 000000.png"),
        (lambda path: save(path / "z.png", "L"), "z.png: 1 channels of mode L, not 3"),
        (lambda path: save(path / "z.png", "RGBA"), "z.png: 4 channels of mode RGBA, not 3"),
        (lambda path: (path / "z.png").write_bytes(b"no image"), "z.png: no readable PNG"),
        (lambda path: (path / "z.png").write_bytes(deep_png()), "z.png: 16 bits a channel; convert it to 8-bit RGB"),
        (lambda path: np.save(path / "z.npy", np.zeros((2, 4, 6, 10))), r"z.npy: shape \(2, 4, 6, 10\); expected"),
        (lambda path: np.save(path / "z.npy", np.zeros((0, 3, 6, 10))), r"z.npy: shape \(0, 3, 6, 10\)"),
        (lambda path: np.save(path / "z.npy", np.array([{}], dtype=object)), "z.npy: no plain array.*never pickled"),
        (
            lambda path: np.save(path / "z.npy", np.zeros((1, 3, 6, 10), "V2")),
            r"z.npy: raw bytes .*V2.*bfloat16.*float32",
        ),
        (
            lambda path: np.save(path / "z.npy", np.zeros((1, 3, 6, 10), "U3")),
            "z.npy: holds <U3, no real numbers; save",
        ),
        (
            lambda path: np.save(path / "z.npy", np.zeros((1, 3, 6, 10), "S3")),
            r"z.npy: holds \|S3, no real numbers; save",
        ),
        (
            lambda path: np.save(path / "z.npy", np.zeros((1, 3, 6, 10), "c8")),
            "z.npy: holds complex64, no real numbers",
        ),
        (lambda path: np.save(path / "z.npy", np.zeros((1, 3, 6, 10), "f4,f4")), "z.npy: holds .*, no real numbers"),
        (lambda path: npz_of_another_name(path / "z.npy"), "z.npy: no plain array .an npz archive.; save numbers"),
        (lambda path: (path / "z.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00{'desc"), "z.npy: no plain array"),
        (lambda path: (path / "z.png").symlink_to("absent"), "z.png: cannot be read: No such file"),
        (lambda path: Image.new("RGB", (10, 6)).save(path / "z.png", "JPEG"), "z.png: no readable PNG"),
    ],
)
def test_a_folder_that_is_no_set_is_refused_at_once(tmp_path, spoil, said):
    spoil(folder_of(tmp_path))
    with pytest.raises(UnfitError, match=said):
        open_images(tmp_path)


def test_an_image_beyond_pillows_limit_is_refused_in_one_line(tmp_path, monkeypatch):
    folder_of(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnfitError, match="000000.png: Image size .60 pixels. exceeds limit"):
        open_images(tmp_path)


def test_an_empty_folder_and_no_folder_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UnfitError, match="no .png or .npy in this folder, which holds 1 .txt; name one that holds"):
        open_images(tmp_path)
    with pytest.raises(UnfitError, match="neither a folder"):
        open_images(tmp_path / "absent")


def test_damage_inside_a_file_is_named_when_it_is_read(tmp_path):
    folder_of(tmp_path)
    whole = (tmp_path / "000003.png").read_bytes()
    (tmp_path / "000003.png").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(UnfitError, match="000003.png"):
        list(open_images(tmp_path).batches(4))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 1, 8, 8), r"student: expected \(N >= 1, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "student: expected"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "student: torch.int64"),
        (torch.full((2, 3, 8, 8), torch.nan), "student: 2 images hold numbers that are not finite, first 0"),
        (torch.full((2, 3, 8, 8), -0.5), "student: values from -0.5 to -0.5"),
    ],
)
def test_tensors_that_are_no_images_are_refused(images, said):
    with pytest.raises(UnfitError, match=said):
        as_pixels(images, "student")


def test_nan_in_an_npy_file_names_the_file(tmp_path):
    array = np.zeros((3, 3, 4, 4), np.float32)
    array[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UnfitError, match="a.npy: 1 images .* first 1"):
        open_images(tmp_path).all()


def test_half_precision_is_rounded_once():
    """The nearest number of 8 bits of mantissa to every level that one can hold; 255 x in bfloat16 would miss many."""
    exact = (torch.arange(256).double() / 255).to(torch.bfloat16)
    pixels = as_pixels(exact.reshape(1, 1, 16, 16).expand(1, 3, 16, 16), "set")
    assert torch.equal(pixels[0, 0].flatten(), (exact.double() * 255).round().to(torch.uint8))


def test_floats_are_rounded_not_truncated():
    levels = torch.tensor([0.0, 0.4, 0.6, 254.4, 254.6, 255.0]) / 255
    pixels = as_pixels(levels.reshape(1, 1, 1, 6).expand(1, 3, 1, 6), "set")
    assert pixels[0, 0, 0].tolist() == [0, 0, 1, 254, 255, 255]
