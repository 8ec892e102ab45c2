"""LPIPS with random trunk weights: the weights given are the weights used, and nothing is downloaded."""

import hashlib

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import alexnet

from dmd_dar.errors import DamagedFileError
from dmd_dar.models import perceptual
from dmd_dar.models.perceptual import TRUNK, lpips_loss, lpips_network, trunk_path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # the lpips package's way to call it


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: value for name, value in alexnet(weights=None).state_dict().items() if name.startswith("features.")}


@pytest.fixture
def loss(trunk, tmp_path, monkeypatch):
    torch.save(trunk, tmp_path / TRUNK)
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path))
    digest = hashlib.sha256((tmp_path / TRUNK).read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "TRUNK_HASH", digest[:8])
    return lpips_loss("cpu")


def images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = 2 * torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(1)) - 1
    return x, y


def features(trunk: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """AlexNet's five activations, each normalised over its channels."""
    x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    found = []
    for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if index in (3, 6):
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"], stride, padding).relu()
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


@torch.no_grad()
def test_the_metric_is_lpips_over_the_given_trunk(trunk):
    metric = lpips_network(trunk)
    x, y = images(64)
    expected = 0.0
    for level, (a, b) in enumerate(zip(features(trunk, x), features(trunk, y), strict=True)):
        weight = metric.state_dict()[f"lin{level}.model.1.weight"]  # (1, channels, 1, 1)
        expected = expected + ((a - b).square() * weight).sum(1).mean((1, 2))
    assert torch.allclose(metric(x, y).flatten(), expected, rtol=1e-4) and expected.min() > 0
    assert not metric.training and not any(p.requires_grad for p in metric.parameters())


@pytest.mark.parametrize("size", [32, 64])
def test_the_loss_is_zero_at_equality_and_its_gradient_leads_there(loss, size):
    x, y = images(size)
    assert loss(x, x.clone()).item() == 0
    student = y.clone().requires_grad_()
    before = loss(student, x)
    before.backward()
    assert before.dim() == 0 and before > 0 and student.grad.abs().amax((1, 2, 3)).min() > 0
    step = 0.01 * student.grad / student.grad.norm()
    assert loss(y - step, x) < before < loss(y + step, x)


def test_bfloat16_and_values_out_of_range_are_taken(loss):
    x, y = images(64)
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert torch.equal(loss(x, 3 * y), loss(x, (3 * y).clamp(-1, 1)))
    overshoot = (3 * x).requires_grad_()
    loss(overshoot, y).backward()
    assert overshoot.grad[overshoot.abs() > 1].any()


def test_missing_weights_name_the_file_both_folders_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(FileNotFoundError) as error:
        lpips_loss("cpu")
    said = str(error.value)
    folders = [str(tmp_path / name) for name in ("mine", "torch")]
    assert all(part in said for part in (TRUNK, *folders, "DMD_DAR_WEIGHTS_DIR", "regression.metric=mse"))


def test_weights_of_another_hash_are_refused(trunk, tmp_path, monkeypatch):
    torch.save(trunk, tmp_path / TRUNK)
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(DamagedFileError, match=rf"{TRUNK}: sha256 .*, not 7be5be79\.\.\.; delete it"):
        lpips_loss("cpu")


def test_the_named_folder_comes_before_the_hub_s_cache(tmp_path, monkeypatch):
    for folder in (tmp_path / "mine", tmp_path / "torch" / "hub" / "checkpoints"):
        folder.mkdir(parents=True)
        (folder / TRUNK).touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DMD_DAR_WEIGHTS_DIR", raising=False)
    assert trunk_path() == tmp_path / "torch" / "hub" / "checkpoints" / TRUNK
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path / "mine"))
    assert trunk_path() == tmp_path / "mine" / TRUNK
