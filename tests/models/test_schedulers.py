"""The scheduler of a network is written in diffusers' words, and read back to the same meaning."""

import dataclasses
import json

import pytest
import torch

from dmd_dar import flow
from dmd_dar.models.denoiser import MEANINGS, Meaning, meaning_from_dict
from dmd_dar.models.schedulers import meaning_of_scheduler, scheduler_config


def test_the_schedulers_of_flow_and_chain():
    flowing = scheduler_config(MEANINGS["flow"], (1.0, 0.5))
    assert flowing["_class_name"] == "FlowMatchEulerDiscreteScheduler" and flowing["stochastic_sampling"] is True
    assert scheduler_config(MEANINGS["flow"], (1.0, 0.5), "deterministic")["stochastic_sampling"] is False
    assert "rungs" not in scheduler_config(MEANINGS["flow"])
    chain = scheduler_config(MEANINGS["dit"], (1.0, 0.5))
    assert chain["_class_name"] == "LCMScheduler" and chain["rung_timesteps"][0] == 999
    level = MEANINGS["dit"].schedule.level(torch.tensor([float(chain["rung_timesteps"][1])]))
    assert abs(level.item() - 0.5) < 2e-3  # half of a step of the chain
    assert scheduler_config(MEANINGS["dit"])["_class_name"] == "DDIMScheduler"


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
    "wrong", [{"prediction_type": "score"}, {"beta_schedule": "exp"}, {"rescale_betas_zero_snr": True}]
)
def test_an_unknown_scheduler_is_refused(wrong):
    with pytest.raises(ValueError, match="not known"):
        meaning_of_scheduler(wrong)


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
