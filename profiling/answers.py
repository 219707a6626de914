"""Three questions of the page: what bounds a step, what fusion bought, what the released wastes.

Every number is read or computed from files of results/.
"""

from __future__ import annotations

from collections.abc import Sequence

from pictures import (
    GPU_STEP_BATCH,
    GPU_STEPS,
    best_of,
    device,
    first_device,
    operations,
    step_rates,
    timed_beside,
)
from result_files import Result, latest, spread
from roofline import Device, Row, grouped, projected, seconds_by_bound, seconds_by_group
from sections import Basis, Section, Table, counted, measured, percent, shown

from miro.report.render import number

COMPILE, FUSED_COMPILED = "torch.compile", "fused, rest compiled"
# Kernels of gpu_check.py by the names of the operations that a step is counted in.
COUNTED_AS = {"reward_adaln gated": "reward_gated_residual_adaln"}


def assumed(name: str, given: Device) -> Basis:
    """A projection's label, which says what it takes for granted."""
    return Basis(
        "PROJECTION",
        f"{name}: {percent(given.gemm)} of {given.flops / 1e12:,.0f} TFLOP/s in matrix products, "
        f"{percent(given.attention)} in attention, {percent(given.memory)} of "
        f"{given.bandwidth / 1e12:g} TB/s elsewhere, {1e6 * given.launch:g} µs a launch, no host",
    )


def bound(results: Sequence[Result]) -> Section:
    """Time by group and by what it waits for, on the first device of the budget."""
    section = Section("bound", "What bounds a step?")
    budget = section.take(results, "step budget")
    if budget is None:
        return section
    name = first_device(budget)
    given, batch = device(budget, name), budget.record["settings"]["batch"]
    fused, eager = operations(budget, "fused"), operations(budget, "eager")
    total, slow = projected(fused, given), projected(eager, given)
    waits = {kind: share / total for kind, share in seconds_by_bound(fused, given).items()}
    products = seconds_by_group(fused, given).get("GEMM", 0.0) / total
    most = max(waits, key=lambda kind: waits[kind])
    section.text.append(
        f"A fused step of {batch:g} images is projected to take {number(1e3 * total)} ms on an "
        f"{name}: {percent(waits['FLOPs'])} of it is bound by FLOPs (matrix products are "
        f"{percent(products)}), {percent(waits['bytes'])} by bytes and "
        f"{percent(waits['launches'])} by launches. Eager’s is projected at {number(1e3 * slow)} "
        f"ms, {percent(seconds_by_bound(eager, given)['bytes'] / slow)} of it bound by bytes. For "
        f"each useful FLOP the fused step executes "
        f"{sum(row.flops for row in fused) / budget.record['useful_flops']:.3f}."
    )
    gpu = latest(results, "GPU check")
    rates = step_rates(gpu) if gpu else {}
    both = {"fused", "fused, rest eager"} <= rates.keys()
    # A projection is held against a measurement of the same device and batch alone.
    if gpu and both and name.split()[0] in gpu.place and batch == GPU_STEP_BATCH:
        compiled, alone = (batch / rates[said] for said in ("fused", "fused, rest eager"))
        rest = FUSED_COMPILED in budget.record["variants"]
        awaited = projected(operations(budget, FUSED_COMPILED), given) if rest else total
        section.text.append(
            f"Measured on {gpu.place}, it takes {number(1e3 * compiled)} ms with the rest compiled "
            f"and {number(1e3 * alone)} ms with the rest eager: {number(compiled / awaited)} × and "
            f"{number(alone / total)} × the projection, which counts "
            + ("no host." if rest else "the rest as eager and no host.")
        )
        section.sources.append(gpu)
        section.basis.append(measured(gpu))
    section.basis += [assumed(name, given), counted(budget)]
    section.headline = (
        percent(waits[most]),
        f"of a fused step bound by {most}, projected for {name}",
    )
    section.tables.append(_groups(fused, eager, given))
    section.draw(budget, "groups", "roofline")
    return section


def _groups(fused: list[Row], eager: list[Row], given: Device) -> Table:
    taken, slow = seconds_by_group(fused, given), seconds_by_group(eager, given)
    counts = {row.group: row for row in grouped(fused)}
    rows: list[list[str | Basis]] = []
    for group in sorted(taken | slow, key=lambda group: -taken.get(group, 0.0)):
        row = counts.get(group, Row(group, group))
        rows.append([
            group, f"{row.launches:,}", *(
                number(value) if value else "–"
                for value in (row.flops / 1e12, row.bytes / 1e9, 1e3 * taken.get(group, 0.0),
                              1e3 * slow.get(group, 0.0))
            ),
        ])  # fmt: skip
    totals = [sum(getattr(row, key) for row in fused) for key in ("launches", "flops", "bytes")]
    times = (1e3 * sum(found.values()) for found in (taken, slow))
    rows.append(["all", f"{totals[0]:,}", number(totals[1] / 1e12), number(totals[2] / 1e9),
                 *map(number, times)])  # fmt: skip
    return Table(["fused step", "launches", "TFLOP", "GB", "ms", "ms, eager"], rows)


def fusion(results: Sequence[Result]) -> Section:
    """Steps and kernels timed beside torch.compile and eager."""
    section = Section("fusion", "What did fusion buy?")
    gpu = section.take(results, "GPU check")
    kernels = section.take(results, "kernels")
    budget = section.take(results, "step budget")
    if gpu:
        _fused_step(section, gpu)
        _fused_kernels(section, gpu, kernels, budget)
        section.draw(gpu)
    if kernels:
        rows = sorted(kernels.record["rows"], key=lambda row: row["bytes_over_inductor"])
        fewer = [row for row in rows if row["bytes_over_inductor"] < 0.99]
        low, high = rows[0], rows[-1]
        section.text.append(
            f"Counted without a GPU, {len(fewer)} of {len(rows)} passes move "
            f"fewer bytes than torch.compile’s would: from {number(low['bytes_over_inductor'])} × "
            f"as many ({low['op']} {low['direction']}) to {number(high['bytes_over_inductor'])} × "
            f"({high['op']} {high['direction']})."
        )
        section.basis.append(counted(kernels))
    if budget:
        section.text.append(_fused_counts(budget))
        section.basis.append(counted(budget))
    return section


def _fused_counts(budget: Result) -> str:
    """Launches and bytes of a step, with nothing compiled and, where counted, with all of it."""

    def said(variant: str) -> tuple[str, str]:
        rows = operations(budget, variant)
        launches, moved = (sum(getattr(row, key) for row in rows) for key in ("launches", "bytes"))
        return f"{launches:,} kernels", f"{number(moved / 1e9)} GB"

    fused, eager = said("fused"), said("eager")
    text = (
        f"A fused step launches {fused[0]} and moves {fused[1]}, where eager launches {eager[0]} "
        f"and moves {eager[1]} (counted, with nothing compiled)."
    )
    if {COMPILE, FUSED_COMPILED} <= budget.record["variants"].keys():
        fused, alone = said(FUSED_COMPILED), said(COMPILE)
        text += (
            f" With the rest compiled it launches {fused[0]} and moves {fused[1]}, where "
            f"torch.compile alone launches {alone[0]} and moves {alone[1]} (as Inductor schedules "
            "both for an H100)."
        )
    return text


def _fused_step(section: Section, gpu: Result) -> None:
    rates, steps = step_rates(gpu), gpu.record["steps"]
    section.basis.append(measured(gpu))
    if not {"fused", COMPILE, "eager"} <= rates.keys():
        section.text.append(f"{gpu.path.name} has no whole steps: its run ended before them.")
        return
    memory = {said: steps[name]["gigabytes"] for name, said in GPU_STEPS.items() if name in steps}
    over = rates["fused"] / rates[COMPILE]
    section.text.append(
        f"On {gpu.place} a training step with the kernels does {number(rates['fused'])} images/s: "
        f"{number(over)} × torch.compile alone ({number(rates[COMPILE])}) and "
        f"{number(rates['fused'] / rates['eager'])} × eager ({number(rates['eager'])}), in "
        f"{number(memory['fused'])} GB against {number(memory[COMPILE])} and "
        f"{number(memory['eager'])}."
    )
    section.headline = f"{number(over)} ×", f"torch.compile’s images/s, measured on {gpu.place}"


def _fused_kernels(
    section: Section, gpu: Result, kernels: Result | None, budget: Result | None
) -> None:
    """The table of kernels beside torch.compile, and how many are faster."""
    pairs = timed_beside(gpu, COMPILE)
    moved = {(r["op"], r["direction"]): r for r in kernels.record["rows"]} if kernels else {}
    step = {row.op: row for row in operations(budget, "fused")} if budget else {}
    rows: list[list[str | Basis]] = []
    for ours, theirs in pairs:
        op, direction = str(ours["op"]), ours["direction"]
        name = COUNTED_AS.get(op, op) + ("_backward" if direction == "backward" else "")
        bytes_ = moved.get((op, direction), {}).get("bytes_over_inductor")
        called = step.get(name)
        rows.append([
            op, direction, number(ours["median"]), number(theirs["median"]),
            number(theirs["median"] / ours["median"]), _share(ours, gpu), _share(theirs, gpu),
            number(bytes_), f"{called.launches / called.calls:g}" if called else "–",
        ])  # fmt: skip
    head = ["kernel", "", "ms", "ms, torch.compile", "speed-up", "of peak",
            "of peak, torch.compile", "bytes / torch.compile’s, counted", "launches"]  # fmt: skip
    section.tables.append(Table(head, rows))
    if not pairs:
        return
    faster = sum(ours["p80"] < theirs["p20"] for ours, theirs in pairs)
    slower = sum(ours["p20"] > theirs["p80"] for ours, theirs in pairs)
    ratio = [(theirs["median"] / ours["median"], ours) for ours, theirs in pairs]
    (low, worst), (high, best) = (pick(ratio, key=lambda pair: pair[0]) for pick in (min, max))
    section.text.append(
        f"Of {len(pairs)} passes timed alone {faster} are faster than torch.compile’s beyond noise "
        f"and {slower} slower: from {number(low)} × ({worst['op']} {worst['direction']}) to "
        f"{number(high)} × ({best['op']} {best['direction']})."
    )


def _share(row: dict, gpu: Result) -> str:
    """The rate of a row over the measured peak: FLOPs where there are any, else least bytes."""
    peaks = gpu.record["peaks"]
    if row["flops"]:
        return f"{percent(row['flops'] / row['median'] / 1e9 / peaks['teraflops'])} FLOPs"
    return f"{percent(row['bytes'] / row['median'] / 1e6 / peaks['gigabytes'])} bytes"


def released(results: Sequence[Result]) -> Section:
    """Ours beside the released step: speed, FLOPs executed and useful, memory."""
    section = Section("released", "What does the released code waste?")
    step = section.take(results, "step")
    flops = section.take(results, "FLOPs")
    if step:
        _beside_released(section, step, _where_counted(results, step))
    if flops:
        section.basis.append(counted(flops))
        theirs = [row for row in flops.record["rows"] if row["model"] == "released MIRO"]
        if len(theirs) > 1:
            short, long = (pick(theirs, key=lambda row: row["text"]) for pick in (min, max))
            section.text.append(
                f"Padding texts from {short['text']:g} to {long['text']:g} tokens, as the "
                f"released training does, adds {100 * (long['forward'] / short['forward'] - 1):.1f}"
                " % to the FLOPs of its forward pass."
            )
        rows: list[list[str | Basis]] = [
            [row["model"], f"{row['pixels']:g}", f"{row['text']:g}",
             number(row["parameters"] / 1e9), number(row["forward"] / 1e9),
             number(row["training"] / 1e9), f"{row['steps']:g} × {row['calls']:g}",
             number(row["sampling"] / 1e12)]
            for row in flops.record["rows"]
        ]  # fmt: skip
        head = ["network", "pixels", "text tokens", "B parameters", "GFLOP forward",
                "GFLOP training", "sampling calls", "TFLOP an image"]  # fmt: skip
        section.tables.append(Table(head, rows, "FLOPs of all networks", folded=True))
        section.draw(flops)
    return section


def _where_counted(results: Sequence[Result], step: Result) -> Result:
    """The step's own file or, where it ran nothing eager, one whose images cost the same FLOPs."""

    def image(result: Result) -> tuple[object, ...]:
        settings = result.record["settings"]
        return settings["scale"], settings.get("padded"), set(settings.get("lengths", ()))

    alike = [r for r in results if r.kind is step.kind and image(r) == image(step)]
    return next((r for r in (step, *alike) if all(_both_counts(r))), step)


def _both_counts(step: Result) -> list[dict[str, float]]:
    return [_counts(step, start) for start in ("ours", "released ")]


def _beside_released(section: Section, step: Result, count: Result) -> None:
    settings, variants = step.record["settings"], step.record["variants"]
    section.basis.append(measured(step))
    section.draw(step)
    best = [best_of(step, start) for start in ("ours", "released ")]
    over = step.record["ratio"].get("released")
    if over is None or None in best:
        section.text.append(
            f"{step.path.name} was made without the released package: {step.kind.command}."
        )
        return
    ours, theirs = (variants[name] for name in best if name)
    own = [row["peak_bytes"] - row.get("library_bytes", 0) for row in (ours, theirs)]
    section.text.append(
        f"With the width divided by {settings['scale']:g}, on {step.place}, both at their best, "
        f"our step does {number(over['median'])} × the images/s of the released one "
        f"({number(over['p20'])} to {number(over['p80'])}), in "
        f"{number(ours['peak_bytes'] / theirs['peak_bytes'])} × its peak memory (libraries and "
        f"compiler left out: {number(own[0] / own[1])} ×)."
    )
    section.headline = (
        f"{number(over['median'])} ×", f"the released code’s images/s, measured on {step.place}"
    )  # fmt: skip
    counts = _both_counts(count)
    if all(counts):
        executed = [found["executed_flops"] for found in counts]
        useless = [found["executed_flops"] / found["useful_flops"] for found in counts]
        fewer = executed[1] / executed[0]
        section.text.append(
            f"For each useful FLOP it executes {number(useless[1])}, ours {number(useless[0])}. Of "
            f"the {number(over['median'])} ×, {number(fewer)} × is fewer FLOPs executed an image; "
            f"the remaining {number(over['median'] / fewer)} × is FLOPs done faster."
        )
        if count is not step:
            section.sources.append(count)
        said = f"FLOPs, in the eager variants: {count.made} ({count.path.name})"
        section.basis.append(Basis("COUNTED", said))
    rows: list[list[str | Basis]] = []
    for name, row, own_counts in zip(best, (ours, theirs), counts, strict=True):
        flops = [own_counts.get(key) for key in ("executed_flops", "useful_flops")]
        rows.append([
            str(name), shown(spread(row["images_per_second"])),
            number(row["peak_bytes"] / 1e9), number(row.get("library_bytes", 0) / 1e9),
            *(number(f / 1e9) if f else "–" for f in flops),
            number(flops[0] / flops[1]) if flops[0] and flops[1] else "–",
        ])  # fmt: skip
    head = ["best of each", "images/s (p20–p80)", "peak GB", "libraries GB",
            "GFLOP executed an image", "GFLOP useful", "executed / useful"]  # fmt: skip
    section.tables.append(Table(head, rows))


def _counts(step: Result, start: str) -> dict[str, float]:
    """What was counted of the first variant of an owner that has both kinds of FLOPs."""
    found = [
        row["counted"] for name, row in step.record["variants"].items() if name.startswith(start)
    ]
    return next((c for c in found if c.keys() >= {"executed_flops", "useful_flops"}), {})
