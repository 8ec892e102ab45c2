"""Image files: ugly ones come out as they look, hostile and damaged ones are refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dmd_dar.data.decode import ImageError, read_image
from tests.pictures import bomb, chunk, encoded, noise, picture

ROTATED = {  # what a camera stores for each EXIF orientation, from the upright picture
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def decoded(content: bytes, max_megapixels: float = 100, shorter_side: int = 0) -> np.ndarray:
    return read_image(io.BytesIO(content), max_megapixels, shorter_side)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_files_give_their_pixels(kind):
    upright = noise()
    assert np.array_equal(decoded(encoded(upright, kind, **({"lossless": True} if kind == "WEBP" else {}))), upright)


@pytest.mark.parametrize("orientation", ROTATED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(encoded(ROTATED[orientation](picture()), kind, exif=exif))
    assert found.shape == picture().shape
    assert np.abs(found.astype(int) - picture()).max() <= (0 if kind in ("PNG", "TIFF") else 12)


def test_grey_becomes_three_equal_channels():
    grey = picture()[..., 0]
    for content in (encoded(grey), encoded(grey, "JPEG", quality=100), encoded(Image.fromarray(grey).convert("P"))):
        assert np.abs(decoded(content).astype(int) - grey[..., None]).max() <= 2
    bits = Image.fromarray(noise()[..., 0] > 127)
    assert np.array_equal(decoded(encoded(bits)), np.repeat(np.array(bits)[..., None] * np.uint8(255), 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_and_rounded(kind):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = decoded(encoded(deep, kind))
    assert np.array_equal(found, np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, -1))


def test_sixteen_bits_of_colour_are_scaled_within_a_level():
    deep = np.random.default_rng(0).integers(0, 65536, (40, 40, 3), dtype=np.uint16)
    found = decoded(png(deep, colour_type=2))
    assert np.abs(found - deep / 257).max() <= 1 and found.shape == (40, 40, 3)


def png(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG, which Pillow does not write for colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparency_lies_over_white():
    colours, alpha = noise(), noise(seed=1)[..., 0]
    expected = colours * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    for image in (np.dstack([colours, alpha]), np.dstack([colours[..., :1], alpha])):
        assert np.abs(decoded(encoded(image)) - expected[..., : image.shape[-1] - 1]).max() <= 1
    levels = (np.arange(40 * 56) % 256).astype(np.uint8).reshape(40, 56)
    index = Image.fromarray(levels).convert("P")
    for image in (index, Image.fromarray(levels)):  # one level of the palette, or of grey, is transparent
        found = decoded(encoded(image, transparency=7))
        assert np.array_equal(found, np.repeat(np.where(levels == 7, 255, levels)[..., None], 3, -1))
    deep = levels.astype(np.uint16) * 257
    assert np.array_equal(decoded(encoded(deep, transparency=7 * 257)), found)
    soft = decoded(encoded(index, transparency=bytes(256 * [0])))
    assert (soft == 255).all()


def test_cmyk_becomes_rgb_and_is_not_inverted():
    inks = np.zeros((32, 32, 4), np.uint8)
    inks[:16, :, 0], inks[:, 16:, 3] = 255, 128  # cyan above, half black at the right
    expected = [(4, 4, (0, 255, 255)), (20, 4, (255, 255, 255)), (4, 28, (0, 127, 127)), (20, 28, (127, 127, 127))]
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        found = decoded(encoded(Image.fromarray(inks, "CMYK"), kind, **options)).astype(int)
        for y, x, colour in expected:
            assert np.abs(found[y, x] - colour).max() <= 4, (kind, y, x)


def test_a_colour_profile_changes_nothing_and_the_first_picture_of_several_counts():
    assert np.array_equal(decoded(encoded(noise(), icc_profile=b"not a profile")), noise())
    others = [Image.fromarray(noise(seed=1))]
    for kind in ("TIFF", "PNG"):
        several = encoded(noise(), kind, save_all=True, append_images=others)
        assert np.array_equal(decoded(several), noise())


def test_shrinking_keeps_the_shape_and_the_mean_and_enlarges_nothing():
    assert decoded(encoded(picture(100, 151)), shorter_side=50).shape == (50, 76, 3)
    assert decoded(encoded(picture(151, 100)), shorter_side=50).shape == (76, 50, 3)
    fine = np.repeat(np.indices((96, 96)).sum(0)[..., None] % 2 * 255, 3, -1).astype(np.uint8)
    shrunk = decoded(encoded(fine), shorter_side=32)
    assert np.abs(shrunk[2:-2, 2:-2].astype(int) - 127.5).max() <= 3  # beyond Nyquist: grey, no moire
    assert decoded(encoded(picture()), shorter_side=48).shape == decoded(encoded(picture()), shorter_side=500).shape


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused(mode):
    with pytest.raises(ImageError, match="32 bits"):
        decoded(encoded(Image.fromarray(np.ones((32, 32), {"F": np.float32, "I": np.int32}[mode])), "TIFF"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (11_000, 10_000)):
        with pytest.raises(ImageError, match="data.max_megapixels 100"):
            decoded(bomb(width, height))
    with pytest.raises(ImageError, match="64 x 48, more than data.max_megapixels 0.003"):
        decoded(encoded(picture()), max_megapixels=0.003)


def test_damaged_files_say_what_is_wrong():
    jpeg, whole = encoded(noise(), "JPEG"), encoded(noise())
    for content in (b"", b"text", jpeg[:200], jpeg[: len(jpeg) // 2], whole[: len(whole) // 2], bomb(64, 64)):
        with pytest.raises(ImageError, match=r"\w+"):
            decoded(content)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    with pytest.raises(ImageError):
        decoded(bytes(flipped))
    with pytest.raises(ImageError, match="not one of PNG"):  # a reader that starts other programs is never tried
        decoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF of `picture()` with further entries (tag, type, count, four bytes) in its directory."""
    height, width = picture().shape[:2]
    pixels = picture().tobytes()
    shape = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: len(pixels)}
    rows = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in shape.items()]
    rows += [struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries]
    rows.sort(key=lambda row: struct.unpack("<H", row[:2]))
    directory = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG of `picture()` with one more chunk behind its header."""
    whole = encoded(picture())
    return whole[:33] + chunk(kind, content) + whole[33:]


def turned(exif: bytes, kind: str) -> bytes:
    return encoded(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


BROKEN_EXIF = {
    "no header": b"no header at all",
    "empty": b"",
    "header alone": b"MM",
    "cut in the offset": b"II*\0\x08",
    "offset beyond the end": b"II*\0\xff\xff\xff\xff",
    "count beyond the end": b"MM\0*\0\0\0\x08\xff\xff\x01\x12",
    "another version": b"II\xff\0\x08\0\0\0",
    "text for a number": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd",
    "a length of 4 GB": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\0\0\x08",
}
BROKEN_FILES = {
    **{
        f"{kind}, {name}": turned(b"Exif\0\0" + exif, kind)
        for kind in ("JPEG", "WEBP")
        for name, exif in BROKEN_EXIF.items()
    },
    **{f"PNG, {name}": with_chunk(b"eXIf", exif) for name, exif in BROKEN_EXIF.items()},
    "PNG, no numbers in a text": with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzzzz\n"),
    "TIFF, a place before the file": tiff((0x8769, 9, 1, struct.pack("<i", -5))),
    "TIFF, GPS before the file": tiff((0x8825, 9, 1, struct.pack("<i", -5))),
    "TIFF, a place beyond the end": tiff((0x8769, 4, 1, b"\xff\xff\xff\xff")),
    "TIFF, a place in words": tiff((0x8769, 2, 4, b"abc\0")),
    "TIFF, XMP of numbers": tiff((700, 3, 1, bytes(4))),
    "TIFF, XMP as text": tiff((700, 2, 4, b"abc\0")),
    "TIFF, text for a number": tiff((0x0112, 2, 4, b"abc\0")),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_an_orientation_that_cannot_be_read_leaves_the_pixels_as_they_are(name):
    found = decoded(BROKEN_FILES[name])
    assert found.shape == picture().shape
    assert np.abs(found.astype(int) - picture()).max() <= (12 if name.startswith("JPEG") else 0)


def test_a_tiff_is_turned_whatever_else_it_holds():
    orientation, place, packet = (0x0112, 3, 1, b"\x06\0\0\0"), (0x8769, 9, 1, b"\xff" * 4), (700, 3, 1, bytes(4))
    for more in ([], [place], [packet], [place, packet]):
        assert np.array_equal(decoded(tiff(orientation, *more)), np.rot90(picture(), -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientations_that_mean_nothing_are_passed_over(kind):
    for value in (0, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        assert decoded(encoded(picture(), kind, exif=exif)).shape == picture().shape
