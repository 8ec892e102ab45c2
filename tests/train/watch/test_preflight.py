"""A teacher that fits its data passes; every wrong reading of it is refused, and the right one named with numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmd_dar import flow
from dmd_dar.data.config import DataConfig
from dmd_dar.data.sources import open_data
from dmd_dar.models.denoiser import Meaning
from dmd_dar.models.sit import SiTConfig
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.train.watch.preflight import PreflightError, check_data, check_teacher
from tests.tiny import tiny_sit

CHAIN = flow.Schedule()
SIZE = 8


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig("teachers/photos32"))


@pytest.fixture(scope="module")
def photos():
    return open_data(DataConfig())


class Planes:
    """Images of one colour each, N(0, 1/4) in every channel."""

    shape, num_classes, device = (3, SIZE, SIZE), 7, torch.device("cpu")
    label_names = tuple("abcdefg")

    def batch(self, draws):
        colours = 0.5 * draws.normal("colour", 3)
        return colours[:, :, None, None].expand(-1, -1, SIZE, SIZE), draws.integers("label", 7)


class OfPlanes(nn.Module):
    """Their exact denoiser, the mean over the image, as a network of the given form."""

    shape, num_conditions, prompts = (3, SIZE, SIZE), 7, None

    def __init__(self, form: str):
        super().__init__()
        self.form = form

    def velocity(self, x_t, t):
        t = flow.expand_t(t, x_t)
        mean = x_t.mean((2, 3), keepdim=True)
        x0 = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2 / SIZE**2) * mean
        return (x_t - x0) / t.clamp(min=1e-3)

    def forward(self, x, time, cond):
        if self.form == "flow":
            return self.velocity(x, time)
        if self.form == "reversed":
            return -self.velocity(x, 1 - time)
        if self.form == "thousand":
            return self.velocity(x, time / 1000)
        if self.form == "linear eps":
            return x + (1 - flow.expand_t(time, x)) * self.velocity(x, time)
        t = CHAIN.level(time.double()).float()
        x = x * flow.expand_t(torch.hypot(1 - t, t), x)
        return x + (1 - flow.expand_t(t, x)) * self.velocity(x, t)


class Scaled:
    """Data times a factor, as latents whose scale is missing."""

    def __init__(self, data, factor: float):
        self.data, self.factor = data, factor

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, draws):
        x0, labels = self.data.batch(draws)
        return self.factor * x0, labels


def test_the_shipped_teacher_passes_with_its_numbers_and_always_the_same(teacher, photos):
    told = check_teacher(teacher, photos)
    assert told == check_teacher(teacher, photos)
    assert told == "preflight: the teacher's error is 0.035, 0.098, 0.25 of a constant's at t = 0.25, 0.5, 0.75"


def test_a_sound_teacher_costs_three_forwards(teacher, photos):
    calls = []
    teacher.network.register_forward_hook(lambda *given: calls.append(1))
    check_teacher(teacher, photos)
    teacher.network._forward_hooks.clear()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("form", "right", "wrong", "named"),
    [
        ("flow", "flow", "sit", "teacher.prediction=flow"),
        ("flow", "flow", "dit", "teacher.prediction=flow"),
        ("reversed", "sit", "flow", "teacher.prediction=sit"),
        ("reversed", "sit", "dit", "teacher.prediction=sit"),
        ("eps", "dit", "flow", "teacher.prediction=dit"),
        ("eps", "dit", "sit", "teacher.prediction=dit"),
        ("linear eps", Meaning("eps"), "flow", "an eps of the linear flow"),  # below a constant's error at every t
        ("thousand", Meaning(time_scale=1000.0), "flow", "timesteps run to 1000"),
    ],
)
def test_a_wrong_reading_is_refused_and_the_right_one_named(form, right, wrong, named):
    teacher = Teacher(OfPlanes(form), right, "digest")  # type: ignore[arg-type]
    sound = check_teacher(teacher, Planes())  # type: ignore[arg-type]
    errors = sound.split("error is ")[1].split(" of")[0]
    assert all(float(error) < 0.5 for error in errors.split(", "))
    with pytest.raises(PreflightError, match="does not denoise its own data") as told:
        check_teacher(replace(teacher, prediction=wrong), Planes())  # type: ignore[arg-type]
    line = str(told.value)
    assert f"{named}, it fits" in line and f"then {errors}" in line and "preflight=false" in line and "\n" not in line


@pytest.mark.parametrize(("factor", "named"), [(1 / 0.18215, "0.182"), (0.13025, "7.68")])
def test_a_missing_latent_scale_is_named(teacher, photos, factor, named):
    with pytest.raises(PreflightError, match=f"on data times {named} it fits"):
        check_teacher(teacher, Scaled(photos, factor))


@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_other_contrasts_are_no_wrong_scale(teacher, photos, factor):
    assert check_teacher(teacher, Scaled(photos, factor)).startswith("preflight: the teacher's error")


def test_an_untrained_teacher_is_refused_without_a_guess(teacher, photos):
    with pytest.raises(PreflightError, match="no other reading fits.*is it trained at all; preflight=false"):
        check_teacher(replace(teacher, network=tiny_sit()), photos)


def test_data_that_cannot_be_the_teachers_is_said_to_be_left_out(teacher, photos):
    textures = open_data(DataConfig("textures"))
    assert "preflight left out: data has" in check_teacher(teacher, textures)
    larger = replace(teacher, network=tiny_sit(SiTConfig(64, 3, 8, 16, 2, 2, num_classes=7)))
    assert check_teacher(larger, photos) == (
        "preflight left out: data is (3, 32, 32), and the teacher makes (3, 64, 64)"
    )


@pytest.mark.parametrize(
    ("x0", "said"),
    [
        (torch.full((4, 3, 8, 8), 0.5), "all values of 4 samples are 0.5"),
        (torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1), "4 samples are all alike"),
        (torch.full((4, 3, 8, 8), torch.nan), "not finite"),
    ],
)
def test_data_without_variance_is_refused(x0, said):
    with pytest.raises(PreflightError, match=said):
        check_data(x0)


def test_two_different_samples_are_data():
    check_data(torch.randn(2, 3, 8, 8))
