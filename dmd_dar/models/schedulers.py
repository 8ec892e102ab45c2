"""The scheduler beside a network, in diffusers' words: its chain and a student's rungs, written and read.

No class of diffusers keeps a list of timesteps in its configuration. So the rungs stand under names of their own,
which diffusers hands through as `scheduler.config.rungs` and `.rung_timesteps`, for `set_timesteps(sigmas=...)` and
`set_timesteps(timesteps=...)`.
"""

from typing import Any, Literal

import torch

from dmd_dar.flow import Schedule
from dmd_dar.models.denoiser import Meaning

PREDICTED = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def scheduler_config(
    meaning: Meaning, rungs: tuple[float, ...] = (), sampler: Literal["stochastic", "deterministic"] = "stochastic"
) -> dict[str, Any]:
    """scheduler_config.json of a network of that meaning.

    A flow student has the Euler scheduler, which with `stochastic_sampling` and sigmas = rungs re-noises as
    `rollout.sample` does. A student of a chain of discrete steps has LCMScheduler, which re-noises too, but knows whole
    timesteps only; its one original step makes it refuse to choose several timesteps by itself.
    """
    if meaning.schedule is None:
        steps = int(meaning.time_scale) if meaning.time_scale > 1 else 1000
        euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": steps, "shift": 1.0}
        few = {"stochastic_sampling": sampler == "stochastic", "rungs": list(rungs)}
        return {**euler, **few} if rungs else euler
    chain = meaning.schedule
    shape = {"num_train_timesteps": chain.steps, "beta_schedule": BETAS[chain.betas]}
    shape |= {"beta_start": chain.start, "beta_end": chain.end, "clip_sample": False}
    shape["prediction_type"] = PREDICTED[meaning.predicts]
    if not rungs:
        return {"_class_name": "DDIMScheduler", **shape, "set_alpha_to_one": False}
    timesteps = chain.timestep(torch.tensor(rungs, dtype=torch.float64)).round().long().tolist()
    few = {"original_inference_steps": 1, "rungs": list(rungs), "rung_timesteps": timesteps}
    return {"_class_name": "LCMScheduler", **shape, **few}


def meaning_of_scheduler(scheduler: dict[str, Any]) -> Meaning:
    """How the network is asked, by diffusers' scheduler_config.json. Raises ValueError for what is not known here."""
    name, steps = str(scheduler.get("_class_name", "")), int(scheduler.get("num_train_timesteps", 1000))
    kind, shape = scheduler.get("prediction_type", "epsilon"), scheduler.get("beta_schedule", "linear")
    if name.startswith("FlowMatch") or kind == PREDICTED["flow"]:
        return Meaning("flow", time_scale=float(steps))
    predicted, betas = ({theirs: ours for ours, theirs in words.items()} for words in (PREDICTED, BETAS))
    if kind not in predicted or shape not in betas:
        raise ValueError(f"prediction_type {kind!r} with beta_schedule {shape!r} is not known")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("trained_betas and rescale_betas_zero_snr are not known")
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    return Meaning(predicted[kind], Schedule(betas[shape], steps, float(start), float(end)))  # type: ignore[arg-type]
