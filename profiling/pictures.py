"""The plots of each kind of result, and the figures that plots and page both read from one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from charts import bars, dots, lines, roofline_plot
from matplotlib.figure import Figure
from result_files import Quantity, Result, Spread, spread
from roofline import Device, Row, seconds_by_group

from miro.report.render import label

GPU_STEPS = {
    "kernels, rest compiled": "fused", "compiled": "torch.compile", "kernels": "fused, rest eager",
    "eager": "eager",
}  # fmt: skip
"""Steps of gpu_check.py, as they are called here."""
# gpu_check.STEP_BATCH; its files do not say it.
GPU_STEP_BATCH = 64


@dataclass(frozen=True)
class Picture:
    """A plot, and what a reader must know of it."""

    name: str
    title: str
    note: str
    figure: Figure
    source: str = ""
    """The files it is from."""


def operations(budget: Result, variant: str) -> list[Row]:
    """The rows of a step as `step_budget.py` wrote them."""
    rows = budget.record["variants"][variant]["operations"]
    fields = ("op", "group", "calls", "launches", "flops", "bytes")
    return [Row(*(row[field] for field in fields)) for row in rows]


def device(budget: Result, name: str) -> Device:
    """What the file takes that device to reach."""
    fields = Device.__dataclass_fields__
    return Device(**{field: budget.record["assumptions"][name][field] for field in fields})


def first_device(budget: Result) -> str:
    """The device that tables and plots of a budget are for."""
    return next(iter(budget.record["assumptions"]))


def step_rates(gpu: Result) -> dict[str, float]:
    """Images/s of each training step that gpu_check.py timed."""
    steps = gpu.record["steps"]
    return {
        said: 1e3 * GPU_STEP_BATCH / steps[name]["milliseconds"]
        for name, said in GPU_STEPS.items()
        if name in steps
    }


def timed_beside(gpu: Result, rival: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of our kernels with the rival's of the same operation and direction."""
    rows = {(r["op"], r["direction"], r["variant"]): r for r in gpu.record["rows"]}
    return [
        (row, rows[op, direction, rival])
        for (op, direction, variant), row in rows.items()
        if variant == "kernels" and (op, direction, rival) in rows
    ]


def _budget(result: Result) -> list[Picture]:
    name = first_device(result)
    given = device(result, name)
    variants = {variant: operations(result, variant) for variant in ("fused", "eager")}
    taken = {variant: seconds_by_group(rows, given) for variant, rows in variants.items()}
    groups = list(dict.fromkeys(group for found in taken.values() for group in found))
    milliseconds = {
        group: {v: 1e3 * found[group] for v, found in taken.items() if group in found}
        for group in sorted(groups, key=lambda group: -taken["fused"].get(group, 0))
    }
    batch = result.record["settings"]["batch"]
    return [
        Picture(
            "roofline", f"Roofline of a step, {name}",
            "what computes, and the whole step; projected", roofline_plot(variants, given),
        ),
        Picture(
            "groups", f"Time of a step by group, {name}", f"{batch} images, projected",
            bars(milliseconds, "ms"),
        ),
    ]  # fmt: skip


def _gpu(result: Result) -> list[Picture]:
    found = []
    if rates := step_rates(result):
        owners = {"fused": "kernels", "fused, rest eager": "kernels"}
        rows = {name: {owners.get(name, name): rate} for name, rate in rates.items()}
        note = f"batch {GPU_STEP_BATCH}, {result.place}, measured"
        found.append(Picture("steps", "Training step", note, bars(rows, "images/s")))
    ratios = {
        f"{ours['op']}, {ours['direction']}": {"kernels": theirs["median"] / ours["median"]}
        for ours, theirs in timed_beside(result, "torch.compile")
    }
    if ratios:
        figure = bars(ratios, "torch.compile’s time over the kernel’s", mark=1)
        note = f"{result.place}, measured"
        found.append(Picture("kernels", "Kernels beside torch.compile", note, figure))
    return found


def _one(rows: dict[str, dict[str, Quantity]]) -> dict[str, dict[str, Quantity]]:
    """Rows of one bar each, in one colour."""
    return {name: {"ours": next(iter(row.values()))} for name, row in rows.items()}


def _tiles(result: Result) -> list[Picture]:
    times: dict[str, list[float]] = {}
    for row in result.record["rows"]:
        times.setdefault(row["kernel"], []).append(row["median"])
    rows: dict[str, dict[str, Quantity]] = {
        f"{kernel}, {len(found)} tried": {
            "fastest": min(found), "median": statistics.median(found), "slowest": max(found)
        }
        for kernel, found in times.items()
    }  # fmt: skip
    return [Picture("tiles", "Tiles that were tried", "measured", bars(rows, "ms"))]


def _kernels(result: Result) -> list[Picture]:
    rows: dict[str, dict[str, Quantity]] = {
        f"{row['op']}, {row['direction']}": {"kernels": row["bytes_over_inductor"]}
        for row in result.record["rows"]
    }
    figure = bars(rows, "bytes over torch.compile’s", mark=1)
    return [Picture("bytes", "Bytes of each kernel", "counted, not timed", figure)]


def _step(result: Result) -> list[Picture]:
    variants = result.record["variants"]
    rates = {
        name: {_owner(name): spread(row["images_per_second"])} for name, row in variants.items()
    }
    best = {"ours": best_of(result, "ours"), "released": best_of(result, "released ")}
    shown = {owner: variants[name]["milliseconds"] for owner, name in best.items() if name}
    phases = list(dict.fromkeys(phase for row in shown.values() for phase in row))
    times = {
        phase: {owner: spread(row[phase]) for owner, row in shown.items() if phase in row}
        for phase in phases
    }
    settings = result.record["settings"]
    note = f"batch {settings['batch']}, width / {settings['scale']}, {result.place}, measured"
    return [
        Picture("rates", "Training step", note, bars(rates, "images/s")),
        Picture("phases", "The best of each by phase", note, bars(times, "ms")),
    ]


def _owner(variant: str) -> str:
    return "released" if variant.startswith("released") else "ours"


def best_of(step: Result, start: str) -> str | None:
    """The fastest of the variants whose names begin so."""
    rows = step.record["variants"]
    own = [name for name in rows if name.startswith(start)]
    return max(own, key=lambda name: rows[name]["images_per_second"]["median"], default=None)


def _flops(result: Result) -> list[Picture]:
    rows = [row for row in result.record["rows"] if row["pixels"] == 256]
    owned = {"small": "ours, small", "large": "ours, large"}
    values = {
        f"{owned.get(row['model'], row['model'])}, {row['text']:g} text tokens": row["forward"]
        for row in sorted(rows, key=lambda row: row["forward"])
    }
    if not values:
        return []
    figure = dots({name: flops / 1e9 for name, flops in values.items()}, "GFLOP, logarithmic")
    return [Picture("flops", "A forward pass of one image, 256 px", "counted", figure)]


def best_plans(result: Result) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each preset and number of GPUs the fastest stage that fits."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result.record["rows"]:
        plans = found.setdefault(row["preset"], {})
        known = plans.get(row["gpus"])
        if row.get("fits", True) and (
            known is None or row["images_per_second"] > known["images_per_second"]
        ):
            plans[row["gpus"]] = row
    return found


def _scale(result: Result) -> list[Picture]:
    plans = best_plans(result)
    counts = sorted({gpus for rows in plans.values() for gpus in rows})
    series = {
        preset: [rows[n]["images_per_second"] / n if n in rows else math.nan for n in counts]
        for preset, rows in plans.items()
    }
    places, unit = [f"{n:g}" for n in counts], "GPUs; images/s on each, logarithmic"
    figure = lines(places, series, unit)
    return [Picture("scale", "Images/s of a GPU among many", "projected", figure)]


def _sampling(result: Result) -> list[Picture]:
    rows: dict[str, dict[str, Quantity]] = {}
    for name, row in result.record["variants"].items():
        case, _, how = name.rpartition(", ")
        rows.setdefault(case or "all", {})[how] = spread(row["images_per_second"])
    settings = result.record["settings"]
    note = f"{settings['preset']}, {settings['steps']} steps, {result.place}, measured"
    return [Picture("rates", "Sampling", note, bars(rows, "images/s"))]


def _precision(result: Result) -> list[Picture]:
    rows: dict[str, dict[str, Quantity]] = {
        name: {"ours": Spread(row["images_per_second"], row["p20"], row["p80"])}
        for name, row in result.record["variants"].items()
    }
    note = ", ".join(filter(None, (result.place, "measured")))
    return [Picture("rates", "Training step of the demo", note, bars(rows, "images/s"))]


def _demo(result: Result) -> list[Picture]:
    rows: dict[str, dict[str, Quantity]] = {}
    for setting, factors in result.record["data_efficiency"].items():
        for metric, factor in factors.items():
            if factor is not None:
                rows.setdefault(label(metric), {})[label(setting)] = float(factor)
    if not rows:
        return []
    figure = bars(rows, "the baseline’s images over MIRO’s", mark=1)
    return [Picture("crossing", "Crossing factors", "measured", figure)]


def _data(result: Result) -> list[Picture]:
    rows: dict[str, dict[str, Quantity]] = {
        f"{row['task']}, {' × '.join(f'{side:g}' for side in row['pixels'])}": {
            name: spread(found) for name, found in row["ratio_to_pillow"].items()
        }
        for row in result.record["decoding"]
    }
    figure = bars(rows, "images/s over Pillow’s", mark=1)
    return [Picture("decoding", "Decoding", f"{result.place}, measured", figure)]


def _rewards(result: Result) -> list[Picture]:
    rates = result.record["scoring"]["images_per_second"]
    rows: dict[str, dict[str, Quantity]] = {
        name: {name: spread(row)} for name, row in rates.items()
    }
    hours: dict[str, dict[str, Quantity]] = {
        name: {"projection": row["projected_h100_hours"]}
        for name, row in result.record["projection"]["rewards"].items()
    }
    note = f"{result.place}, measured"
    return [
        Picture("scoring", "Seven rewards", note, bars(_one(rows), "images/s")),
        Picture("hours", "Scoring the data set", "projected", bars(hours, "H100-hours")),
    ]


def _rewards_on_gpu(result: Result) -> list[Picture]:
    hours: dict[str, dict[str, Quantity]] = {
        name: {"measured": row["gpu_hours"]}
        for name, row in result.record["networks"]["rewards"].items()
    }
    note = f"networks alone, {result.place}, measured"
    return [Picture("hours", "Scoring the data set", note, bars(hours, "GPU-hours"))]


PICTURES: dict[str, Callable[[Result], list[Picture]]] = {
    "step budget": _budget, "GPU check": _gpu, "tiles": _tiles, "kernels": _kernels, "step": _step,
    "FLOPs": _flops, "scale plan": _scale, "sampling": _sampling, "precision": _precision,
    "demo": _demo, "data": _data, "rewards": _rewards, "rewards on a GPU": _rewards_on_gpu,
}  # fmt: skip


def pictures(result: Result) -> list[Picture]:
    """The plots of a file."""
    found = PICTURES[result.kind.name](result)
    return [replace(picture, source=result.path.name) for picture in found]
