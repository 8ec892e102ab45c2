"""A folder of images: what cannot be used is refused by name, crops are slices and a function of draws."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.data import folder as folder_module
from dmd_dar.data.config import DataConfig
from dmd_dar.data.folder import Folder, held_out_files
from dmd_dar.data.images import to_model_range
from dmd_dar.data.listing import list_images
from dmd_dar.data.sources import data_hash, open_data
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.pretrain import PretrainConfig
from tests.pictures import bomb, encoded, noise, picture


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fill(root: Path, counts: dict[str, int], **sides: int) -> Path:
    """Class folders of different noise images."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            put(root / name / f"{i:03d}.png", encoded(noise(seed=1000 * label + i, **sides)))
    return root


def opened(root: Path, held_out: bool = False, **keys) -> Folder:
    return Folder(DataConfig(name="folder", path=str(root), **keys), held_out=held_out)


def draws(start: int = 0, stop: int = 64, step: int = 0) -> Draws:
    return Draws(0, "pretrain", step, sample_range(start, stop))


def said(root: Path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, **keys)
    message = str(caught.value)
    assert message.startswith(f"data.path = {root}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_with_broken_exif_is_one_of_the_folder_s_images_unturned(tmp_path, kind):
    upright = noise()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    put(tmp_path / f"broken.{kind.lower()}", encoded(upright, kind, exif=b"Exif\0\0no header", **lossless))
    found = opened(tmp_path, held_out_share=0)
    assert np.array_equal(found.pictures[0].pixels, upright)


def test_jpeg_is_read_whatever_the_file_is_called(tmp_path):
    put(tmp_path / "a" / "really_a_jpeg.PNG", encoded(picture(), "JPEG", quality=95))
    crop = opened(tmp_path, size=48).crops(torch.zeros(1, dtype=torch.long), draws(0, 1))[0].permute(1, 2, 0).numpy()
    distances = [np.abs(picture()[:, x : x + 48].astype(int) - crop).max() for x in range(17)]
    assert min(distances) <= 12


def test_what_a_folder_holds(tmp_path):
    fill(tmp_path, {"b": 2, "a": 3, "B 10": 1})
    put(tmp_path / "a" / "deeper" / "still" / "x.WebP", encoded(noise(seed=7), "WEBP"))
    put(tmp_path / "a" / ".hidden.png", b"no image")
    put(tmp_path / ".thumbs" / "1.png", b"no image")
    for name in ("notes.txt", "b/LICENSE", "b/more.txt"):
        put(tmp_path / name, b"text")
    listing = list_images(tmp_path)
    assert listing.label_names == ("B 10", "a", "b") and listing.left_out == {".txt": 2, "no ending": 1}
    names = [file.name.as_posix() for file in listing.files]
    assert names == ["B 10/000.png", "a/000.png", "a/001.png", "a/002.png", "a/deeper/still/x.WebP"] + [
        "b/000.png",
        "b/001.png",
    ]
    assert [file.label for file in listing.files] == [0, 1, 1, 1, 1, 2, 2]
    data = opened(tmp_path)
    assert data.num_classes == 3 and data.hash == listing.hash == data_hash(data.cfg) and "2 .txt" in str(data)


def test_a_flat_folder_is_one_class(tmp_path):
    root = fill(tmp_path, {"flowers": 4}) / "flowers"
    data = opened(root)
    assert data.label_names == ("flowers",) and len(data.pictures) == 3
    x0, labels = data.batch(draws())
    assert x0.shape == (64, *data.shape) and x0.dtype == torch.float32 and not labels.any()


def test_the_hash_is_that_of_names_and_contents(tmp_path):
    def hash_of(**files: int) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, seed in files.items():
            put(root / f"{name}.png", encoded(noise(seed=seed)))
        return list_images(root).hash

    same = hash_of(a=0, b=1)
    assert same == hash_of(b=1, a=0) and len(same) == 64
    assert len({same, hash_of(a=1, b=0), hash_of(a=0, c=1), hash_of(a=0), hash_of(a=0, b=1, c=1)}) == 5
    os.utime(tmp_path / "0" / "a.png", (0, 0))
    assert list_images(tmp_path / "0").hash == same


def test_folders_that_cannot_be_used_say_why(tmp_path):
    assert "no folder" in said(put(tmp_path / "file.png", b""))
    (tmp_path / "empty").mkdir()
    assert "holds no images" in said(tmp_path / "empty")
    root = fill(tmp_path / "root", {"a": 2, "b": 1})
    (root / "c").mkdir()
    assert "class folders without images: 'c'" in said(root)
    (root / "c").rmdir()
    put(root / "stray.png", encoded(noise()))
    assert "'stray.png': beside the class folders" in said(root)
    (root / "stray.png").rename(root / "a" / "x.png")
    (root / "a").rename(root / "a\nb")
    assert r"'a\nb'" in said(root)


def test_links_may_not_leave_the_folder(tmp_path):
    root, outside = fill(tmp_path / "root", {"a": 3}), fill(tmp_path / "outside", {"b": 2})
    before = list_images(root).hash
    (root / "a" / "inside.png").symlink_to(root / "a" / "000.png")
    assert [file.name.name for file in list_images(root).files][-1] == "inside.png" and list_images(root).hash != before
    for target, problem in (
        (outside / "b" / "000.png", "'a/link.png': a link out of the folder"),
        (Path("../../outside/b/000.png"), "'a/link.png': a link out of the folder"),
        (Path("nowhere.png"), "leads nowhere"),
        (Path("link.png"), "leads nowhere"),
        (outside / "b", "a link to a folder"),
        (Path("."), "a link to a folder"),
    ):
        (root / "a" / "link.png").symlink_to(target)
        assert problem in said(root)
        (root / "a" / "link.png").unlink()
    (root / "b").symlink_to(outside / "b")
    assert "'b': a link to a folder" in said(root)
    (root / "b").unlink()
    os.mkfifo(root / "a" / "pipe.png")  # opening it would wait forever
    assert "'a/pipe.png': no regular file" in said(root)


def test_all_damaged_files_are_told_at_once_and_five_of_them_named(tmp_path):
    root = fill(tmp_path, {"a": 4, "b": 4})
    jpeg = encoded(noise(), "JPEG")
    put(root / "a" / "cut.jpg", jpeg[: len(jpeg) // 2])
    put(root / "a" / "small.png", encoded(noise(31, 200)))
    put(root / "b" / "bomb.png", bomb(60_000, 60_000))
    message = said(root)
    for expected in (
        "'a/cut.jpg': ",
        "'a/small.png': 200 x 31, smaller than data.size 32",
        "'b/bomb.png': more pixels",
    ):
        assert expected in message
    assert "more" not in message.split("more pixels")[1]
    for i in range(4):
        put(root / "b" / f"bad{i}.png", b"no image")
    message = said(root)
    assert message.count(".png'") + message.count(".jpg'") == 5 and "; and 2 more" in message


def test_a_held_out_image_is_checked_at_the_start_too(tmp_path):
    root = fill(tmp_path, {"a": 4})
    first = min(list_images(root).files, key=lambda file: file.digest).name
    for i in range(300):
        content = b"no image %d" % i
        put(root / first, content)
        if {file.name for file in held_out_files(list_images(root), 0.1)} == {first}:
            break
    assert str(first) in said(root)


def test_the_split_follows_the_contents(tmp_path):
    root = fill(tmp_path / "one", {"a": 20, "b": 3, "c": 1, "d": 12})
    for i in range(6):  # copies of one file
        put(root / "a" / f"copy{i}.png", (root / "a" / "000.png").read_bytes())
    listing = list_images(root)
    held_out = held_out_files(listing, 0.25)
    contents = [len({file.digest for file in held_out if file.label == label}) for label in range(4)]
    assert contents == [5, 1, 0, 3]
    assert not {file.digest for file in held_out} & {file.digest for file in set(listing.files) - held_out}
    train = opened(root, held_out=False)
    assert len(train.pictures) == len(listing.files) - len(held_out_files(listing, 0.1))
    for i, file in enumerate(sorted((root / "d").iterdir())):
        file.rename(root / "d" / f"renamed {100 - i}.png")
    renamed = held_out_files(list_images(root), 0.25)
    assert {file.digest for file in renamed} == {file.digest for file in held_out}
    assert not held_out_files(listing, 0)
    assert "no image is held out of 'c'" in str(pytest.raises(UserError, opened, root, held_out=True).value)


@pytest.mark.parametrize("flip", [False, True])
def test_every_training_crop_is_a_slice_of_a_training_image(tmp_path, flip):
    root = fill(tmp_path, {"a": 5, "b": 1}, height=33)
    put(root / "b" / "large.png", encoded(noise(80, 47, seed=99)))
    data, there, labels = opened(root, flip=flip, held_out_share=0.2), draws(0, 200), torch.arange(200) % 2
    names = sorted(
        {file.name for file in list_images(root).files} - {f.name for f in held_out_files(data.listing, 0.2)}
    )
    crops, mirrored = data.crops(labels, there), 0
    pick, place, mirror = there.uniform("image"), there.uniform("crop", 2), there.uniform("mirror") < 0.5
    for i, label in enumerate(labels.tolist()):
        own = [name for name in names if name.parts[0] == "ab"[label]]
        pixels = np.array(Image.open(root / own[int(pick[i] * len(own))]))
        y, x = (int(u * (side - 31)) for u, side in zip(place[i], pixels.shape[:2], strict=True))
        expected = pixels[y : y + 32, x : x + 32].transpose(2, 0, 1)
        if flip and mirror[i]:
            expected, mirrored = expected[:, :, ::-1], mirrored + 1
        assert np.array_equal(crops[i].numpy(), expected), i
    assert crops.dtype == torch.uint8 and (60 < mirrored < 140) == flip


def test_training_crops_reach_every_corner(tmp_path):
    y, x = np.mgrid[:34, :35]
    put(tmp_path / "x.png", encoded(np.stack([y, x, y], -1).astype(np.uint8)))
    crops = opened(tmp_path).crops(torch.zeros(300, dtype=torch.long), draws(0, 300))
    corners = crops[:, :2, 0, 0].unique(dim=0)
    assert corners.tolist() == [[i, j] for i in range(3) for j in range(4)]


def test_held_out_crops_are_tiles_around_the_middle(tmp_path):
    y, x = np.mgrid[:70, :101]
    for i in range(2):
        put(tmp_path / f"{i}.png", encoded(np.stack([y, x, 0 * y + i], -1).astype(np.uint8)))
    data = opened(tmp_path, held_out=True, flip=True)
    crops = data.crops(torch.zeros(300, dtype=torch.long), draws(0, 300))
    assert crops[:, :2, 0, 0].unique(dim=0).tolist() == [[i, j] for i in (3, 35) for j in (2, 34, 66)]
    assert (crops[:, 1, 0, -1] > crops[:, 1, 0, 0]).all()  # not mirrored
    other = opened(tmp_path).crops(torch.zeros(1, dtype=torch.long), draws(0, 1))
    assert crops[:, 2].unique().numel() == 1 and other[0, 2, 0, 0] != crops[0, 2, 0, 0]


def test_a_batch_is_a_function_of_its_draws_and_of_no_split_nor_cache(tmp_path, monkeypatch):
    root = fill(tmp_path, {"a": 6, "b": 3})
    data = opened(root, shorter_side=36)
    x0, labels = data.batch(draws())
    assert -1 <= x0.min() < -0.9 and 0.9 < x0.max() <= 1 and labels.unique().tolist() == [0, 1]
    assert torch.equal(to_model_range(data.crops(labels, draws())), x0)
    parts = [data.batch(draws(*ends)) for ends in ((0, 1), (1, 40), (40, 64))]
    assert torch.equal(torch.cat([part[0] for part in parts]), x0)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    assert not torch.equal(data.batch(draws(step=1))[0], x0)
    for cache_gb, kept in ((0.0, 0), (1.5e-5, 2)):  # an image takes 5.5 kB
        some = opened(root, shorter_side=36, cache_gb=cache_gb)
        assert sum(one.pixels is not None for one in some.pictures) == kept
        assert torch.equal(some.batch(draws())[0], x0)
    monkeypatch.setattr(folder_module, "read_image", lambda *given: pytest.fail("decoded again"))
    data.batch(draws())


def test_a_file_that_changes_during_a_run_ends_it(tmp_path):
    root = fill(tmp_path, {"a": 2})
    data = opened(root, cache_gb=0.0)
    name = data.pictures[0].file.name
    put(root / name, encoded(noise(seed=50)))
    with pytest.raises(UserError, match=f"'{name}': has changed since the run began"):
        data.batch(draws())


def test_colour_classes_are_those_with_colour(tmp_path):
    for i in range(2):
        put(tmp_path / "grey" / f"{i}.png", encoded(noise(seed=i)[..., 0]))
        put(tmp_path / "colour" / f"{i}.png", encoded(noise(seed=i)))
    data = opened(tmp_path)
    assert [data.label_names[label] for label in data.colour_labels] == ["colour"]


def test_every_source_opens_by_name(tmp_path):
    root = fill(tmp_path, {"a": 2, "b": 2})
    for cfg in (DataConfig(), DataConfig("textures"), DataConfig("folder", path=str(root))):
        for held_out in (False, True):
            data = open_data(cfg, held_out=held_out)
            x0, labels = data.batch(draws(0, 8))
            assert x0.shape == (8, *data.shape) == (8, 3, 32, 32) and labels.max() < data.num_classes
            assert len(data.label_names) == data.num_classes and data.hash == data_hash(cfg)
            assert set(data.colour_labels) <= set(range(data.num_classes))
    assert not torch.equal(data.batch(draws())[0], open_data(cfg).batch(draws())[0])


def test_the_documented_example_gives_what_is_printed(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "own_images.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)[1], {})
    data = opened(Path("my_images"), size=64, shorter_side=64)
    assert f"    data: {data}\n" in text
    by_ending = {picture.file.name.suffix: picture for picture in data.pictures if picture.file.label == 1}
    grey = {ending for ending, picture in by_ending.items() if not picture.colour}
    assert grey == {".tif"} and by_ending.keys() == {".png", ".jpg", ".tif", ".webp"}
    assert all(min(picture.height, picture.width) == 64 for picture in by_ending.values())
    assert (by_ending[".webp"].pixels[:5, :5] == 255).all()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("name=folder",), "data.path = '' (command line): path is empty"),
        (("path={root}",), "path is read by data.name folder and latents only"),
        (("name=folder", "path={root}/none"), "no such file or folder"),
        (("size=96",), "data.size = 96 (command line): size must be at most 64 for photos"),
        (("name=folder", "path={root}", "size=64", "shorter_side=48"), "shorter_side must be 0 or at least size 64"),
        (("name=foldr",), "nearest choice: folder"),
        (("name=folder", "path={root}", "held_out_share=0.6"), "data.held_out_share = 0.6"),
    ],
)
def test_configuration_mistakes_are_told(tmp_path, wrong, told):
    argv = ["out_dir=out/x", *(f"data.{key}".format(root=tmp_path) for key in wrong)]
    with pytest.raises(config.ConfigError) as caught:
        config.load(PretrainConfig, argv)
    assert told in str(caught.value)
