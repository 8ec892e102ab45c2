"""The networks of FID and FD-DINOv2 with random weights: their structure, their input, and what is refused."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dmd_dar.errors import DamagedFileError, MissingWeightsError
from eval.metrics import dino, inception
from eval.metrics import weight_files as weights
from eval.metrics.features import compare_features, extract
from eval.metrics.inception import centre_crop, clean_resize, fid, fid_inception, patch_fid
from eval.samples.images import UnfitError, open_images

SMALL_DINO = "vit_small_patch14_dinov2.lvd142m"


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def random_inception() -> dict[str, torch.Tensor]:
    """Weights of the right shapes that keep the activations' size."""
    from torchvision.models.inception import Inception3

    torch.manual_seed(0)
    network = Inception3(num_classes=inception.CLASSES, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.state_dict()


@pytest.fixture(scope="module")
def state():
    return random_inception()


@pytest.fixture
def declared(state, tmp_path, monkeypatch):
    """The random weights in DMD_DAR_WEIGHTS_DIR under FID's name, their hash declared."""
    path = tmp_path / weights.INCEPTION.file
    torch.save(state, path)
    known = dataclasses.replace(weights.INCEPTION, sha256=weights.file_hash(path)[:8])
    monkeypatch.setattr(inception, "INCEPTION", known)
    monkeypatch.setattr(weights, "INCEPTION", known)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    return path


class Reference:
    """The network of 2015 written out over a state, layer by layer."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1, padding=0):
        s = self.state
        x = F.conv2d(x, s[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"]
        return F.batch_norm(x, mean, var, s[f"{name}.bn.weight"], s[f"{name}.bn.bias"], eps=1e-3).relu()

    def chain(self, prefix, x, *layers):
        for name, padding in layers:
            x = self.conv(f"{prefix}.{name}", x, padding=padding)
        return x

    def mean_inside(self, x):
        """Sums over those neighbours that exist, divided by their number."""
        kernel = torch.ones(x.shape[1], 1, 3, 3)
        total = F.conv2d(x, kernel, padding=1, groups=x.shape[1])
        return total / F.conv2d(torch.ones_like(x), kernel, padding=1, groups=x.shape[1])

    def a(self, p, x):
        five = self.chain(p, x, ("branch5x5_1", 0), ("branch5x5_2", 2))
        three = self.chain(p, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1))
        return torch.cat(
            [self.conv(f"{p}.branch1x1", x), five, three, self.conv(f"{p}.branch_pool", self.mean_inside(x))], 1
        )

    def e(self, p, x, pool):
        three = self.conv(f"{p}.branch3x3_1", x)
        double = self.chain(p, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        wide = [
            self.chain(p, y, (n, pad))
            for y, n, pad in (
                (three, "branch3x3_2a", (0, 1)),
                (three, "branch3x3_2b", (1, 0)),
                (double, "branch3x3dbl_3a", (0, 1)),
                (double, "branch3x3dbl_3b", (1, 0)),
            )
        ]
        return torch.cat([self.conv(f"{p}.branch1x1", x), *wide, self.conv(f"{p}.branch_pool", pool(x))], 1)

    def c(self, p, x):
        one = ("branch7x7_1", 0), ("branch7x7_2", (0, 3)), ("branch7x7_3", (3, 0))
        two = [(f"branch7x7dbl_{i + 1}", pad) for i, pad in enumerate([0, (3, 0), (0, 3), (3, 0), (0, 3)])]
        return torch.cat(
            [
                self.conv(f"{p}.branch1x1", x),
                self.chain(p, x, *one),
                self.chain(p, x, *two),
                self.conv(f"{p}.branch_pool", self.mean_inside(x)),
            ],
            1,
        )

    def __call__(self, x):
        x = self.conv("Conv2d_1a_3x3", x, stride=2)
        x = self.conv("Conv2d_2b_3x3", self.conv("Conv2d_2a_3x3", x), padding=1)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(name, x)
        double = self.chain("Mixed_6a", x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        x = torch.cat(
            [
                self.conv("Mixed_6a.branch3x3", x, 2),
                self.conv("Mixed_6a.branch3x3dbl_3", double, 2),
                F.max_pool2d(x, 3, 2),
            ],
            1,
        )
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.c(name, x)
        three = self.conv("Mixed_7a.branch3x3_2", self.conv("Mixed_7a.branch3x3_1", x), 2)
        seven = self.chain("Mixed_7a", x, ("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)), ("branch7x7x3_3", (3, 0)))
        x = torch.cat([three, self.conv("Mixed_7a.branch7x7x3_4", seven, 2), F.max_pool2d(x, 3, 2)], 1)
        x = self.e("Mixed_7b", x, self.mean_inside)
        x = self.e("Mixed_7c", x, lambda y: F.max_pool2d(y, 3, 1, 1))
        return x.mean((2, 3))


@torch.no_grad()
def test_the_network_is_the_one_of_2015(state):
    """Against the same layers written out: pools without padding, and a maximum in the last block."""
    images = noise(1, 299, 299)
    x = (images.float() - 128) / 128
    ours, expected = fid_inception(state)(x), Reference(state)(x)
    assert ours.shape == (1, 2048)
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    from torchvision.models.inception import Inception3

    plain = Inception3(num_classes=inception.CLASSES, aux_logits=False, init_weights=False)
    plain.load_state_dict(state)
    plain.fc = torch.nn.Identity()
    assert (plain.eval()(x) - expected).abs().max() > 0.05 * expected.std()


def test_the_clean_resize_is_pil_s_in_float_channel_by_channel():
    images = noise(2, 40, 56)
    resized = clean_resize(images, 20)
    plane = images[1, 2].numpy().astype(np.float32)
    expected = np.asarray(Image.fromarray(plane).resize((20, 20), Image.Resampling.BICUBIC)).clip(0, 255)
    assert resized.shape == (2, 3, 20, 20) and np.array_equal(resized[1, 2].numpy(), expected)
    assert not torch.equal(resized, resized.round()), "no rounding to 8 bits"
    assert torch.equal(clean_resize(images[:, :, :, :40], 40), images[:, :, :, :40].float())
    aliased = F.interpolate(images.float(), size=(20, 20), mode="bicubic")
    assert resized.std() < 0.8 * aliased.std()


def test_fid_from_a_folder_of_weights(declared, state):
    extractor = fid()
    images = noise(2, 299, 299)
    found = extract(open_images(images, "set"), extractor, batch_size=1)
    expected = fid_inception(state)((images.float() - 128) / 128)
    assert torch.allclose(found.values, expected, rtol=1e-4, atol=1e-4)
    result = compare_features(found, found, second=found)
    assert result.value == pytest.approx(0, abs=1e-3) and result.null_images == 2
    assert result.comparable_to_published and not result.upsampled and result.dimensions == 2048
    assert result.facts["sha256"] == weights.file_hash(declared) and "bicubic" in result.facts["resize"]
    assert extract(open_images(noise(1, 16, 16), "small"), extractor).upsampled


def test_patch_fid_takes_native_crops_or_nothing(declared):
    large = noise(1, 301, 320)
    assert torch.equal(centre_crop(large), large[:, :, 1:300, 10:309].float())
    extractor = patch_fid()
    assert extractor.extract(large).shape == (1, 2048)
    with pytest.raises(UnfitError, match="320 x 298 images are too small for patch_fid"):
        extract(open_images(noise(1, 320, 298), "student"), extractor)


def test_other_weights_are_refused(declared, state, monkeypatch, tmp_path):
    torch.save({**state, "fc.weight": state["fc.weight"][:1000], "fc.bias": state["fc.bias"][:1000]}, declared)
    with pytest.raises(DamagedFileError, match="sha256"):
        fid()
    digest = hashlib.sha256(declared.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "INCEPTION", dataclasses.replace(weights.INCEPTION, sha256=digest[:8]))
    with pytest.raises(DamagedFileError, match="not the weights of FID's Inception.*fc"):
        fid()
    monkeypatch.setattr(weights, "TORCHVISION_INCEPTION", (digest[:8],))
    with pytest.raises(DamagedFileError, match="torchvision's Inception"):
        fid(declared)
    declared.unlink()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="DMD_DAR_WEIGHTS_DIR"):
        patch_fid()


def test_dinov2_is_the_class_token_of_the_given_weights(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(SMALL_DINO, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    save_file(network.state_dict(), tmp_path / f"{SMALL_DINO}.safetensors")
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    extractor = dino.dinov2(model=SMALL_DINO)
    images = noise(2, 50, 40)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = network.forward_features((clean_resize(images, 224) / 255 - mean) / std)[:, 0]
    found = extract(open_images(images, "set"), extractor)
    assert torch.allclose(found.values, expected, atol=1e-4) and found.upsampled
    assert extractor.facts["model"] == SMALL_DINO and not extractor.comparable_to_published


def test_fid_features_are_those_of_torch_fidelity():
    """Native 299-px images, so that resizing plays no part."""
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    path = weights.find(weights.INCEPTION)
    if path is None:
        pytest.skip(weights.missing_message(weights.INCEPTION))
    images = noise(2, 299, 299)
    theirs = fidelity.create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(path)
    )
    assert torch.allclose(fid().extract(images), theirs(images)[0], rtol=1e-4, atol=1e-4)
