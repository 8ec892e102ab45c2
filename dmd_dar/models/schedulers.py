"""The scheduler beside a network, in diffusers' words: its chain and a student's rungs, written and read.

No class of diffusers keeps a list of timesteps in its configuration. A flow student's rungs are written as that curve
of FlowMatchLCMScheduler which passes through them, where one does; those of a chain of whole timesteps have to be
handed over. What diffusers would sample at other rungs, or by another sampler, it is made to refuse.
The rungs also stand under names of their own: `scheduler.config.trained_at`; `.rungs` and `.rung_timesteps` of a chain.
Beside the other parts of its base's pipeline a student has a scheduler of ours, `StudentScheduler`.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.flow import Sampler, Schedule, shift_time
from dmd_dar.models.denoiser import Meaning, velocity_of
from dmd_dar.models.families.form import Unguided
from dmd_dar.models.pipeline_folder import SCHEDULER

PREDICTED = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# diffusers' classes whose configuration says how a network is asked: on the linear flow, or on a chain of betas.
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
CHAINS = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler")
CHAINS += ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "PNDMScheduler")
CHAINS += ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler")
CHAINS += ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler")
CHAINS += ("TCDScheduler", "UniPCMultistepScheduler")
# Where diffusers' own schedulers look, and which they then quote: they would sample elsewhere without a word.
REFUSED_BY_OTHERS = "only dmd_dar.StudentScheduler samples at this student's rungs; this one"
REFUSED = "no scheduler of diffusers samples at this student's rungs: use dmd_dar.load_pipeline; this one"
CLOSE = 1e-5  # how far a curve may pass a rung by; a hundredth of one of a thousand timesteps


def scheduler_config(
    meaning: Meaning, rungs: tuple[float, ...] = (), sampler: Sampler = "stochastic"
) -> dict[str, Any]:
    """scheduler_config.json of a network of that meaning, of a student with `rungs` and of a teacher without."""
    if meaning.schedule is not None:
        return _chain(meaning, meaning.schedule, rungs, sampler)
    steps = int(meaning.time_scale) if meaning.time_scale > 1 else 1000
    euler: dict[str, Any] = {"_class_name": FLOWS[0], "num_train_timesteps": steps, "shift": 1.0}
    if meaning.reversed:
        euler["invert_sigmas"] = True
    if not rungs:
        return euler
    # Not named "rungs", as before: sigmas that a user hands over are shifted once more, so it must not be those.
    keys = {**euler, "stochastic_sampling": sampler == "stochastic", "trained_at": list(rungs)}
    curve = None if meaning.reversed or (sampler != "stochastic" and len(rungs) > 1) else _curve(rungs, steps)
    if curve is None:  # the flow classes fail at the last key, the others at beta_schedule, which they quote
        keys |= {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": PREDICTED["flow"]}
        return {**keys, "use_flow_sigmas": True, "beta_schedule": REFUSED, "time_shift_type": REFUSED}
    # A factor for each step but the last, so that another number of steps fails; FluxPipeline would pass a grid of its
    # own but for use_flow_sigmas.
    same_size = {"scale_factors": [1.0] * (len(rungs) - 1), "upscale_mode": "nearest", "use_flow_sigmas": True}
    return {**keys, "_class_name": "FlowMatchLCMScheduler", **same_size, **curve}


def student_config(
    meaning: Meaning, rungs: tuple[float, ...], sampler: Sampler, unguided: Unguided | None = None
) -> dict[str, Any]:
    """scheduler_config.json of a `StudentScheduler`: what velocity_of makes of the network's output, as numbers."""
    each = [_at_rung(meaning, t) for t in rungs]
    call = {} if unguided is None else {"call": {unguided.argument: unguided.value}, "embedded": unguided.embedded}
    steps = 1000 if meaning.schedule is None else meaning.schedule.steps
    return {
        "_class_name": SCHEDULER,
        "rungs": list(rungs),
        "timesteps": [time for time, _, _ in each],
        "x0_from": [x0_from for _, x0_from, _ in each],
        "noised": [[(1 - t) / scale, t / scale] for t, (_, _, scale) in zip(rungs, each, strict=True)],
        "sampler": sampler,
        **call,
        "num_train_timesteps": steps,
        "beta_schedule": REFUSED_BY_OTHERS,
        "time_shift_type": REFUSED_BY_OTHERS,
    }


def _at_rung(meaning: Meaning, t: float) -> tuple[float, list[float], float]:
    """(the network's time, [a, b] of x0 = a x + b y, x_t / x) of the network's input x and its output y at t."""
    time, asked = torch.full((1,), t), list[tuple[Tensor, Tensor]]()  # float32, as the rungs of a rollout are

    def x0_at(x_t: float, y: float) -> float:
        def network(x: Tensor, own_time: Tensor, cond: Tensor) -> Tensor:
            asked.append((x, own_time))
            return torch.full_like(x, y)

        state = torch.full((1, 1), x_t, dtype=torch.float64)
        v = velocity_of(network, meaning)(state, time, torch.zeros(1))
        return flow.velocity_to_x0(v, state, time.double()).item()

    a, b = x0_at(1.0, 0.0), x0_at(0.0, 1.0)
    scale = 1 / asked[0][0].item()
    return asked[0][1].item(), [a * scale, b], scale


def _curve(rungs: tuple[float, ...], steps: int) -> dict[str, Any] | None:
    """The keys with which FlowMatchLCMScheduler's grid of len(rungs) points falls on the rungs; None if none do.

    The grid is even from 1 to s_min, shifted by s (flow.shift_time) and stretched linearly to end at the last rung;
    s_min is 1 / steps, shifted likewise. One rung: all of the grid stands at 1.
    """
    if len(rungs) == 1:
        return {"use_exponential_sigmas": True, "sigma_min": 1.0, "sigma_max": 1.0}
    wanted = torch.tensor(rungs, dtype=torch.float64)

    def grid(shift: float) -> torch.Tensor:
        last = shift_time(torch.tensor(1 / steps, dtype=torch.float64), shift).item()
        fall = 1 - shift_time(torch.linspace(1, last, len(rungs), dtype=torch.float64), shift)
        return 1 - fall * (1 - rungs[-1]) / fall[-1]

    low, high = -10.0, 10.0  # of log s; every point but the ends rises with s
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if grid(math.exp(middle))[1] > wanted[1] else (middle, high)
    for shift in (1.0, math.exp(low)):  # without a shift, rungs that are handed over stay themselves
        if (grid(shift) - wanted).abs().max() <= CLOSE:
            return {"shift": shift, "shift_terminal": rungs[-1]}
    return None


def _chain(meaning: Meaning, chain: Schedule, rungs: tuple[float, ...], sampler: Sampler) -> dict[str, Any]:
    """LCMScheduler for a student, which re-noises as `rollout.Rollout` does, at whole timesteps.

    It chooses one timestep, the last, by itself, and only where that is the rung: its number of original steps makes it
    refuse to choose, and for a student that does not re-noise to sample at all.
    """
    shape: dict[str, Any] = {"num_train_timesteps": chain.steps, "beta_schedule": BETAS[chain.betas]}
    shape |= {"beta_start": chain.start, "beta_end": chain.end, "clip_sample": False}
    shape["prediction_type"] = PREDICTED[meaning.predicts]
    if not rungs:
        return {"_class_name": "DDIMScheduler", **shape, "set_alpha_to_one": False}
    timesteps = chain.timestep(torch.tensor(rungs, dtype=torch.float64)).round().long().tolist()
    original = 1 if len(rungs) == 1 else -1 if sampler == "stochastic" else chain.steps + 1
    few = {"original_inference_steps": original, "rungs": list(rungs), "rung_timesteps": timesteps}
    return {"_class_name": "LCMScheduler", **shape, **few}


def faults_of(
    scheduler: dict[str, Any], meaning: Meaning, rungs: tuple[float, ...], sampler: Sampler
) -> dict[str, tuple[Any, Any]]:
    """(value, expected value) of each key of a saved scheduler that is none of this network's; empty for its own.

    What earlier versions wrote, which diffusers sampled at rungs of its choice, is the network's own too.
    """
    if scheduler.get("_class_name") == SCHEDULER and rungs:
        own = student_config(meaning, rungs, sampler)
        return {
            name: (scheduler.get(name), value) for name, value in own.items() if not _same(scheduler.get(name), value)
        }
    today = scheduler_config(meaning, rungs, sampler)
    if meaning.schedule is None:
        before = {"_class_name": FLOWS[0], "num_train_timesteps": today["num_train_timesteps"], "shift": 1.0}
        before |= {"stochastic_sampling": sampler == "stochastic", "rungs": list(rungs)} if rungs else {}
    else:
        before = {**today, "original_inference_steps": 1} if rungs else today
    forms = [{name: (scheduler.get(name), value) for name, value in form.items()} for form in (today, before)]
    faults = [{name: pair for name, pair in form.items() if not _same(*pair)} for form in forms]
    return min(faults, key=len)


def _same(value: Any, expected: Any) -> bool:
    """Up to the rounding of another machine, of what was computed there; also where all but that cancels."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-12)
    return value == expected


def meaning_of_scheduler(scheduler: dict[str, Any]) -> Meaning:
    """How the network is asked, by diffusers' scheduler_config.json, whose missing keys have its class's defaults.

    Raises ValueError, naming the class or the key, for what is not known here. Keys that decide only where a sampler
    asks (spacing, shifts, Karras' and other sigmas, clipping) are not looked at.
    """
    name = str(scheduler.get("_class_name", "DDIMScheduler"))
    if name not in (*FLOWS, *CHAINS):
        raise ValueError(f"{name} is not known, so what the network predicts is unknown; known are {FLOWS + CHAINS}")
    keys = {**_defaults(name), **scheduler}
    steps, kind = int(keys["num_train_timesteps"]), keys.get("prediction_type", PREDICTED["flow"])
    predicted, betas = ({theirs: ours for ours, theirs in words.items()} for words in (PREDICTED, BETAS))
    if name in FLOWS or keys.get("use_flow_sigmas"):
        if kind not in (PREDICTED["flow"], PREDICTED["eps"], PREDICTED["x0"]):
            raise ValueError(f"prediction_type {kind!r} on the linear flow is not known")
        return Meaning(predicted[kind], None, float(steps), bool(keys.get("invert_sigmas")))  # type: ignore[arg-type]
    shape = keys["beta_schedule"]
    if kind not in predicted or kind == PREDICTED["flow"] or shape not in betas:
        raise ValueError(f"prediction_type {kind!r} with beta_schedule {shape!r} is not known")
    for key, usual in {"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_type": "discrete"}.items():
        if keys.get(key, usual) not in (usual, None):
            raise ValueError(f"{key} = {keys[key]!r} is not known")
    return Meaning(predicted[kind], Schedule(betas[shape], steps, float(keys["beta_start"]), float(keys["beta_end"])))  # type: ignore[arg-type]


def _defaults(name: str) -> dict[str, Any]:
    """What a scheduler of diffusers, by its class's name, takes for the keys that a file leaves out."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
