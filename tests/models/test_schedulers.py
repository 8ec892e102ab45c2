"""The scheduler of a network is written in diffusers' words, and read back to the same meaning."""

import dataclasses
import json

import diffusers
import pytest
import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.models.denoiser import MEANINGS, Meaning, meaning_from_dict, velocity_of
from dmd_dar.models.schedulers import CHAINS, FLOWS, faults_of, meaning_of_scheduler, scheduler_config, student_config

THOUSAND = Meaning("flow", time_scale=1000.0)
EVERY = [getattr(diffusers, name, None) for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
EVERY = [kind for kind in EVERY if type(kind) is type]  # without those whose libraries are not installed


def test_the_schedulers_of_flow_and_chain():
    flowing = scheduler_config(THOUSAND, (1.0, 0.5))
    assert flowing["_class_name"] == "FlowMatchLCMScheduler" and "trained_at" not in scheduler_config(THOUSAND)
    chain = scheduler_config(MEANINGS["dit"], (1.0, 0.5))
    assert chain["_class_name"] == "LCMScheduler" and chain["rung_timesteps"][0] == 999
    level = MEANINGS["dit"].schedule.level(torch.tensor([float(chain["rung_timesteps"][1])]))
    assert abs(level.item() - 0.5) < 2e-3  # half of a step of the chain
    assert scheduler_config(MEANINGS["dit"])["_class_name"] == "DDIMScheduler"


RUNGS = [flow.default_rungs(k, shift) for k in (1, 2, 3, 4, 6, 8, 16) for shift in (0.5, 1.0, 3.0, 7.0)]


@pytest.mark.parametrize("rungs", [*RUNGS, (1.0, 0.8, 0.4), (1.0, 0.1, 0.05)])
def test_diffusers_own_grid_of_a_flow_student_is_its_rungs(rungs):
    config = json.loads(json.dumps(scheduler_config(THOUSAND, rungs)))
    scheduler = diffusers.FlowMatchLCMScheduler.from_config(config)
    scheduler.set_timesteps(len(rungs))
    assert scheduler.sigmas.tolist() == pytest.approx([*rungs, 0.0], abs=1.1e-5)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in rungs], abs=0.011)


@pytest.mark.parametrize(
    ("meaning", "rungs", "sampler"),
    [
        (THOUSAND, (1.0, 0.9, 0.5, 0.4), "stochastic"),  # on no curve
        (THOUSAND, (1.0, 0.75), "deterministic"),  # Euler's scheduler cannot refuse other numbers of steps
        (Meaning("flow", None, 1000.0, True), (1.0, 0.75), "stochastic"),  # time from noise to data
    ],
)
def test_what_no_scheduler_samples_cannot_be_loaded_as_one(tmp_path, meaning, rungs, sampler):
    config = scheduler_config(meaning, rungs, sampler)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="use dmd_dar.load_pipeline"):
        getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    for kind in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchLCMScheduler):
        with pytest.raises(ValueError, match="time_shift_type"):
            kind.from_pretrained(tmp_path)
    assert meaning_of_scheduler(config) == meaning


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize("rungs", [(1.0,), (1.0, 0.5), (1.0, 0.75, 0.5)])
def test_a_chain_takes_its_rungs_by_hand_where_it_renoises(rungs, sampler):
    config = json.loads(json.dumps(scheduler_config(MEANINGS["dit"], rungs, sampler)))
    scheduler = diffusers.LCMScheduler.from_config(config)
    for steps in {1, 2, 3, 4} - ({1} if len(rungs) == 1 else set()):
        with pytest.raises(ValueError, match="original"):
            scheduler.set_timesteps(steps)
    if len(rungs) == 1:
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [999]
    elif sampler == "stochastic":
        scheduler.set_timesteps(timesteps=scheduler.config.rung_timesteps)
        assert scheduler.timesteps.tolist() == config["rung_timesteps"] and len(config["rung_timesteps"]) == len(rungs)
    else:
        with pytest.raises(ValueError, match="original_steps"):
            scheduler.set_timesteps(timesteps=scheduler.config.rung_timesteps)


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize("meaning", [MEANINGS["flow"], MEANINGS["sit"], MEANINGS["dit"], THOUSAND])
def test_a_scheduler_of_before_is_still_its_network_s(meaning, sampler):
    rungs, other = (1.0, 0.9, 0.75, 0.5), (1.0, 0.9, 0.75, 0.4)
    before = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    before |= {"stochastic_sampling": sampler == "stochastic", "rungs": list(rungs)}
    if meaning.schedule is not None:
        before = {**scheduler_config(meaning, rungs, sampler), "original_inference_steps": 1}
    for said in (before, scheduler_config(meaning, rungs, sampler)):
        said = json.loads(json.dumps(said))
        assert not faults_of(said, meaning, rungs, sampler) and faults_of(said, meaning, other, sampler)
    assert not faults_of(json.loads(json.dumps(scheduler_config(meaning))), meaning, (), sampler)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_scheduler_of_diffusers_is_read_right_or_refused_by_name(kind, tmp_path):
    """Those read, with the defaults of their class: the levels are those of diffusers' own products of alphas."""
    if kind.__name__ not in FLOWS + CHAINS:
        with pytest.raises(ValueError, match=f"{kind.__name__} is not known"):
            meaning_of_scheduler({"_class_name": kind.__name__, "prediction_type": "epsilon"})
        return
    scheduler = kind()
    scheduler.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "scheduler_config.json").read_text())
    for said in (whole, {"_class_name": kind.__name__}):
        meaning = meaning_of_scheduler(said)
        if kind.__name__ in FLOWS:
            assert meaning == THOUSAND
            continue
        levels = meaning.schedule.level(torch.arange(1000))
        ratio = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
        torch.testing.assert_close(levels, ratio / (1 + ratio), rtol=1e-4, atol=1e-5)
        assert meaning.predicts == "eps"


X0, EPS = (torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_inverted_sigmas_are_time_from_noise_to_data(kind):
    """Of a network that knows x0 and eps, diffusers' Euler steps end at x0, and our velocity is the true one."""
    scheduler = getattr(diffusers, kind)(shift=2.0, invert_sigmas=True)
    scheduler.set_timesteps(4)
    meaning = meaning_of_scheduler({"_class_name": kind, **scheduler.config})
    asked = []

    def network(x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        asked.append(time)
        return X0 - EPS

    if kind == "FlowMatchEulerDiscreteScheduler":
        x = EPS
        for time in scheduler.timesteps:
            x = scheduler.step(network(x, time, torch.zeros(1)), time, x).prev_sample
        torch.testing.assert_close(x, X0, rtol=1e-5, atol=1e-5)
    t = 1 - scheduler.sigmas[:-1]
    for of, time in zip(t, scheduler.timesteps, strict=True):
        x_t = (1 - of) * X0 + of * EPS
        v = velocity_of(network, meaning)(x_t, of.reshape(1), torch.zeros(1))
        torch.testing.assert_close(v, EPS - X0)
        torch.testing.assert_close(asked[-1], time.reshape(1), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("predicted", ["flow_prediction", "epsilon", "sample"])
def test_flow_sigmas_are_the_linear_flow_whatever_is_predicted(kind, predicted):
    given = {"use_flow_sigmas": True, "prediction_type": predicted, "flow_shift": 3.0}
    scheduler = getattr(diffusers, kind)(**given)
    scheduler.set_timesteps(5)
    scheduler._init_step_index(scheduler.timesteps[2])
    t, answer = scheduler.sigmas[2], torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    x_t = (1 - t) * X0 + t * EPS
    theirs = scheduler.convert_model_output(answer, sample=x_t)  # x0, but eps of a DEIS
    meaning, asked = meaning_of_scheduler({"_class_name": kind, **given}), []
    v = velocity_of(lambda x, time, cond: (asked.append(time), answer)[1], meaning)(x_t, t.reshape(1), torch.zeros(1))
    x0 = x_t - t * v
    if kind == "DEISMultistepScheduler":
        theirs = (x_t - t * theirs) / (1 - t)
    torch.testing.assert_close(x0, theirs, rtol=1e-4, atol=1e-4)
    assert abs(asked[0].item() - scheduler.timesteps[2].item()) <= 1  # it rounds down to whole ones


@pytest.mark.parametrize(
    ("scheduler", "meaning"),
    [
        ({"beta_start": 1e-4, "beta_end": 0.02}, MEANINGS["dit"]),
        (
            {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
            Meaning("v", flow.Schedule("cosine")),
        ),
        ({"prediction_type": "sample", "num_train_timesteps": 50}, Meaning("x0", flow.Schedule(steps=50))),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            Meaning("eps", flow.Schedule("scaled_linear", 1000, 0.00085, 0.012)),
        ),
        (
            dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000),
            Meaning("flow", time_scale=1000.0),
        ),
    ],
)
def test_a_scheduler_says_how_its_network_is_asked(scheduler, meaning):
    assert meaning_of_scheduler(scheduler) == meaning
    assert meaning_from_dict(json.loads(json.dumps(dataclasses.asdict(meaning)))) == meaning


@pytest.mark.parametrize(
    "wrong",
    [
        {"prediction_type": "score"},
        {"prediction_type": "flow_prediction"},  # of a chain
        {"beta_schedule": "exp"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "v_prediction"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "SCMScheduler", "prediction_type": "trigflow"},
        {"_class_name": "FlowMapEulerDiscreteScheduler"},
        {"_class_name": "os.system"},
    ],
)
def test_an_unknown_scheduler_is_refused(wrong):
    with pytest.raises(ValueError, match="not known"):
        meaning_of_scheduler(wrong)


def test_what_another_machine_rounds_otherwise_is_the_same_student_s():
    meaning, rungs = Meaning("x0", MEANINGS["dit"].schedule), (1.0, 0.9)
    saved = student_config(meaning, rungs, "stochastic")
    for residue, faults in ((-2e-16, set()), (1e-4, {"x0_from"})):  # x0 is the output alone
        saved["x0_from"][1][0] = residue
        assert set(faults_of(saved, meaning, rungs, "stochastic")) == faults


@pytest.mark.parametrize("rungs", [(), (1.0, 0.5)])
@pytest.mark.parametrize(
    "meaning",
    [
        MEANINGS["dit"],
        Meaning("v", flow.Schedule("cosine")),
        Meaning("x0", flow.Schedule("scaled_linear", 50, 0.00085, 0.012)),
        Meaning("flow", time_scale=1000.0),
    ],
)
def test_what_is_written_is_read_back(meaning, rungs):
    assert meaning_of_scheduler(json.loads(json.dumps(scheduler_config(meaning, rungs)))) == meaning
