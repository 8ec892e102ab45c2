"""What diagnostics.json says in a few lines, beside what the paper reports for a far larger network."""

from collections.abc import Iterator
from typing import Any

from dmd_dar.diagnostics.figures import clear_gates, time_in_words, unit_of

Facts = dict[str, Any]

# Symptom -> the plain residual network of arXiv:2605.20708: SiT-XL/2, 28 blocks, 600K iterations, ImageNet 256.
PAPER = {"inflation": "about x102", "gradient_decay": "drops over x10 after block 5", "cosine": "above 0.9"}


def lines(result: Facts) -> Iterator[str]:
    """A table for each network: the three symptoms at the first and the last t, then source mixing and probe."""
    ends = sorted({0, len(result["times"]) - 1})
    for model in result["models"]:
        symptoms = model["symptoms"]
        yield f"{model['name']}: {model['parameters']:,} parameters, {len(symptoms['forward_rms'][0])} blocks"
        times = [time_in_words(result["times"][end]) for end in ends]
        yield _row("", times, "paper, residual SiT-XL/2")
        inflation = [f"x{symptoms['inflation'][end]:.3g}" for end in ends]
        yield _row("forward magnitude, last block over first", inflation, PAPER["inflation"])
        decay = [f"x{symptoms['gradient_decay'][end]:.3g}" for end in ends]
        yield _row("gradient, first block over last", decay, PAPER["gradient_decay"])
        cosines = [_mean_and_least(symptoms["block_cosine"][end]) for end in ends]
        yield _row("cosine of neighbouring blocks, mean (least)", cosines, PAPER["cosine"])
        yield _row("velocity loss", [f"{symptoms['loss'][end]:.3g}" for end in ends], "")
        yield "  " + _mixing(model["mixing"], len(result["times"]))
        first, *states = model["probe"]["states"]
        later = f"later states {min(states):.3f} to {max(states):.3f}"
        yield f"  R2 of t, linear: pixels {model['probe']['input']:.3f}; embedded input {first:.3f}; {later}"


def _row(name: str, cells: list[str], paper: str) -> str:
    return f"  {name:44}{''.join(f'{cell:16}' for cell in cells)}{paper}".rstrip()


def _mean_and_least(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f})" if values else "one block"


def _mixing(mixing: Facts, times: int) -> str:
    routers = mixing["routers"]

    def mean(fact: str) -> float:
        return sum(sum(row[fact]) for row in routers) / len(routers) / times

    counts = sum(len(row["sources"]) for row in routers) / len(routers)
    means = (
        f"effective sources {mean('effective_sources'):.2f} of {counts:.2f}, share of v_0 {mean('share_v0'):.3f},"
        f" reach {mean('distance_back'):.2f} {unit_of(mixing)}s"
    )
    if mixing["kind"] == "alpha":
        return f"by alpha: {means}, deviation from equal weights {mean('deviation'):.3f}"
    clear = [clear_share(routers, index) for index in range(times)]
    return f"by gate gradients, clear of 0 for {min(clear):.0%} to {max(clear):.0%} of the gates: {means}"


def clear_share(routers: list[Facts], time_index: int) -> float:
    """The share of gates whose gradient is more than two standard errors from 0; 5 % would be by chance."""
    return len(clear_gates(routers, time_index)[0]) / sum(len(row["sources"]) for row in routers)
