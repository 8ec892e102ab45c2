"""docs/performance.md from the benchmarks' JSON: python -m benchmarks.performance"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import OPEN, Read, load, markdown_table, mega, milli, stand, times
from benchmarks.turn_page import busy, peer, processes, routing_share, sampling, scaling, turn
from dmd_dar import config
from dmd_dar.atomic import write_atomic
from dmd_dar.routing.ops import BACKENDS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

HEAD = """# Performance

Written by `python -m benchmarks.performance` from `benchmarks/results/*.json`; every table has the machine, the commit
and the command it was measured with. Ratios are medians over rounds that ran side by side in one process.
"""


def page() -> str:
    """The whole page; a section whose JSON is missing says that it is not measured."""
    return "\n".join([HEAD, *(section(load) for section in SECTIONS)])


def aims(result: dict[str, Any], cuda: bool) -> list[tuple[str, float, float, bool]]:
    """What was aimed at: (what, measured, bound, whether more is better), for everything that was measured."""
    rows = []
    for chain in result.get("chain", []):
        name, extra = chain["form"], chain["extra_bytes"]
        if not cuda:
            rows.append((f"{name}: `torch` faster than `naive`", chain["training_ratio"]["torch"], 8.0, True))
            settled = chain["settled"]["training_ratio"]["torch"]
            rows.append((f"{name}: the same without page faults", settled, 4.0, True))
        rows.append(
            (f"{name}: extra memory of `naive`'s", extra["torch"] / extra["naive"], 1 / (4 if cuda else 8), False)
        )
    for row in result.get("router", []):
        where = f"one router, B {row['B']}"
        if "naive" in row["forward_ratio"]:
            rows.append((f"{where}: `triton` forward faster than `naive`", row["forward_ratio"]["naive"], 11.5, True))
            rows.append((f"{where}: backward", row["backward_ratio"]["naive"], 8.5, True))
        share = row["forward_share_of_copy_bandwidth"]["triton"]
        rows.append((f"{where}: forward over copy bandwidth", share, 0.8, True))
    for row in result.get("public", []):
        for kernel, over in row["forward_ratio"].items():
            if kernel != "triton" and row["sources"] <= 9:
                rows.append((f"{row['sources']} sources: forward of {kernel} over `triton`'s", over, 1.0, True))
                over = row["backward_ratio"][kernel]
                rows.append((f"{row['sources']} sources: backward of {kernel} over `triton`'s", over, 1.0, True))
    for form, over in result.get("step", {}).get("ratio", {}).items():
        if form != "residual" and not form.endswith(BACKENDS):  # a row that ends so is not by the default
            rows.append((f"training step, {form}, over residual", over, 1.15 if cuda else 1.25, False))
    return rows


def _aims(result: dict[str, Any], cuda: bool) -> str:
    rows = []
    for what, value, bound, more in aims(result, cuda):
        met = value >= bound if more else value <= bound
        rows.append(
            [what, f"{'at least' if more else 'at most'} {bound:.3g}", f"{value:.3g}", "met" if met else "missed"]
        )
    return "**Aims.**\n\n" + markdown_table(["", "aim", "measured", ""], rows)


def routing(name: str, title: str, targets: str) -> Callable[[Read], str]:
    """The section of one device's routing benchmark."""

    def section(read: Read) -> str:
        result = read(name)
        body = f"{OPEN}: run `python -m benchmarks.routing` on such a machine.\n"
        if result is not None:
            bandwidth = f"Copy bandwidth {result['copy_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s (read and written)."
            parts = [stand(result), bandwidth + "\n", *_chains(result), *_routers(result), _step(result)]
            body = "\n".join([*parts, _aims(result, name.endswith("cuda"))])
        return f"## {title}\n\n{targets}\n\n{body}"

    return section


def _chains(result: dict[str, Any]) -> list[str]:
    rows = []
    for chain in result.get("chain", []):
        for backend in chain["training_s"]:
            settled = chain.get("settled")
            rows.append(
                [
                    chain["form"],
                    backend,
                    milli(chain["training_s"][backend]),
                    times(chain["training_ratio"][backend]),
                    times(by_source[backend]) if (by_source := chain.get("training_ratio_by_source")) else OPEN,
                    times(settled["training_ratio"][backend]) if settled else "",
                    milli(chain["sampling_s"][backend]),
                    times(chain["sampling_ratio"][backend]),
                    mega(chain["extra_bytes"][backend]),
                    f"1/{chain['extra_bytes']['naive'] / chain['extra_bytes'][backend]:.0f}",
                    mega(chain["sampling_bytes"]) if backend == "torch" else "",
                    f"{100 * chain['share_of_copy_bandwidth']:.0f} %" if backend == "torch" else "",
                ]
            )
    if not rows:
        return [f"Chain of all routers: {OPEN}.\n"]
    shape = result["chain"][0]["shape"]
    size = f"{shape['routers']} routers, B {shape['B']}, T {shape['T']}, d {shape['d']}, {shape['dtype']}"
    head = [
        "chain",
        "backend",
        "forward + backward, ms",
        "speed-up",
        "over by source",
        "without page faults",
        "forward alone, ms",
    ]
    head += ["speed-up", "extra peak memory", "of naive's", "traffic of a forward, counted", "of copy bandwidth"]
    return [
        f"**All routers of a network** ({size}; `timestep` queries). Speed-ups are against `naive`, the equations on"
        " stacked sources; `by source` is the same without the stacked copy, a leaner baseline. Extra memory is the"
        " peak above the same chain with plain additions.\n",
        markdown_table(head, rows),
    ]


def _routers(result: dict[str, Any]) -> list[str]:
    parts = []
    for name, title in (
        ("router", "One router, `triton` against `naive`"),
        ("public", "Published kernels, static query"),
    ):
        if name not in result:
            parts.append(f"**{title}**: {OPEN} (needs a GPU).\n")
            continue
        rows = []
        for row in result[name]:
            shape = [str(row["B"]), str(row["sources"])]
            for kernel in row["forward_s"]:
                share = row["forward_share_of_copy_bandwidth"][kernel]
                forward = [milli(row["forward_s"][kernel]), times(row["forward_ratio"][kernel]), f"{100 * share:.0f} %"]
                backward = [milli(row["backward_s"][kernel]), times(row["backward_ratio"][kernel])]
                rows.append([*shape, kernel, *forward, *backward])
            rows += [[*shape, kernel, why, "", "", "", ""] for kernel, why in row["failed"].items()]
        head = ["B", "sources", "kernel", "forward, ms", "over `triton`'s", "of copy bandwidth"]
        parts += [
            f"**{title}** (T 256, d 1152, bf16).\n",
            markdown_table([*head, "backward, ms", "over `triton`'s"], rows),
        ]
    return parts


def _step(result: dict[str, Any]) -> str:
    if "step" not in result:
        return f"Training step: {OPEN}.\n"
    step = result["step"]
    rows = [[form, milli(step["seconds"][form]), times(step["ratio"][form])] for form in step["seconds"]]
    return (
        f"**One training step** of {step['model']}, B {step['B']}: loss, backward, AdamW; S = 4, `timestep`.\n\n"
        + markdown_table(["residual additions", "ms", "over residual"], rows)
    )


def analytic(read: Read) -> str:
    """The section of students of known distributions, by how roll-outs are made and in which precision."""
    words = (
        "**Four-step students of distributions whose score is known**, at equal updates. The field's numbers are errors"
        " of an octave's power in dB, over the rungs; the mixture's its modes found, of 8, and the distance from the"
        " truth over the teacher's in four steps. ± is one standard error; a difference below two of them is not"
        " resolved."
    )
    parts = [
        by_seed("`rollouts`", read("analytic_cpu"), "fresh", "shared", "python -m benchmarks.analytic"),
        by_seed(
            "`launch.gradient_free`",
            read("precision_cpu"),
            "float32",
            "bfloat16",
            "python -m benchmarks.analytic compare=gradient_free",
        ),
    ]
    return f"## Students of known distributions\n\n{words}\n\n" + "\n".join(parts)


def by_seed(key: str, result: dict[str, Any] | None, first: str, second: str, command: str) -> str:
    """A table of two values of a key, paired by training seed."""
    if result is None:
        return f"**{key}**: {OPEN}: run `{command}`.\n"
    gap = f"{second} - {first}"
    rows = [
        [target, name, *(f"{statistics.mean(one[form]):.3g}" for form in (first, second))]
        + [f"{one[gap]:+.3g} ± {one['standard error']:.2g}"]
        for target in ("field", "mixture")
        for name, one in result[target].items()
    ]
    head = ["target", "", first, second, f"{gap}, paired by seed"]
    return f"**{key}**, {result['seeds']} training seeds. {stand(result)}\n{markdown_table(head, rows)}"


def evaluation(read: Read) -> str:
    """The section of the offline evaluation's time."""
    aim = "Aim: an offline evaluation of three models x 512 images at 32 px in under 60 s on 2 cores."
    title = f"## Evaluation\n\n{aim}\n\n"
    result = read("evaluation")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.evaluation`.\n"
    rows = [[name, f"{part['median']:.1f}"] for name, part in (*result["parts_s"].items(), ("all", result["seconds"]))]
    what = f"{result['models']} models, {result['sets']} sets of {result['images']} images of {result['size']} px"
    words = (
        f"**Every metric without weights and the report** ({what}; medians of {result['seconds']['rounds']} rounds).\n"
    )
    text = f"{title}{stand(result)}\n{words}\n{markdown_table(['part', 'seconds'], rows)}"
    if whole := result["command_s"]:
        new, again = (
            f"{whole[name]['median']:.1f} s ({whole[name]['least']:.1f} to {whole[name]['most']:.1f})"
            for name in ("new", "again")
        )
        text += (
            f"\nThe whole command `python -m eval.report` of {result['runs']} students takes {new} where the teacher's"
            " and all students' images have to be made first, start and latencies included, and"
            f" {again} where an earlier report has kept them."
        )
        if whole["new"]["median"] > result["aim_s"]:
            text += " So the aim is met by measuring and writing, and not where the networks have to be sampled too."
        text += "\n"
    return text


def psd(read: Read) -> str:
    """The section of the power spectrum's speed."""
    title = "## Power spectrum\n\nAim: `radial_psd` at least 2x, better 5x, faster than float64 image by image.\n\n"
    result = read("psd")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.psd`.\n"
    per_image = {name: 1000 * one["median"] / result["n"] for name, one in result["seconds"].items()}
    rows = [[name, f"{ms:.3g}", times(result["times_faster"].get(name, 1.0))] for name, ms in per_image.items()]
    difference = max(result["largest_relative_difference"].values())
    words = (
        f"**{result['n']} images of {result['size']} px**; the curves differ by at most {difference:.0e}, relatively.\n"
    )
    return f"{title}{stand(result)}\n{words}\n{markdown_table(['way', 'ms per image', 'speed-up'], rows)}"


def solvers(read: Callable[[str], dict[str, Any] | None]) -> str:
    """The section of the teacher's solvers."""
    title = "## Solvers of the teacher's ODE\n\n"
    result = read("solvers")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.solvers`.\n"
    rows = [
        [one["solver"], one["grid"], str(one["evaluations"]), f"{one['rms']:.4f}", f"{one['kurtosis_ratio']:.2f}"]
        + [f"{one['flat_noise_db']:+.2f}", f"{one['hf_gain_db']:+.2f}", f"{one['fd_wavelet']:.3f}"]
        for one in result["rows"]
    ]
    words = (
        f"**{result['n']} images of teachers/photos32** against the ODE's own from the same noise (Heun on the cosine"
        f" grid, {result['reference_steps']} steps): root mean square difference in the images' units of 2, and what a"
        " report measures."
    )
    head = ["solver", "grid", "evaluations", "rms", "kurtosis ratio", "flat noise, dB", "HF gain, dB", "fd_wavelet"]
    return f"{title}{stand(result)}\n{words}\n\n{markdown_table(head, rows)}"


SECTIONS = [
    routing(
        "routing_cpu",
        "Routing on a CPU",
        "Aims: `torch` at least 8x faster than `naive` (4x without page faults), at most 1/8 of its"
        " extra memory; a training step at most 1.25x the residual one.",
    ),
    routing(
        "routing_cuda",
        "Routing on a GPU",
        "Aims on an H200: extra memory of `torch` at most 1/4 of `naive`'s; one `triton` router 11.5x (forward) and"
        " 8.5x (backward) faster than `naive`, its forward at 80 % of the copy bandwidth, and not slower than published"
        " kernels up to 9 sources; a SiT-XL/2 step at most 1.15x the residual one.",
    ),
    turn("turn_cpu", "A turn of a distillation on a CPU"),
    turn("turn_cuda", "A turn of a distillation on a GPU"),
    peer,
    scaling,
    processes,
    sampling("sampling_cpu", "Sampling on a CPU"),
    sampling("sampling_cuda", "Sampling on a GPU"),
    routing_share,
    analytic,
    solvers,
    busy,
    evaluation,
    psd,
]


@dataclass(frozen=True)
class PageConfig:
    """python -m benchmarks.performance"""


if __name__ == "__main__":
    config.run_job(PageConfig, lambda _: write_atomic(PAGE, page()), description=__doc__ or "")
