"""CLIP score with a tiny random model in a folder, LPIPS over random trunks: the numbers by definition, the guards."""

import dataclasses

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torchvision.models import alexnet

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.perceptual import lpips_network
from eval.measure.clip import scored
from eval.measure.ledger import Ledger
from eval.measure.suite import Suite
from eval.metrics import perceptual
from eval.metrics import weight_files as weights
from eval.metrics.perceptual import clip_score, load_clip, load_lpips, lpips_diversity, lpips_paired, paired_distances
from eval.samples.images import UnfitError
from eval.samples.sets import ImageSet
from tests.eval.tiny_clip import MEAN, STD, tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # the lpips package's way to call it

PROMPTS = ["a cat", "gravel", "a cup of coffee"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What open_clip reads from `local-dir:`."""
    pytest.importorskip("open_clip")
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def test_the_score_is_the_cosine_with_the_folder_s_preprocessing(folder, monkeypatch):
    monkeypatch.setattr(perceptual, "BATCH", 2)
    clip = load_clip(f"local-dir:{folder}", prefix="a photo of ")
    images = noise(3, 3, 32, 32)
    result = clip_score(clip, images, PROMPTS)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    seen = clip.network.encode_image((images / 255 - mean) / std)
    read = clip.network.encode_text(clip.tokenise([f"a photo of {prompt}" for prompt in PROMPTS]))
    expected = 100 * torch.nn.functional.cosine_similarity(seen, read)
    assert np.allclose(result.per_image, expected.numpy(), atol=1e-3)
    assert result.value == pytest.approx(expected.mean().item(), abs=1e-3)
    assert result.facts["prefix"] == "a photo of " and result.facts["model"] == f"local-dir:{folder}"
    assert result.facts["architecture"].startswith(
        "unnamed: image layers 1, width 64, patch_size 16, image_size 32; text"
    )
    assert result.facts["preprocess"]["mean"] == MEAN and result.facts["images"] == 3
    assert result.facts["sha256"] == weights.file_hash(folder / weights.CLIP_FILES[0])
    swapped = clip_score(clip, images, PROMPTS[::-1])
    assert swapped.per_image[0] != pytest.approx(result.per_image[0], abs=1e-3)
    clip.network.visual.proj.neg_()
    assert clip_score(clip, images, PROMPTS).value == pytest.approx(-result.value), "not clipped at 0"


def test_only_the_usual_weights_give_a_published_score(folder):
    one = ImageSet("a", noise(3, 3, 32, 32), torch.tensor([0, 1, 0]), "student", True)
    suite = Suite((), clip=load_clip(f"local-dir:{folder}"), prompt="a photo of {}")
    found = scored(one, suite, {0: "a cat", 1: "two cats"}, Ledger()).result(0)
    assert not found.comparable_to_published and found.prompt == "a photo of {}"
    usual = dataclasses.replace(suite.clip, facts={**suite.clip.facts, "model": perceptual.HUB + perceptual.CLIP_REPO})
    suite = dataclasses.replace(suite, clip=usual)
    found = scored(one, suite, {0: "a cat", 1: "two cats"}, Ledger()).result(0)
    assert found.comparable_to_published


@pytest.mark.parametrize(
    ("own", "prompted", "template", "read"),
    [
        ({}, False, "", ["a photo of a cat", "a photo of two cats", "a photo of a cat"]),
        ({0: "x", 1: "y"}, False, "", ["a photo of x", "a photo of y", "a photo of x"]),
        ({0: "x", 1: "y"}, True, "", ["x", "y", "x"]),
        ({0: "x", 1: "y"}, True, "a drawing of {}", ["a drawing of x", "a drawing of y", "a drawing of x"]),
        ({}, True, "noise", ["noise"] * 3),
        ({}, True, "", "the text of prompt 0 is not known; encode its prompts again, or set prompt"),
        ({0: "x"}, False, "", "the name of class 1 is not known; name classes in its samples.json"),
    ],
)
def test_every_image_is_scored_with_what_it_was_made_from(monkeypatch, own, prompted, template, read):
    seen = []

    def known(clip, images, prompts):
        seen.extend(prompts)
        return perceptual.ClipScore(1.0, np.ones(len(images)), {})

    monkeypatch.setattr(perceptual, "clip_score", known)
    one = ImageSet("a", noise(3, 3, 32, 32), torch.tensor([0, 1, 0]), "student", True, names=own, prompted=prompted)
    ledger = Ledger()
    scored(one, Suite((), clip="clip", prompt=template), {0: "a cat", 1: "two cats"}, ledger)
    assert seen == read or (not seen and read in ledger.skipped[0].reason)


def test_a_hub_name_is_looked_for_here_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    with pytest.raises(MissingWeightsError, match="CLIP score needs tiny/open_clip_model.safetensors"):
        load_clip("hf-hub:owner/tiny")
    (tmp_path / "tiny").symlink_to(folder)
    clip = load_clip("hf-hub:owner/tiny")
    assert clip.facts["model"] == "hf-hub:owner/tiny" and clip.facts["tag"] == "tiny"


def test_sources_that_lose_the_preprocessing_are_refused(folder, tmp_path):
    for source in ("ViT-B-32", str(folder / weights.CLIP_FILES[0])):
        with pytest.raises(UserError, match="a bare file or name loses the preprocessing"):
            load_clip(source)
    with pytest.raises(MissingWeightsError, match="holds neither open_clip_model.safetensors"):
        load_clip(f"local-dir:{tmp_path}")
    (tmp_path / weights.CLIP_FILES[0]).write_bytes(b"damaged")
    with pytest.raises(MissingWeightsError, match="open_clip_config.json is missing"):
        load_clip(f"local-dir:{tmp_path}")
    (tmp_path / weights.CLIP_CONFIG).write_text((folder / weights.CLIP_CONFIG).read_text())
    with pytest.raises(DamagedFileError, match="no CLIP of open_clip"):
        load_clip(f"local-dir:{tmp_path}")


def test_each_image_has_its_prompt(folder):
    clip = load_clip(f"local-dir:{folder}")
    with pytest.raises(UnfitError, match="3 prompts; expected"):
        clip_score(clip, noise(2, 3, 32, 32), PROMPTS)


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return {name: value for name, value in alexnet(weights=None).state_dict().items() if name.startswith("features.")}


@pytest.fixture
def metric(trunk, tmp_path, monkeypatch):
    path = tmp_path / weights.ALEXNET.file
    torch.save(trunk, path)
    known = dataclasses.replace(weights.ALEXNET, sha256=weights.file_hash(path))
    monkeypatch.setattr(perceptual, "ALEXNET", known)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    return load_lpips()


def test_lpips_is_that_of_the_training_loss(metric, trunk):
    a, b = noise(2, 3, 64, 64) / 127.5 - 1, noise(2, 3, 64, 64, seed=1) / 127.5 - 1
    expected = lpips_network(trunk)(a, b).flatten()
    assert torch.allclose(metric.distance(a, b), expected, rtol=1e-5) and expected.min() > 0
    assert metric.distance(a, a).abs().max() == 0


@pytest.mark.parametrize("bad", [0.0, 255.0])
def test_images_outside_of_the_range_are_refused(metric, bad):
    x = torch.full((1, 3, 64, 64), 0.5)
    with pytest.raises(UnfitError, match="values from .*expected "):
        metric.distance(x, x * (bad or torch.nan))
    with pytest.raises(UnfitError, match="torch.uint8; expected floats"):
        metric.distance(x, noise(1, 3, 64, 64))
    with pytest.raises(UnfitError, match="equal shapes"):
        metric.distance(x, x[..., :32])


def test_paired_distance_keeps_the_pairs(metric, monkeypatch):
    monkeypatch.setattr(perceptual, "BATCH", 2)
    images, others = noise(3, 3, 64, 64), noise(3, 3, 64, 64, seed=1)
    result = lpips_paired(metric, images, others)
    single = [
        metric.distance(a[None] / 127.5 - 1, b[None] / 127.5 - 1).item() for a, b in zip(images, others, strict=True)
    ]
    assert paired_distances(metric, images, others) == pytest.approx(single, rel=1e-4)
    assert result.value == pytest.approx(np.mean(single))
    assert not result.upsampled and result.images == 3 and result.facts["net"] == "alex"
    assert lpips_paired(metric, images[..., ::2, ::2], others[..., ::2, ::2]).upsampled
    with pytest.raises(UnfitError, match="equally many"):
        lpips_paired(metric, images, others[:2])


def test_diversity_is_the_mean_over_pairs_of_a_class(metric):
    images = noise(6, 3, 64, 64)
    images[4] = images[3]  # class 1: two equal images and one other
    labels = torch.tensor([0, 0, 7, 1, 1, 1])
    result = lpips_diversity(metric, images, labels)
    x = images / 127.5 - 1
    zero = metric.distance(x[:1], x[1:2]).item()
    one = 2 * metric.distance(x[3:4], x[5:6]).item() / 3
    assert result.by_class == pytest.approx({0: zero, 1: one}, rel=1e-4) and result.pairs == 4
    assert result.value == pytest.approx((zero + one) / 2, rel=1e-4)
    few = [lpips_diversity(metric, images, labels, seed=seed, pairs_per_class=1) for seed in (0, 0, 3)]
    assert few[0] == few[1] and few[0].pairs == 2
    with pytest.raises(UnfitError, match="no class has two images"):
        lpips_diversity(metric, images[:3:2], labels[:3:2])


@pytest.mark.slow
def test_vgg_takes_its_own_trunk(tmp_path, monkeypatch):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    state = {name: value for name, value in vgg16(weights=None).state_dict().items() if name.startswith("features.")}
    torch.save(state, tmp_path / "vgg.pth")
    known = dataclasses.replace(weights.VGG16, sha256=weights.file_hash(tmp_path / "vgg.pth"))
    monkeypatch.setattr(perceptual, "VGG16", known)
    metric = load_lpips("vgg", tmp_path / "vgg.pth")
    first = metric.network.net.slice1[0]
    assert torch.equal(first.weight, state["features.0.weight"])
    a, b = noise(2, 3, 64, 64) / 127.5 - 1, noise(2, 3, 64, 64, seed=1) / 127.5 - 1
    assert metric.distance(a, b).min() > 0 and metric.distance(a, a).max() == 0


def test_another_network_is_refused():
    with pytest.raises(UserError, match="net = squeeze; choose one of alex, vgg"):
        load_lpips("squeeze")
