"""The plots of each type of result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from roofline import Device, by_group, project

from miro.report.render import label
from page.charts import bars, lines, roofline_chart
from page.result_files import Quantity, Result, Spread, spread

GPU_STEPS = {
    "kernels, rest compiled": "fused", "compiled": "torch.compile", "kernels": "fused, rest eager",
    "eager": "eager",
}  # fmt: skip
"""Names on the page of the training steps of gpu_check.py."""
GPU_STEP_BATCH = 64  # gpu_steps.STEP_BATCH, which its files do not record
_HEADLINES = {
    "step budget": "bytes", "GPU check": "steps", "kernels": "bytes_over_inductor",
    "FLOPs": "forward", "demo": "verifier",
}  # fmt: skip
_MOST_LINES = 6


@dataclass(frozen=True)
class Plot:
    """A figure with its title, a note and the names of its files."""

    name: str
    title: str
    note: str
    figure: Figure
    source: str = ""


def assumed_device(budget: Result, name: str) -> Device:
    """A device with the assumptions of a budget file."""
    assumptions = budget.record["assumptions"][name]
    return Device(**{field: assumptions[field] for field in Device.__dataclass_fields__})


def projected(budget: Result, variant: str, device: str = "") -> Any:
    """DataFrame of a step projected on a device, by default the first of the budget."""
    device = device or next(iter(budget.record["assumptions"]))
    rows = budget.record["variants"][variant]["operations"]
    return project(rows, assumed_device(budget, device))


def step_rates(gpu: Result) -> dict[str, float]:
    """Images/s of the training steps of gpu_check.py."""
    steps = gpu.record["steps"]
    return {
        name: 1e3 * GPU_STEP_BATCH / steps[step]["milliseconds"]
        for step, name in GPU_STEPS.items()
        if step in steps
    }


def kernel_times(gpu: Result) -> Any:
    """Our kernels joined with torch.compile's (suffix `_compile`) by op and direction."""
    rows: Any = pd.DataFrame(gpu.record["rows"])
    ours, compiled = (rows[rows["variant"] == name] for name in ("kernels", "torch.compile"))
    both = ours.merge(compiled, on=["op", "direction"], suffixes=("", "_compile"))
    return both.assign(speedup=both["median_compile"] / both["median"])


def best_variant(step: Result, owner: str) -> str | None:
    """The variant with the most images/s whose name starts with `owner`."""
    rows = step.record["variants"]
    names = [name for name in rows if name.startswith(owner)]
    return max(names, key=lambda name: rows[name]["images_per_second"]["median"], default=None)


def best_plans(plan: Result) -> Any:
    """The fastest ZeRO stage that fits, by preset and number of GPUs.

    Returns:
        Images/s per GPU, indexed by preset and GPUs.
    """
    rows: Any = pd.DataFrame(plan.record["rows"])
    rows = rows[rows["fits"]] if "fits" in rows else rows
    best = rows.groupby(["preset", "gpus"], sort=False)["images_per_second"].idxmax()
    rows = rows.loc[best].set_index(["preset", "gpus"])
    return rows["images_per_second"] / rows.index.get_level_values("gpus")


def _spreads(rows: Mapping[str, Any]) -> dict[str, Quantity]:
    return {name: spread(row) for name, row in rows.items()}


def _budget(result: Result) -> list[Plot]:
    name = next(iter(result.record["assumptions"]))
    steps = {variant: projected(result, variant) for variant in ("fused", "eager")}
    seconds: Any = pd.DataFrame({v: by_group(step)["seconds"] for v, step in steps.items()})
    times = {
        group: {variant: 1e3 * value for variant, value in row.items() if value == value}
        for group, row in seconds.sort_values("fused", ascending=False).iterrows()
    }
    chart = roofline_chart(steps, assumed_device(result, name))
    note = f"{result.record['settings']['batch']} images, projected"
    return [
        Plot("roofline", f"Roofline of a step, {name}", "groups with FLOPs; projected", chart),
        Plot("groups", f"Time of a step by group, {name}", note, bars(times, "ms")),
    ]


def _gpu(result: Result) -> list[Plot]:
    plots = []
    rates = step_rates(result)
    if rates:
        rows = {
            name: {"kernels" if name.startswith("fused") else name: rate}
            for name, rate in rates.items()
        }
        note = f"batch {GPU_STEP_BATCH}, {result.device}, measured"
        plots.append(Plot("steps", "Training step", note, bars(rows, "images/s")))
    times = kernel_times(result)
    speedups = {f"{r.op}, {r.direction}": {"kernels": r.speedup} for r in times.itertuples()}
    if speedups:
        chart = bars(speedups, "torch.compile’s time / kernel’s", reference=1)
        note = f"{result.device}, measured"
        plots.append(Plot("kernels", "Kernels against torch.compile", note, chart))
    return plots


def _tiles(result: Result) -> list[Plot]:
    times: Any = pd.DataFrame(result.record["rows"]).groupby("kernel", sort=False)["median"]
    rows = {
        f"{kernel}, {len(found)} tried": {
            "fastest": found.min(), "median": found.median(), "slowest": found.max()
        }
        for kernel, found in times
    }  # fmt: skip
    return [Plot("tiles", "Tiles tried", f"{result.device}, measured", bars(rows, "ms"))]


def _kernels(result: Result) -> list[Plot]:
    rows = {
        f"{row['op']}, {row['direction']}": {"kernels": row["bytes_over_inductor"]}
        for row in result.record["rows"]
    }
    chart = bars(rows, "bytes / torch.compile’s", reference=1)
    return [Plot("bytes", "Bytes of each kernel", "counted, not timed", chart)]


def _step(result: Result) -> list[Plot]:
    variants, settings = result.record["variants"], result.record["settings"]
    rates = {
        name: {name.partition(" ")[0].rstrip(","): spread(row["images_per_second"])}
        for name, row in variants.items()
    }
    times: dict[str, dict[str, Quantity]] = {}
    for owner in ("ours", "released"):
        best = best_variant(result, f"{owner} ")
        for phase, row in (variants[best]["milliseconds"] if best else {}).items():
            times.setdefault(phase, {})[owner] = spread(row)
    note = f"batch {settings['batch']}, width / {settings['scale']}, {result.device}, measured"
    return [
        Plot("rates", "Training step", note, bars(rates, "images/s")),
        Plot("phases", "The fastest variant of each by phase", note, bars(times, "ms")),
    ]


def _flops(result: Result) -> list[Plot]:
    names = {"small": "ours", "large": "ours", "released MIRO": "released"}
    rows = sorted(result.record["rows"], key=lambda row: row["forward"])
    values = {
        f"{row['model']}, {row['text']:g} text tokens": {
            names.get(row["model"], "published"): row["forward"] / 1e9
        }
        for row in rows
        if row["pixels"] == 256
    }
    chart = bars(values, "GFLOP, logarithmic", log=True) if values else None
    title = "A forward pass of one image, 256 px"
    return [Plot("flops", title, "counted", chart)] if chart else []


def _scale(result: Result) -> list[Plot]:
    rates = best_plans(result).unstack("preset")
    chart = lines([f"{n:g}" for n in rates.index], rates, "GPUs; images/s of each, logarithmic")
    return [Plot("scale", "Images/s per GPU", "projected", chart)]


def _sampling(result: Result) -> list[Plot]:
    rows: dict[str, dict[str, Quantity]] = {}
    for name, row in result.record["variants"].items():
        case, _, mode = name.rpartition(", ")
        rows.setdefault(case or "all", {})[mode] = spread(row["images_per_second"])
    settings = result.record["settings"]
    note = f"{settings['preset']}, {settings['steps']} steps, {result.device}, measured"
    return [Plot("rates", "Sampling", note, bars(rows, "images/s"))]


def _precision(result: Result) -> list[Plot]:
    rows = result.record["variants"].items()
    values = {name: {"ours": spread(row["images_per_second"])} for name, row in rows}
    note = ", ".join(filter(None, (result.device, "measured")))
    return [Plot("rates", "Training step of the demo", note, bars(values, "images/s"))]


def _demo(result: Result) -> list[Plot]:
    rows: dict[str, dict[str, Quantity]] = {}
    for setting, factors in result.record["data_efficiency"].items():
        for metric, factor in factors.items():
            if factor is not None:
                rows.setdefault(label(metric), {})[label(setting)] = float(factor)
    chart = bars(rows, "the baseline’s images / MIRO’s", reference=1) if rows else None
    return [Plot("data-efficiency", "Data efficiency", "measured", chart)] if chart else []


def _data(result: Result) -> list[Plot]:
    rows = {
        f"{row['task']}, {' × '.join(f'{side:g}' for side in row['pixels'])}": _spreads(
            row["ratio_to_pillow"]
        )
        for row in result.record["decoding"]
    }
    chart = bars(rows, "images/s / Pillow’s", reference=1)
    return [Plot("decoding", "Decoding", f"{result.device}, measured", chart)]


def _rewards(result: Result) -> list[Plot]:
    rates = _spreads(result.record["scoring"]["images_per_second"])
    plan = result.record["projection"]["rewards"].items()
    hours = {name: {"projection": row["projected_h100_hours"]} for name, row in plan}
    chart = bars({name: {"ours": rate} for name, rate in rates.items()}, "images/s")
    return [
        Plot("scoring", "Seven rewards", f"{result.device}, measured", chart),
        Plot("hours", "Scoring the dataset", "projected", bars(hours, "H100-hours")),
    ]


def _rewards_on_gpu(result: Result) -> list[Plot]:
    rows = result.record["networks"]["rewards"].items()
    hours = {name: {"measured": row["gpu_hours"]} for name, row in rows}
    note = f"networks alone, {result.device}, measured"
    return [Plot("hours", "Scoring the dataset", note, bars(hours, "GPU-hours"))]


_PLOTS: dict[str, Callable[[Result], list[Plot]]] = {
    "step budget": _budget, "GPU check": _gpu, "tiles": _tiles, "kernels": _kernels, "step": _step,
    "FLOPs": _flops, "scale plan": _scale, "sampling": _sampling, "precision": _precision,
    "demo": _demo, "data": _data, "rewards": _rewards, "rewards on a GPU": _rewards_on_gpu,
}  # fmt: skip


def plots_of(result: Result) -> list[Plot]:
    """The plots of a file."""
    return [replace(plot, source=result.path.name) for plot in _PLOTS[result.type.name](result)]


def history_plot(results: Sequence[Result]) -> Plot | None:
    """Plot the main quantities of comparable results, relative to the first; None without any."""
    table: Any = pd.DataFrame(
        [
            {n: v.median if isinstance(v, Spread) else v for n, v in result.quantities.items()}
            for result in results
        ]
    )
    headline = _HEADLINES.get(results[0].type.name, "images_per_second")
    shared = [
        name
        for name in table
        if headline in str(name) and table[name].iloc[0] > 0 and table[name].count() > 1
    ][:_MOST_LINES]
    if not shared:
        return None
    table = table[shared] / table[shared].iloc[0]
    table.columns = [str(name).replace("_", " ") for name in shared]
    # At least ±15 %, so that noise stays small.
    limits = min(0.85, 0.95 * table.min().min()), max(1.15, 1.05 * table.max().max())
    days = [result.date for result in results]
    if len(set(days)) < len(days):
        days = [f"{result.date[5:]} {result.record.get('commit', '')}" for result in results]
    source = ", ".join(result.path.name for result in results)
    chart = lines(days, table.to_dict("list"), "date", limits)
    return Plot("history", results[0].series, "relative to the first", chart, source)
