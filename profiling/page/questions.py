"""The first three questions of the page: bounds, fusion and the released code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from roofline import by_bound, by_group

from miro.report.render import number
from page.result_files import Result, spread
from page.result_plots import (
    GPU_STEP_BATCH,
    GPU_STEPS,
    assumed_device,
    best_variant,
    kernel_times,
    projected,
    step_rates,
)
from page.sections import Provenance, Section, Table, percent, with_range

COMPILE, FUSED_COMPILED = "torch.compile", "fused, rest compiled"
# Rows of gpu_check.py whose name is not that of the operator.
OP_OF_CASE = {"reward_adaln gated": "reward_gated_residual_adaln"}


def assumptions(budget: Result, name: str) -> Provenance:
    """The assumptions of a projection on a device."""
    device = assumed_device(budget, name)
    return Provenance(
        "PROJECTION",
        f"{name}: {percent(device.gemm)} of {device.flops / 1e12:,.0f} TFLOP/s in matrix products, "
        f"{percent(device.attention)} in attention, {percent(device.memory)} of "
        f"{device.bandwidth / 1e12:g} TB/s elsewhere, {1e6 * device.launch:g} µs per launch, no "
        "host time",
    )


def bound(results: Sequence[Result]) -> Section:
    """Time of a step by group and by bound, on the first device of the budget."""
    section = Section("bound", "What bounds a step?")
    budget = section.latest(results, "step budget")
    if budget is None:
        return section
    name, batch = next(iter(budget.record["assumptions"])), budget.record["settings"]["batch"]
    fused, eager = projected(budget, "fused"), projected(budget, "eager")
    total, eager_total = fused["seconds"].sum(), eager["seconds"].sum()
    shares = {kind: seconds / total for kind, seconds in by_bound(fused).items()}
    products = fused["seconds"][fused["group"] == "GEMM"].sum() / total
    section.text.append(
        f"A fused step of {batch:g} images is projected to take {number(1e3 * total)} ms on an "
        f"{name}: {percent(shares['FLOPs'])} of it is bound by FLOPs (matrix products are "
        f"{percent(products)}), {percent(shares['bytes'])} by bytes and "
        f"{percent(shares['launches'])} by launches. The eager step is projected to take "
        f"{number(1e3 * eager_total)} ms, {percent(by_bound(eager)['bytes'] / eager_total)} of it "
        "bound by bytes. For each useful FLOP the fused step executes "
        f"{fused['flops'].sum() / budget.record['useful_flops']:.3f}."
    )
    gpu = next((r for r in reversed(results) if r.type.name == "GPU check"), None)
    rates = step_rates(gpu) if gpu else {}
    measured = gpu and {"fused", "fused, rest eager"} <= rates.keys()
    # Only a measurement on the same device and batch compares with the projection.
    if gpu and measured and name.split()[0] in gpu.device and batch == GPU_STEP_BATCH:
        compiled, rest_eager = (batch / rates[key] for key in ("fused", "fused, rest eager"))
        counted = FUSED_COMPILED in budget.record["variants"]
        expected = projected(budget, FUSED_COMPILED)["seconds"].sum() if counted else total
        section.text.append(
            f"Measured on {gpu.device}, it takes {number(1e3 * compiled)} ms with the rest "
            f"compiled and {number(1e3 * rest_eager)} ms with the rest eager: "
            f"{number(compiled / expected)} × and {number(rest_eager / total)} × the projection, "
            f"which {'' if counted else 'takes the rest as eager and '}excludes host time."
        )
        section.sources.append(gpu)
        section.cite("MEASURED", gpu)
    section.provenance.append(assumptions(budget, name))
    section.cite("COUNTED", budget)
    most = max(shares, key=lambda kind: shares[kind])
    section.headline = percent(shares[most]), f"of a fused step bound by {most}, projected, {name}"
    groups: Any = by_group(fused).assign(seconds_eager=0.0)
    groups = groups.reindex(groups.index.union(by_group(eager).index), fill_value=0)
    groups["seconds_eager"] = by_group(eager)["seconds"]
    groups = groups.fillna(0).sort_values("seconds", ascending=False)
    groups.loc["all"] = groups.sum()
    rows: list[list[str | Provenance]] = [
        [str(group), f"{row.launches:,.0f}", *(
            number(value) if value else "–"
            for value in (row.flops / 1e12, row.bytes / 1e9, 1e3 * row.seconds,
                          1e3 * row.seconds_eager)
        )]
        for group, row in groups.iterrows()
    ]  # fmt: skip
    head = ["fused step", "launches", "TFLOP", "GB", "ms", "ms, eager"]
    section.tables.append(Table(head, rows))
    section.add_plots(budget, "groups", "roofline")
    return section


def fusion(results: Sequence[Result]) -> Section:
    """Steps and kernels against torch.compile and eager."""
    section = Section("fusion", "What does fusion gain?")
    gpu = section.latest(results, "GPU check")
    kernels = section.latest(results, "kernels")
    budget = section.latest(results, "step budget")
    if gpu:
        _gpu_step(section, gpu)
        _gpu_kernels(section, gpu, kernels, budget)
        section.add_plots(gpu)
    if kernels:
        rows = sorted(kernels.record["rows"], key=lambda row: row["bytes_over_inductor"])
        fewer = sum(row["bytes_over_inductor"] < 0.99 for row in rows)
        low, high = (
            f"{number(row['bytes_over_inductor'])} × ({row['op']} {row['direction']})"
            for row in (rows[0], rows[-1])
        )
        section.text.append(
            f"Counted without a GPU, {fewer} of {len(rows)} passes move fewer bytes than "
            f"torch.compile’s: from {low} to {high}."
        )
        section.cite("COUNTED", kernels)
    if budget:
        steps = {name: _totals(budget, name) for name in budget.record["variants"]}
        text = (
            f"A fused step {steps['fused']}; the eager one {steps['eager']} (counted, nothing "
            "compiled)."
        )
        if {COMPILE, FUSED_COMPILED} <= steps.keys():
            text += (
                f" With the rest compiled it {steps[FUSED_COMPILED]}; torch.compile alone "
                f"{steps[COMPILE]} (as Inductor schedules both for an H100)."
            )
        section.text.append(text)
        section.cite("COUNTED", budget)
    return section


def _totals(budget: Result, variant: str) -> str:
    step = projected(budget, variant)
    moved = number(step["bytes"].sum() / 1e9)
    return f"launches {step['launches'].sum():,} kernels and moves {moved} GB"


def _gpu_step(section: Section, gpu: Result) -> None:
    """Whole training steps."""
    section.cite("MEASURED", gpu)
    rates, steps = step_rates(gpu), gpu.record["steps"]
    if not {"fused", COMPILE, "eager"} <= rates.keys():
        section.text.append(f"{gpu.path.name} has no whole steps; the run ended before them.")
        return
    memory = {name: steps[step]["gigabytes"] for step, name in GPU_STEPS.items() if step in steps}
    speedup = number(rates["fused"] / rates[COMPILE])
    section.text.append(
        f"On {gpu.device} a training step with the kernels reaches {number(rates['fused'])} "
        f"images/s: {speedup} × torch.compile alone ({number(rates[COMPILE])}) and "
        f"{number(rates['fused'] / rates['eager'])} × eager ({number(rates['eager'])}), in "
        f"{number(memory['fused'])} GB against {number(memory[COMPILE])} and "
        f"{number(memory['eager'])}."
    )
    section.headline = f"{speedup} ×", f"torch.compile’s images/s, measured on {gpu.device}"


def _gpu_kernels(
    section: Section, gpu: Result, kernels: Result | None, budget: Result | None
) -> None:
    """Each kernel against torch.compile."""
    times, peaks = kernel_times(gpu), gpu.record["peaks"]
    moved = {(r["op"], r["direction"]): r for r in kernels.record["rows"]} if kernels else {}
    operations = projected(budget, "fused").set_index("op") if budget else pd.DataFrame()

    def share(flops: float, bytes_: float, milliseconds: float) -> str:
        if flops:
            return f"{percent(flops / milliseconds / 1e9 / peaks['teraflops'])} FLOPs"
        return f"{percent(bytes_ / milliseconds / 1e6 / peaks['gigabytes'])} bytes"

    rows: list[list[str | Provenance]] = []
    for row in times.itertuples():
        backward = "_backward" if row.direction == "backward" else ""
        name = OP_OF_CASE.get(str(row.op), str(row.op)) + backward
        launches = "–"
        if name in operations.index:
            operation: Any = operations.loc[name]
            launches = f"{operation.launches / operation.calls:g}"
        rows.append([
            row.op, row.direction, number(row.median), number(row.median_compile),
            number(row.speedup), share(row.flops, row.bytes, row.median),
            share(row.flops_compile, row.bytes_compile, row.median_compile),
            number(moved.get((row.op, row.direction), {}).get("bytes_over_inductor")), launches,
        ])  # fmt: skip
    head = ["kernel", "", "ms", "ms, torch.compile", "speedup", "of peak",
            "of peak, torch.compile", "bytes / torch.compile’s, counted", "launches"]  # fmt: skip
    section.tables.append(Table(head, rows))
    if len(times):
        faster = (times["p80"] < times["p20_compile"]).sum()
        slower = (times["p20"] > times["p80_compile"]).sum()
        low, high = (
            f"{number(row.speedup)} × ({row.op} {row.direction})"
            for row in (times.loc[times["speedup"].idxmin()], times.loc[times["speedup"].idxmax()])
        )
        section.text.append(
            f"Of {len(times)} passes timed alone {faster} are faster than torch.compile’s beyond "
            f"noise and {slower} slower: from {low} to {high}."
        )


def released(results: Sequence[Result]) -> Section:
    """Speed, FLOPs and memory against the released training step."""
    section = Section("released", "How much does the released code waste?")
    step = section.latest(results, "step")
    flops = section.latest(results, "FLOPs")
    if step:
        _released_step(section, step, _counts(results, step))
    if flops:
        section.cite("COUNTED", flops)
        table: Any = pd.DataFrame(flops.record["rows"])
        passes = table[table["model"] == "released MIRO"].sort_values("text")
        if len(passes) > 1:
            short, long = passes.iloc[0], passes.iloc[-1]
            section.text.append(
                f"Padding texts from {short['text']:g} to {long['text']:g} tokens, as the "
                f"released training does, adds {100 * (long['forward'] / short['forward'] - 1):.1f}"
                " % to the FLOPs of its forward pass."
            )
        rows: list[list[str | Provenance]] = [
            [row["model"], f"{row['pixels']:g}", f"{row['text']:g}",
             *(number(row[key] / 1e9) for key in ("parameters", "forward", "training")),
             f"{row['steps']:g} × {row['calls']:g}", number(row["sampling"] / 1e12)]
            for row in flops.record["rows"]
        ]  # fmt: skip
        head = ["network", "pixels", "text tokens", "B parameters", "GFLOP forward",
                "GFLOP training", "sampling calls", "TFLOP per image"]  # fmt: skip
        section.tables.append(Table(head, rows, "FLOPs of all networks", folded=True))
        section.add_plots(flops)
    return section


def _counts(results: Sequence[Result], step: Result) -> tuple[Result, list[dict[str, float]]]:
    """FLOPs per image of our and the released network, and their file.

    Only eager steps are counted, so they may be in another file with equal FLOPs per image.
    """

    def shape(result: Result) -> tuple[object, ...]:
        settings = result.record["settings"]
        return settings["scale"], settings.get("padded"), set(settings.get("lengths", ()))

    same = [
        result for result in results if result.type is step.type and shape(result) == shape(step)
    ]
    for file in (step, *same):
        counts = []
        for owner in ("ours", "released "):
            rows = file.record["variants"].items()
            found = [row["counted"] for name, row in rows if name.startswith(owner)]
            counts += [c for c in found if c.keys() >= {"executed_flops", "useful_flops"}][:1]
        if len(counts) == 2:
            return file, counts
    return step, []


def _released_step(
    section: Section, step: Result, counted: tuple[Result, list[dict[str, float]]]
) -> None:
    settings, variants = step.record["settings"], step.record["variants"]
    section.cite("MEASURED", step)
    section.add_plots(step)
    best = [name for name in map(lambda o: best_variant(step, o), ("ours", "released ")) if name]
    if "released" not in step.record["ratio"] or len(best) < 2:
        section.text.append(
            f"{step.path.name} was written without the released package: {step.type.command}."
        )
        return
    speedup = spread(step.record["ratio"]["released"])
    rows = [variants[name] for name in best]
    peak = rows[0]["peak_bytes"] / rows[1]["peak_bytes"]
    own = [row["peak_bytes"] - row.get("library_bytes", 0) for row in rows]
    section.text.append(
        f"With the width divided by {settings['scale']:g}, on {step.device}, the fastest variant "
        f"of each: our step reaches {number(speedup.median)} × the images/s of the released one "
        f"({number(speedup.p20)} to {number(speedup.p80)}), in {number(peak)} × its peak memory "
        f"({number(own[0] / own[1])} × without libraries and compiler)."
    )
    section.headline = (
        f"{number(speedup.median)} ×", f"the released code’s images/s, measured on {step.device}"
    )  # fmt: skip
    file, counts = counted
    if counts:
        executed = [count["executed_flops"] for count in counts]
        waste = [count["executed_flops"] / count["useful_flops"] for count in counts]
        fewer = executed[1] / executed[0]
        section.text.append(
            f"For each useful FLOP it executes {number(waste[1])}, ours {number(waste[0])}. Of the "
            f"{number(speedup.median)} ×, {number(fewer)} × is fewer FLOPs executed per image; the "
            f"remaining {number(speedup.median / fewer)} × is a higher rate of FLOPs."
        )
        if file is not step:
            section.sources.append(file)
        section.cite("COUNTED", f"FLOPs of the eager variants: {file.origin}")
    cells: list[list[str | Provenance]] = []
    for name, row, count in zip(best, rows, counts or [{}, {}], strict=True):
        flops = [count.get(key) for key in ("executed_flops", "useful_flops")]
        cells.append([
            name, with_range(spread(row["images_per_second"])),
            number(row["peak_bytes"] / 1e9), number(row.get("library_bytes", 0) / 1e9),
            *(number(f / 1e9) if f else "–" for f in flops),
            number(flops[0] / flops[1]) if flops[0] and flops[1] else "–",
        ])  # fmt: skip
    head = ["fastest variant", "images/s (p20–p80)", "peak GB", "libraries GB",
            "GFLOP executed per image", "GFLOP useful", "executed / useful"]  # fmt: skip
    section.tables.append(Table(head, cells))
