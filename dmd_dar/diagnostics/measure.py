"""All diagnostics of one network, as the plain containers that diagnostics.json holds."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dmd_dar.diagnostics.mixing import AlphaSums, GateSums, source_spans
from dmd_dar.diagnostics.states import Inputs, Places, trace
from dmd_dar.diagnostics.symptoms import SymptomSums
from dmd_dar.guidance import Velocity
from dmd_dar.routing.history import Observer
from dmd_dar.routing.layout import RoutingConfig

Facts = dict[str, Any]


def measure(
    observed: Callable[[Observer | None], Velocity],
    places: Places,
    routing: RoutingConfig,
    inputs: Inputs,
    times: Sequence[float],
    tick: Callable[[], Any] = lambda: None,
) -> Facts:
    """The symptoms and the source mixing at each of `times` (t = 0 data, t = 1 noise).

    `observed(observe)` is the network's velocity that shows its alpha to `observe`; a residual one gets None.
    `symptoms`: see SymptomSums.facts, each fact a list over `times`. `mixing`: its `kind`, "alpha" or "gate"; its
    `unit`, "sublayer" or "block"; and of every router its `sources`, each as [first, last] of these, and the facts of
    AlphaSums or GateSums as lists over `times`. `tick` is called after each batch.
    """
    x0, cond, eps = inputs.x0, inputs.cond, inputs.draws.normal("eps", *inputs.x0.shape[1:])
    spans = source_spans(routing, len(places.consumers) - 1)
    residual = routing.query == "residual"

    def at(time: float) -> tuple[Facts, dict[int, Facts]]:
        symptoms, alphas, gates = SymptomSums(), AlphaSums(spans), GateSums(spans)
        velocity = observed(None if residual else alphas.observe)
        for rows in inputs.batches():
            traced = trace(velocity, places, x0[rows], eps[rows], time, cond[rows])
            symptoms.add(traced, places)
            if residual:
                gates.add(traced)
            tick()
        return symptoms.facts(), (gates if residual else alphas).facts()

    symptoms, mixing = zip(*(at(time) for time in times), strict=True)
    routers = [
        {"router": router, "sources": [list(span) for span in read], **_listed([row[router] for row in mixing])}
        for router, read in spans.items()
    ]
    mixed = {"kind": "gate" if residual else "alpha", "unit": places.unit, "routers": routers}
    return {"symptoms": _listed(symptoms), "mixing": mixed}


def _listed(rows: Sequence[Facts]) -> Facts:
    """[{a: 1}, {a: 2}] -> {a: [1, 2]}."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def not_finite(facts: Any, path: str = "") -> Iterator[str]:
    """Where in nested containers a number is NaN or infinite, as dotted paths."""
    if isinstance(facts, float) and not math.isfinite(facts):
        yield path
    parts = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list | tuple) else ()
    for name, part in parts:
        yield from not_finite(part, f"{path}.{name}".lstrip("."))


def rounded(facts: Any) -> Any:
    """Nested containers with floats at six significant digits: more would be rounding error of float32."""
    if isinstance(facts, dict):
        return {name: rounded(part) for name, part in facts.items()}
    if isinstance(facts, list | tuple):
        return [rounded(part) for part in facts]
    return float(f"{facts:.6g}") if isinstance(facts, float) else facts
