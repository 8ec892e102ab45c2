"""Height and width of a run and of sampling: one of several sizes a step, by key; what cannot be is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dmd_dar import config, load_pipeline, losses
from dmd_dar.data.shards import MANIFEST
from dmd_dar.distillation import identity, method, networks
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.methods.sizes import Sizes
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import sin_cos_positions
from dmd_dar.models.sizes import Limits, shape_at
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.pairs import PairsConfig, make_pairs
from dmd_dar.plan import largest_of
from dmd_dar.sample import SampleConfig, sample
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.models.tiny_pipelines import tiny_pipeline
from tests.test_words import encoded, tiny_sd3
from tests.tiny import tiny_sit

PHOTOS = "teachers/photos32"
RUNGS = (1.0, 0.6)
FEW = "steps=2 batch_size=4 rungs=[1.0,0.6] fake_score.updates=2 regression.weight=0 preflight=false log.every=1"
FEW += " log.wandb=disabled launch.cpu=true log.health_samples=4 student.routing.query=timestep"


def configured(*more: str) -> DistillConfig:
    return config.load(DistillConfig, ["out_dir=unused", *FEW.split(), *more])


def method_of(cfg: DistillConfig):
    inputs = identity.open_inputs(cfg, torch.device("cpu"))
    three = networks.networks_of(cfg, inputs.teacher.network)
    return method.build_method(cfg, inputs, three, Runtime(LaunchConfig(cpu=True))), three


def draws_at(step: int, phase: str = "student", start: int = 0, stop: int = 4) -> Draws:
    return Draws(0, phase, step, sample_range(start, stop))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sizes")
    (root / "own.txt").write_text("a red cat\ndogs\n")
    encoded(root / "own.txt", tiny_sd3(root / "sd3"), root / "sd3_prompts", "tokens=8")
    return root / "sd3"


class Network:
    def __init__(self, shape: tuple[int, int, int], limits: Limits):
        self.shape, self.limits = shape, limits


@pytest.mark.parametrize(
    ("limits", "size", "said"),
    [
        (Limits(2), (520, 512), "height = 520: the network reads 2 x 2 cells a token and a cell is 8 x 8 pixels, so it"
         " must be a multiple of 16; the nearest are 512 and 528"),
        (Limits(2, most=40), (320, 1000), "width = 1000: .*, and at most 320; the nearest is 320"),
        (Limits(1), (512, 3), "a cell is 8 x 8 pixels, so it must be a multiple of 8; the nearest is 8"),
        (Limits(2, square=True), (512, 640), "the network knows square images alone; the nearest are 512 x 512 and"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_told_with_the_nearest_that_can(limits, size, said):
    with pytest.raises(UserError, match=said):
        shape_at(Network((4, 64, 64), limits), 8, *size)  # type: ignore[arg-type]
    assert shape_at(Network((4, 64, 64), limits), 8, 320, 320) == (4, 40, 40)  # type: ignore[arg-type]


def test_zero_is_the_network_s_own_side():
    assert shape_at(Network((4, 64, 64), Limits(2)), 8, width=256) == (4, 64, 32)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_sit_has_the_positions_of_rows_and_columns_and_puts_tokens_back():
    large = sin_cos_positions(16, 6).reshape(6, 6, 16)
    assert torch.equal(sin_cos_positions(16, 4, 6).reshape(4, 6, 16), large[:4])
    assert torch.equal(sin_cos_positions(16, 6, 4).reshape(6, 4, 16), large[:, :4])
    network = tiny_sit()
    p, x = network.config.patch, torch.randn(2, 3, 16, 24)
    tokens = F.unfold(x, p, stride=p).mT.unflatten(-1, (3, p, p)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(network._unpatchify(tokens, 16 // p, 24 // p), x)
    y, labels = network(x, torch.rand(2), torch.tensor([0, 1])), torch.tensor([0, 1])
    assert y.shape == x.shape
    # at its own size nothing is another function
    own = torch.randn(2, *network.shape)
    expected = network(own, torch.full((2,), 0.5), labels)
    network.pos_embed.data = sin_cos_positions(network.config.width, network.config.input_size // p)
    assert torch.equal(network(own, torch.full((2,), 0.5), labels), expected)


def by_hand(built, three, prediction, shape, step: int = 0):
    """The student's matching loss from fresh roll-outs, written out; its gradient by the student's parameters."""
    draws = draws_at(step)
    rung = built.rung_of(draws)
    student, teacher, fake = (velocity_of(net, prediction) for net in (three.student, three.teacher, three.fake_score))
    cond, x = draws.integers("label", built.num_classes), draws.normal("noise", *shape)
    t = torch.ones(len(x))
    with torch.no_grad():
        for following in range(1, rung + 1):
            x0 = x - built.rungs[following - 1] * student(x, t * built.rungs[following - 1], cond)
            eps = draws.normal(f"renoise_{following}", *shape)
            x = (1 - built.rungs[following]) * x0 + built.rungs[following] * eps
    x0 = x - built.rungs[rung] * student(x, t * built.rungs[rung], cond)
    eps = draws.normal("score_eps", *shape)
    times = built.renoise.quantile(draws.uniform("score_t")).float()
    spread = times[:, None, None, None]
    x_t = (1 - spread) * x0.detach() + spread * eps
    with torch.no_grad():
        real, made = x_t - spread * teacher(x_t, times, cond), x_t - spread * fake(x_t, times, cond, rung)
    return losses.dmd_loss(x0, real, made)


@pytest.mark.parametrize("kind", ["pixels", "sd3"])
def test_a_step_at_another_size_is_the_same_computation(sd3, kind):
    if kind == "pixels":
        given, shape, prediction = [f"teacher.path={PHOTOS}", "height=24", "width=40"], (3, 24, 40), "flow"
    else:
        given, shape = [f"teacher.path={sd3}", f"teacher.prompts={sd3}_prompts", "height=12", "width=16"], (4, 6, 8)
        prediction = load_teacher(TeacherConfig(str(sd3), prompts=f"{sd3}_prompts")).prediction
    built, three = method_of(configured("rollouts=fresh", *given))
    assert built.shape == shape
    for step in (0, 1, 2):
        with torch.no_grad():
            for p in three.fake_score.parameters():
                p.mul_(1.05)
        loss, metrics = built.student_loss(draws_at(step))
        expected = by_hand(built, three, prediction, shape, step)
        torch.testing.assert_close(metrics["dm"], expected.detach(), rtol=1e-4, atol=1e-6)
        parameters = [p for p in three.student.parameters() if p.requires_grad]
        ours = torch.autograd.grad(loss, parameters, allow_unused=True)
        theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
        scale = max(float(g.abs().max()) for g in theirs if g is not None)
        assert scale > 0
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale)


SIZES = "sizes=[[24,40],[32,32],[40,24]]"
SHAPES = [(3, 24, 40), (3, 32, 32), (3, 40, 24)]


@torch.no_grad()
@pytest.mark.parametrize("rollouts", ["fresh", "shared"])
def test_each_step_draws_one_size_whatever_samples_it_holds(rollouts):
    built, _ = method_of(configured(f"teacher.path={PHOTOS}", SIZES, f"rollouts={rollouts}"))
    seen = []
    for step in range(12):
        whole, part = (
            built.simulate(built.rung_of(draws), draws)[0]
            for draws in (draws_at(step), draws_at(step, start=2, stop=4))
        )
        if built.turns is not None:
            built.turns.forget()
            part = built.simulate(built.rung_of(draws_at(step)), draws_at(step, start=2, stop=4))[0]
            built.turns.forget()
        assert torch.allclose(whole[2:], part, atol=1e-5)
        seen.append(tuple(whole.shape[1:]))
    assert set(seen) == set(SHAPES)
    sizes = Sizes(tuple(SHAPES))
    with sizes.at_largest():
        assert sizes.shape(draws_at(3)) == (3, 32, 32)
    assert sizes.forced is None and len({sizes.index(draws_at(step)) for step in range(20)}) == 3


def test_regression_has_trajectories_of_each_size(tmp_path):
    more = ["regression.weight=1", "regression.count=2", "regression.solver_steps=2", f"regression.cache={tmp_path}"]
    built, _ = method_of(configured(f"teacher.path={PHOTOS}", SIZES, *more))
    held = (built.regression.trajectories, *built.regression.others)
    assert [tuple(one.ends.shape[1:]) for one in held] == SHAPES and len(list(tmp_path.glob("*.safetensors"))) == 3
    for step in range(6):
        x0, _ = built.regression.loss(built.student, built.rungs, 0, draws_at(step))
        assert tuple(x0.shape[1:]) == built.sizes.shape(draws_at(step))


def test_a_run_of_several_sizes_goes_on_bit_for_bit_and_its_student_knows_them(tmp_path):
    given = [f"teacher.path={PHOTOS}", SIZES, *FEW.split(), "steps=4", "checkpoint.every=2", "checkpoint.keep_last=4"]
    distill.main([*given, f"out_dir={tmp_path / 'whole'}"])
    distill.main([*given, f"out_dir={tmp_path / 'parts'}", "steps=2"])
    distill.main([*given, f"out_dir={tmp_path / 'parts'}"])
    whole, parts = (load_pipeline(str(tmp_path / name / "student")) for name in ("whole", "parts"))
    states = [pipe.student.network.state_dict() for pipe in (whole, parts)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert whole.trained_at == ((24, 40), (32, 32), (40, 24)) and whole.shape == (3, 24, 40)
    images = whole(n=2, seed=3)
    assert images.shape == (2, 3, 24, 40) and whole(n=2, seed=3, height=40, width=24).shape == (2, 3, 40, 24)
    sample(config.load(SampleConfig, [f"student={tmp_path / 'whole' / 'student'}", "n=2", "seed=3", "height=48",
                                      f"out={tmp_path / 'images'}", "cpu=true"]))  # fmt: skip
    facts = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert (facts["height"], facts["width"]) == (48, 40)
    from PIL import Image

    assert Image.open(tmp_path / "images" / "000001.png").size == (40, 48)
    with pytest.raises(UserError, match="width = 30: .* multiple of 4; the nearest are 28 and 32"):
        whole(n=1, width=30)


def test_a_sized_student_of_latents_samples_at_its_size(sd3, tmp_path):
    codec = load_codec(str(sd3))
    network = load_teacher(TeacherConfig(str(sd3), prompts=f"{sd3}_prompts"))
    card = ModelCard(network.prediction, RUNGS, origin={"prompts": f"{sd3}_prompts", "sizes": [[12, 16], [8, 8]]})
    save_network(tmp_path, network.network, card, codec)
    pipe = load_pipeline(str(tmp_path))
    assert pipe.shape == (4, 6, 8) and pipe.shape_at(8, 8) == (4, 4, 4)
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    image = pipe([1], noise=noise, sampler="deterministic")
    velocity, x = velocity_of(pipe.student.network, network.prediction), noise
    with torch.no_grad():
        for t, following in ((1.0, 0.6), (0.6, 0.0)):
            x = x + (following - t) * velocity(x, torch.full((1,), t), torch.tensor([1]))
        torch.testing.assert_close(image, codec.decode(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="height = 36: .*at most 32; the nearest is 32"):
        pipe([1], height=36)  # SD3 has positions for 8 x 8 tokens


def test_pairs_of_a_size_and_the_size_that_is_planned(sd3, tmp_path):
    given = [f"teacher.path={sd3}", f"teacher.prompts={sd3}_prompts", "n=2", "rungs=[1.0,0.6]", "solver_steps=2"]
    make_pairs(config.load(PairsConfig, [*given, f"out={tmp_path}", "height=8", "width=16", "cpu=true"]))
    assert json.loads((tmp_path / MANIFEST).read_text())["content"]["shape"] == [4, 4, 8]
    more = [f"teacher.path={sd3}", f"teacher.prompts={sd3}_prompts"]
    teacher = load_teacher(TeacherConfig(str(sd3), prompts=f"{sd3}_prompts")).network
    assert largest_of(configured(*more, "height=8"), teacher) == (4, 4, 8)
    assert largest_of(configured(*more, "sizes=[[8,8],[16,24],[16,16]]"), teacher) == (4, 8, 12)
    with pytest.raises(UserError, match=r"shape: \[4, 4, 8\] -> \[4, 8, 8\]"):
        built = configured(*more, f"regression.pairs={tmp_path}", "regression.weight=1", "regression.solver_steps=2")
        method_of(built)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["sizes=[[24,40]]", "height=24"], "sizes and height or width both say"),
        (["sizes=[[24,40],[24,40]]"], "must name each size once"),
        ([SIZES, "gan.weight=0.1"], "needs real data, which have one size"),
        ([SIZES, "regression.pairs=.", "regression.weight=1"], "a folder of pairs is of one size"),
        (
            ["sizes=[[24,42]]"],
            "sizes: width = 42: the network reads 4 x 4 cells a token, so it must be a multiple of 4",
        ),
        (["height=24", "gan.weight=0.1"], "needs real data like the teacher's"),
    ],
)
def test_sizes_that_contradict_are_one_line(tmp_path, capsys, more, said):
    with pytest.raises(SystemExit) as stop:
        distill.main([f"teacher.path={PHOTOS}", *FEW.split(), f"out_dir={tmp_path / 'run'}", *more])
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_dit_knows_square_images_alone(tmp_path):
    network = load_teacher(TeacherConfig(str(tiny_pipeline(tmp_path)))).network
    assert shape_at(network, 2, 24, 24) == (4, 12, 12)
    with torch.no_grad():
        assert network(torch.randn(1, 4, 12, 12), torch.tensor([9.0]), torch.tensor([1])).shape == (1, 8, 12, 12)
    with pytest.raises(UserError, match="knows square images alone"):
        shape_at(network, 2, 24, 16)
