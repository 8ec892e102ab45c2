"""python -m dmd_dar.encode: the VAE's means and deviations of given images, whoever makes them."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmd_dar import config, pretrain
from dmd_dar.data.config import DataConfig
from dmd_dar.data.images import to_model_range
from dmd_dar.data.latents import Latents
from dmd_dar.data.photos import Photos
from dmd_dar.data.shards import MANIFEST, shard_name
from dmd_dar.data.sources import open_data
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.models.codecs import Codec, load_codec
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.sample import SampleConfig, sample
from tests.models.tiny_pipelines import shaken, tiny_vae
from tests.pictures import noise

SIZES = {"cats": [(36, 40), (33, 64)], "dogs": [(40, 32), (64, 33), (50, 50)]}
SCALE = dict(scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    shaken(tiny_vae(**SCALE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for label, (name, sizes) in enumerate(SIZES.items()):
        (folder / name).mkdir()
        for i, (height, width) in enumerate(sizes):
            Image.fromarray(noise(height, width, 10 * label + i)).save(folder / name / f"{i}.png")
    return folder


def arguments(vae: Path, out: Path, images: Path | None, *more: str) -> list[str]:
    folder = [] if images is None else ["data.name=folder", f"data.path={images}", "data.held_out_share=0"]
    return [f"codec={vae}", f"out={out}", "shard_size=2", "batch_size=2", "cpu=true", *folder, *more]


def run(vae: Path, out: Path, images: Path | None, *more: str) -> dict[str, bytes]:
    encode(config.load(EncodeConfig, arguments(vae, out, images, *more)))
    return contents(out)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def command(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        config.run_job(EncodeConfig, encode, list(argv))
    return stop.value.code


@pytest.fixture(scope="module")
def whole(vae, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "whole"
    run(vae, out, images)
    return out


def middles(images: Path) -> Tensor:
    """The middle 32 x 32 pixels of each image, (5, 3, 32, 32) in [-1, 1]."""
    crops = []
    for name, sizes in SIZES.items():
        for i, (height, width) in enumerate(sizes):
            y, x = (height - 32) // 2, (width - 32) // 2
            crops.append(np.array(Image.open(images / name / f"{i}.png"))[y : y + 32, x : x + 32])
    return to_model_range(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


@torch.no_grad()
def test_the_latents_are_the_vae_s_own_of_every_images_middle_scaled_once(vae, images, whole):
    raw = shaken(tiny_vae(**SCALE)).encode(middles(images)).latent_dist
    data = Latents(str(whole))
    mean, std = data.moments(torch.arange(5))
    assert data.shape == (4, 16, 16) and data.label_names == ("cats", "dogs") and mean.dtype == torch.float32
    torch.testing.assert_close(mean, 0.5 * (raw.mean - 0.25), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, 0.5 * raw.std, rtol=1e-4, atol=1e-6)
    assert mean.std() > 0.01 and std.min() > 0
    assert data.shards.rows("cond", torch.arange(5)).tolist() == [0, 0, 1, 1, 1]
    assert data.codec == load_codec(str(vae)).digest()


@torch.no_grad()
def test_flip_adds_each_images_mirror_and_nothing_else(vae, images, whole, tmp_path):
    run(vae, tmp_path, images, "data.flip=true")
    both, plain = Latents(str(tmp_path)), Latents(str(whole))
    torch.testing.assert_close(both.moments(torch.arange(0, 10, 2))[0], plain.moments(torch.arange(5))[0])
    mirrored = load_codec(str(vae)).encode(middles(images).flip(-1))[0]
    torch.testing.assert_close(both.moments(torch.arange(1, 10, 2))[0], mirrored, rtol=1e-4, atol=1e-5)
    assert both.counts.tolist() == [4, 6]


def test_the_held_out_images_are_the_others(vae, images, whole, tmp_path):
    share = "data.held_out_share=0.5"
    run(vae, tmp_path / "train", images, share)
    run(vae, tmp_path / "rest", images, share, "held_out=true", "data.flip=true")
    train, rest = Latents(str(tmp_path / "train")), Latents(str(tmp_path / "rest"), held_out=True)
    assert train.counts.tolist() == [1, 1] and rest.counts.tolist() == [1, 2]
    every = torch.cat([data.moments(torch.arange(len(data.shards)))[0] for data in (train, rest)])
    assert torch.equal(sorted_rows(every), sorted_rows(Latents(str(whole)).moments(torch.arange(5))[0]))


def sorted_rows(x: Tensor) -> Tensor:
    return x.flatten(1)[x.flatten(1)[:, 0].argsort()].round(decimals=4)


@torch.no_grad()
def test_random_crops_of_any_source(vae, tmp_path):
    run(vae, tmp_path, None, "n=10", "seed=5", "data.name=photos")
    data, photos = Latents(str(tmp_path)), Photos(32)
    assert data.label_names == photos.label_names and data.counts.tolist() == [2, 2, 2, 1, 1, 1, 1]
    crops = photos.crops(torch.tensor([6, 1]), Draws(5, "encode", 0, torch.tensor([9, 3])))
    mean, std = load_codec(str(vae)).encode(to_model_range(crops))
    torch.testing.assert_close(data.moments(torch.tensor([9, 3])), (mean, std), rtol=1e-4, atol=1e-5)


def test_whoever_makes_them_the_bytes_are_the_same(vae, images, whole, tmp_path, monkeypatch, capsys):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: fork)
    assert run(vae, tmp_path / "two", images, "workers=2", "threads=1") == contents(whole)
    (tmp_path / "two" / shard_name(1)).unlink()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(vae, tmp_path / "two", images) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_the_shard_and_the_same_command_continues(
    vae, images, whole, tmp_path, monkeypatch, capsys, number
):
    own, calls = Codec.encode, []

    def signalling(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return own(self, pixels)

    monkeypatch.setattr(Codec, "encode", signalling)
    assert command(*arguments(vae, tmp_path, images)) == 143
    assert "stopped with 1 of 3 shards" in capsys.readouterr().err
    assert run(vae, tmp_path, images) == contents(whole) and calls == [2, 2, 1]
    assert "5 images in" in capsys.readouterr().out
    run(vae, tmp_path, images)
    assert calls == [2, 2, 1]


def test_a_second_signal_ends_it_at_once_and_nothing_half_made_counts(vae, images, whole, tmp_path):
    def twice() -> None:
        own = Codec.encode

        def signalling(self, pixels):
            if (tmp_path / shard_name(0)).exists():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return own(self, pixels)

        Codec.encode = signalling
        run(vae, tmp_path, images)

    process = multiprocessing.get_context("fork").Process(target=twice)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert [name for name in sorted(contents(tmp_path)) if name.startswith("shard")] == [shard_name(0)]
    assert run(vae, tmp_path, images) == contents(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("data.size=40",), "40 x 36, smaller than data.size 40"),
        (("data.size=33",), "multiple of 2 pixels"),
        (("data.flip=true",), "copies: 1 -> 2"),
        (("codec=/nowhere",), "/nowhere"),
        (("n=1",), "n = 1: fewer crops than the 2 classes"),
        (("held_out=true",), "no image is held out of 'cats', 'dogs'"),
        (("data.name=photos", "data.path="), "say how many random crops"),
        (("data.name=latents",), "encoded already"),
    ],
)
def test_mistakes_and_other_contents_end_with_one_line_and_change_nothing(
    vae, images, whole, tmp_path, more, said, capsys
):
    out, before = (whole if more == ("data.flip=true",) else tmp_path / "out"), contents(whole)
    assert command(*arguments(vae, out, images, *more)) == 2
    message = capsys.readouterr().err.splitlines()
    assert message[-1].startswith("error: ") and said in message[-1]
    assert contents(whole) == before and not list(tmp_path.glob("out/shard*"))


def test_an_unusable_image_is_named_before_the_first_shard(vae, images, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i in range(4):
        Image.fromarray(noise(40, 40, i)).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "9.png").write_bytes((tmp_path / "set" / "0.png").read_bytes()[:-700])
    assert command(*arguments(vae, tmp_path / "out", tmp_path / "set")) == 2
    assert "'9.png'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_latents_that_are_no_numbers_are_refused(images, tmp_path, capsys):
    broken = tiny_vae()
    torch.nn.init.constant_(broken.quant_conv.bias, torch.nan)
    broken.save_pretrained(tmp_path / "vae")
    assert command(*arguments(tmp_path / "vae", tmp_path / "out", images)) == 2
    assert "latents of image 0 are not finite" in capsys.readouterr().err


def test_a_codec_s_digest_is_its_values_not_its_folder(vae, tmp_path):
    digest = load_codec(str(vae)).digest()
    shaken(tiny_vae(**SCALE, sample_size=64)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and load_codec(str(tmp_path)).digest() == digest
    others = [shaken(tiny_vae(**SCALE), 1), shaken(tiny_vae(**{**SCALE, "scaling_factor": 0.4}))]
    others += [shaken(tiny_vae(**{**SCALE, "shift_factor": 0.2})), shaken(tiny_vae(**SCALE, norm_num_groups=2))]
    assert len({digest, *(Codec(other).digest() for other in others)}) == 5


SMALL = "batch_size=4 log.every=1 log.samples_every=2 log.wandb=disabled launch.cpu=true"
NETWORK = "model.input_size=16 model.in_channels=4 model.patch=4 model.width=16 model.depth=2 model.heads=2"


def test_from_images_and_a_vae_to_a_few_step_student(vae, images, whole, tmp_path, capsys):
    """encode, pretrain, distill, sample: grids and samples are decoded, and the VAE goes with the networks."""
    data = [f"data.path={whole}", "data.name=latents"]
    given = [*SMALL.split(), *data]
    teach = [*given, *NETWORK.split(), f"codec={vae}", "steps=2", f"out_dir={tmp_path / 'teacher'}"]
    config.run_job(pretrain.PretrainConfig, pretrain.pretrain, teach)
    teacher = load_teacher(TeacherConfig(str(tmp_path / "teacher" / "student")))
    assert teacher.codec == str(tmp_path / "teacher" / "student" / "vae")  # it travels with the network
    assert load_codec(teacher.codec).digest() == teacher.codec_digest == load_codec(str(vae)).digest()
    assert teacher.label_names == ("cats", "dogs") and teacher.network.config.in_channels == 4
    shown = np.array(Image.open(tmp_path / "teacher" / "samples" / "data.png"))
    assert shown.shape == (8 * 66 - 2, 8 * 66 - 2, 3)
    x0, _ = open_data(DataConfig("latents", path=str(whole))).batch(Draws(0, "shown", 0, sample_range(0, 1)))
    first = load_codec(str(vae)).decode(x0)[0].clamp(-1, 1).permute(1, 2, 0)
    assert np.abs(shown[:64:2, :64:2] - (first.numpy() + 1) * 127.5).max() < 1
    assert Image.open(tmp_path / "teacher" / "samples" / "step_00000002.png").size == (2 * 66 - 2, 7 * 66 - 2)

    few = "steps=1 rungs=[1.0,0.5] fake_score.updates=1 regression.weight=0 student.routing.chunk_size=2"
    few += " preflight=false log.health_samples=4"
    few = [*given, *few.split(), f"teacher.path={tmp_path / 'teacher' / 'student'}", f"out_dir={tmp_path / 'run'}"]
    distill.main(few)
    student = tmp_path / "run" / "student"
    assert load_teacher(TeacherConfig(str(student))).codec_digest == teacher.codec_digest
    sample(SampleConfig(student=str(student), out=str(tmp_path / "images"), n=2, cpu=True))
    assert Image.open(tmp_path / "images" / "000001.png").size == (32, 32)

    shaken(tiny_vae(**SCALE), 3).save_pretrained(tmp_path / "other")
    refused = {
        "another VAE than the one that the network was trained with": [f"teacher.codec={tmp_path / 'other'}"],
        "its latents are [4, 16, 16], the network's [3, 32, 32]": ["teacher.path=teachers/photos32"],
    }
    for said, more in refused.items():
        with pytest.raises(SystemExit):
            distill.main([*few, *more, f"out_dir={tmp_path / 'refused'}"])
        message = capsys.readouterr().err.splitlines()[-1]
        assert said in message or ("[3, 32, 32]" in said and "another VAE" in message)
    for said, more in {
        "set model.in_channels=4 and model.input_size=16": ["model.input_size=8"],
        "its latents are those of another VAE": [f"codec={tmp_path / 'other'}"],
        "codec is for data.name=latents": ["codec="],
    }.items():
        with pytest.raises(SystemExit):
            config.run_job(pretrain.PretrainConfig, pretrain.pretrain, [*teach, *more, f"out_dir={tmp_path / 'no'}"])
        assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "no").exists()


def test_the_manifest_says_how_they_were_made(whole, images):
    content = json.loads((whole / MANIFEST).read_text())["content"]
    assert content["kind"] == "latents" and content["images"] == "middle" and content["counts"] == [2, 3]
    data = DataConfig("folder", path=str(images), held_out_share=0)
    assert content["data"] == open_data(data).hash and content["size"] == 32
