"""The sections of docs/performance.md on distillation and sampling: turns, FastGen's beside ours, sizes, processes."""

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import OPEN, Read, markdown_table, mega, milli, stand, times


def turn(name: str, title: str) -> Callable[[Read], str]:
    """The section of one device's distillation turns."""

    def section(read: Read) -> str:
        result = read(name)
        if result is None:
            return f"## {title}\n\n{OPEN}: run `python -m benchmarks.turn` on such a machine.\n"
        load, clock = result["load_average"], "wall time" if name.endswith("cuda") else "CPU time of one thread"
        words = (
            f"**One student update and {result['updates']} of the fake score**; {clock}; load average"
            f" {load['before']:.1f} before, {load['after']:.1f} after. `fresh`: a roll-out for every update, `shared`:"
            " `rollouts: shared`, the default; a row that names neither was measured before they were shared."
            " Launches are operations without views and allocations. Optimisers hold two moments of what is trained;"
            " the peak of a turn is gradients and activations."
        )
        if backend := result.get("backend"):
            words += f" Routers are computed by `{backend}`, unless the row says otherwise."
        nets = result["nets"].items()
        return "\n".join([f"## {title}\n\n{stand(result)}\n{words}\n", *(_net(*pair) for pair in nets)])

    return section


def _net(net: str, found: dict[str, Any]) -> str:
    """The tables of one net: its arms, and what part of a turn its parts take."""
    rounds = next(iter(found["seconds"].values()))["rounds"]
    head = ["additions, weights, roll-outs", "ms", "over the first row", "launches", "of them draws"]
    head += ["networks", "optimisers", "peak of a turn", "memory over the first row"]
    rows = []
    for arm, seconds in found["seconds"].items():
        counts, parts = (found.get("launches") or {}).get(arm), found["bytes"][arm]
        counted = (
            [f"{counts[which]:.0f}" for which in ("all", "draws")]
            if counts
            else ([""] * 2 if arm.endswith("compiled") else [OPEN] * 2)
        )
        sizes = [mega(parts[part]) for part in ("networks", "optimisers", "step")]
        row = [arm, milli(seconds), times(found["ratio"][arm]), *counted, *sizes, times(found["bytes_ratio"][arm])]
        rows.append(row)
    text = f"**{net}**, B {found['B']}, T {found['T']}; {rounds} rounds.\n\n{markdown_table(head, rows)}"
    if not found.get("shares"):
        return text
    names = list(dict.fromkeys(part for shares in found["shares"].values() for part in shares))
    rows = [[part, *(f"{100 * shares.get(part, 0):.1f} %" for shares in found["shares"].values())] for part in names]
    return f"{text}\nShare of a turn's time:\n\n{markdown_table(['part', *found['shares']], rows)}"


# what was aimed at beside FastGen's turn, by our turn's name
AIMS = {"residual, full, data": 0.85, "residual, full, shared": 0.75}
MEMORY_AIM = 0.6


def peer(read: Read) -> str:
    """The section of our turns beside those of another library."""
    title = (
        "## Beside NVIDIA FastGen\n\nAims, SiT-S/2, B 4, eager: a turn at most 0.85x of FastGen's with the same calls"
        " of the networks, at most 0.75x with shared roll-outs; the peak of a turn at most 0.6x.\n\n"
    )
    result = read("turn_peer_cpu")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.turn peer=CHECKOUT`.\n"
    load, commit = result["load_average"], result.get("peer_commit") or "not recorded"
    words = (
        f"**One student update and {result['updates']} of the fake score**, float32; CPU time of one thread,"
        f" interleaved in one process; FastGen's commit: {commit}; load average {load['before']:.1f} before,"
        f" {load['after']:.1f} after. FastGen's"
        " DMD2 and its trainer's step compute their turn, on our networks in its protocol, without GAN and guidance."
        " Its image method noises real data: `data`, which ours does with `student_input: data`. `simulated` gives it"
        " the student's own way to the same rungs as our `fresh`, made by its sampling loop. AdamW is not fused, as in"
        " its configuration; a column has it fused. Its average of the student follows after the student's update, as"
        " ours does; its trainer would update it after each of the six. The peak of a turn is gradients and"
        " activations, beside weights, averages and moments."
    )
    return "\n".join([f"{title}{stand(result)}\n{words}\n", *(_beside(*pair) for pair in result["nets"].items())])


def _beside(net: str, found: dict[str, Any]) -> str:
    """The tables of one net: ratios, calls of networks, and what part of a turn its parts take on both sides."""
    aimed = net == "SiT-S/2"
    rows = []
    for row in found["rows"]:
        ours, theirs = (milli(found["seconds"][row[side]]) for side in ("ours", "theirs"))
        aim = AIMS.get(row["ours"]) if aimed else None
        met = "" if aim is None else f", {_met(row['ratio'], aim)}"
        memory = f", {_met(row['bytes_ratio'], MEMORY_AIM)}" if aimed and "compiled" not in row["ours"] else ""
        sizes = [mega(found["bytes"][row[side]]["step"]) for side in ("ours", "theirs")]
        ratios = [f"{times(row['ratio'])}{met}", times(row["ratio to fused AdamW"])]
        rows.append([row["ours"], row["theirs"], ours, theirs, *ratios, *sizes, f"{times(row['bytes_ratio'])}{memory}"])
    head = ["ours", "theirs", "ours, ms", "theirs, ms", "ours over theirs", "over theirs with fused AdamW"]
    head += ["ours, peak of a turn", "theirs", "ours over theirs"]
    rounds = next(iter(found["seconds"].values()))["rounds"]
    text = f"**{net}**, B {found['B']}, T {found['T']}; {rounds} rounds.\n\n{markdown_table(head, rows)}"
    names = list(dict.fromkeys(call for calls in found["calls"].values() for call in calls))
    rows = [[call, *(f"{calls.get(call, 0):.4g}" for calls in found["calls"].values())] for call in names]
    text += f"\nCalls of networks a turn, counted in these rounds:\n\n{markdown_table(['', *found['calls']], rows)}"
    parts = list(dict.fromkeys(part for shares in found["shares"].values() for part in shares))
    rows = [[part, *(f"{100 * shares.get(part, 0):.1f} %" for shares in found["shares"].values())] for part in parts]
    return f"{text}\nShare of a turn's time:\n\n{markdown_table(['part', *found['shares']], rows)}"


def _met(value: float, aim: float) -> str:
    return "met" if value <= aim else "missed"


def scaling(read: Read) -> str:
    """The section of turns by batch, tokens and depth."""
    result, title = read("scaling_cpu"), "## A turn by batch, tokens and depth\n\n"
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.scaling`.\n"
    load = result["load_average"]
    parts = [
        f"{title}{stand(result)}\n**One student update and {result['updates']} of the fake score**, shared roll-outs,"
        f" weights of their own; CPU time of one thread; load average {load['before']:.1f} before, {load['after']:.1f}"
        " after.\n"
    ]
    for net, sized in result["nets"].items():
        rows = []
        for row in sized:
            plain, routed = (row["seconds"][form] for form in ("residual", "DAR"))
            shape = [str(row[name]) for name in ("B", "T", "depth")]
            per_image = f"{1000 * plain['median'] / row['B']:.4g}"
            over = times(row["DAR over residual"])
            rows.append([row["varied"], *shape, milli(plain), milli(routed), per_image, over])
        head = ["varied", "B", "T", "blocks", "residual, ms", "DAR, ms", "residual, ms an image", "DAR over residual"]
        parts.append(f"**{net}**; {sized[0]['seconds']['DAR']['rounds']} rounds.\n\n{markdown_table(head, rows)}")
    return "\n".join(parts)


def processes(read: Read) -> str:
    """The section of two processes against one."""
    result, title = read("processes_cpu"), "## Two processes against one\n\n"
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.processes`.\n"
    rates, load = result["images_per_second"], result["load_average"]
    alone = next(iter(rates.values()))["median"]
    rows = [
        [name, f"{rate['median']:.3g} ({rate['least']:.3g} to {rate['most']:.3g})", times(rate["median"] / alone)]
        for name, rate in rates.items()
    ]
    rounds = next(iter(rates.values()))["rounds"]
    words = (
        f"`python distill.py config=configs/photos32/dar.yaml launch.processes=2 launch.threads=1` and its like, batch"
        f" {result['B']} over all processes, {result['updates']} updates of the fake score a turn; wall time of"
        f" {result['turns']} turns, {rounds} runs each; load average {load['before']:.1f} before, {load['after']:.1f}"
        " after. An image is a sample in one optimiser step."
    )
    return f"{title}{stand(result)}\n{words}\n\n{markdown_table(['', 'images/s', 'over the first row'], rows)}"


def sampling(name: str, title: str) -> Callable[[Read], str]:
    """The section of one device's sampling."""

    def section(read: Read) -> str:
        result, aim = read(name), "Aim: a call with DAR at most 1.10x of one with plain additions."
        if result is None:
            return f"## {title}\n\n{aim}\n\n{OPEN}: run `python -m benchmarks.sampling` on such a machine.\n"
        rows = []
        for row in result["rows"]:
            plain, routed = (row["seconds"][form] for form in ("residual", "DAR"))
            rate = [f"{row['B'] / one['median']:.3g}" for one in (plain, routed)]
            shape = [row["net"], str(row["B"]), str(row["calls"])]
            rows.append([*shape, milli(plain), milli(routed), *rate, times(row["DAR over residual"])])
        head = [
            "net",
            "B",
            "calls",
            "residual, ms",
            "DAR, ms",
            "residual, images/s",
            "DAR, images/s",
            "DAR over residual",
        ]
        clock = "wall time" if name.endswith("cuda") else "CPU time of one thread"
        words = f"{clock[0].upper()}{clock[1:]}; routers by `{result['backend']}`."
        return f"## {title}\n\n{aim}\n\n{stand(result)}\n{words}\n\n{markdown_table(head, rows)}"

    return section


def routing_share(read: Read) -> str:
    """The section of what routing adds to a call, by kind of work."""
    title = "## What routing adds to a call\n\n"
    result = read("routing_share_cpu")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.routing_share`.\n"
    load, bandwidth = result["load_average"], result["copy_bandwidth_bytes_per_s"] / 1e9
    words = (
        "DAR minus plain additions, in per cent of the plain call's time; one thread. `sampling` is a call without"
        " gradients, `training` a forward, a backward and an update. Operations are grouped by torch's profiler, each"
        f" with the least of its times in {result['rounds']} rounds; the rest is what is left of the CPU time without a"
        " profiler. `bytes` is what routing moves at the least (docs/routing.md, in training twice) at this machine's"
        f" copy bandwidth, {bandwidth:.1f} GB/s read and written; load average {load['before']:.1f} before,"
        f" {load['after']:.1f} after. Groups that routing does not touch, such as linear layers and the optimiser, show"
        " how far the numbers of a busy machine scatter."
    )
    rows = result["rows"]
    lines = [[f"{row['net']}, {row['kind']}, B {row['B']}" for row in rows]]
    lines.append([milli(row["seconds"]["residual"]) for row in rows])
    lines.append([milli(row["seconds"]["DAR"]) for row in rows])
    lines.append([times(row["DAR over residual"]) for row in rows])
    lines.append([f"{row['operations']['residual']} / {row['operations']['DAR']}" for row in rows])
    lines.append([_share(row, row["bytes_s"]) for row in rows])
    names = ["", "plain, ms", "DAR, ms", "DAR over plain", "operations and views, plain / DAR", "bytes"]
    for group in rows[0]["groups_s"]["DAR"]:
        more = [row["groups_s"]["DAR"][group] - row["groups_s"]["residual"][group] for row in rows]
        names.append(group)
        lines.append([_share(row, seconds) for row, seconds in zip(rows, more, strict=True)])
    table = [[name, *line] for name, line in zip(names, lines, strict=True)]
    return f"{title}{stand(result)}\n{words}\n\n{markdown_table(table[0], table[1:])}"


def _share(row: dict[str, Any], seconds: float) -> str:
    return f"{100 * seconds / row['seconds']['residual']['median']:+.1f} %"


def busy(read: Read) -> str:
    """The section of training beside another busy process."""
    title = (
        "## Beside a busy process\n\nAim: about half of the speed of an idle machine, at no cost on an idle one.\n\n"
    )
    result = read("busy_cpu")
    if result is None:
        return f"{title}{OPEN}: run `python -m benchmarks.busy`.\n"
    by = result["steps_per_second"]
    rows = [[name, *(f"{by[where][name]['median']:.3g}" for where in ("idle", "busy"))] for name in by["idle"]]
    ours, default = ({where: by[where][name]["median"] for where in by} for name in ("dmd_dar's", "GNU's default"))
    words = (
        "Forward and backward passes a second of the demo's teacher on all threads, by how long threads spin;"
        f" {by['idle']['none']['rounds']} rounds. `dmd_dar`'s choice is {ours['idle'] / default['idle']:.2f}x as fast"
        f" as GNU's default on an idle machine and {ours['busy'] / default['busy']:.1f}x beside a busy process, where"
        f" it keeps {ours['busy'] / default['idle']:.2f} of the default's idle speed."
    )
    return f"{title}{stand(result)}\n{words}\n\n{markdown_table(['spins', 'idle', 'busy'], rows)}"
