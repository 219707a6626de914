"""What the scripts of this folder write into results/: how a file is told, and its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Shapes of values: a type, a list of one shape, names with shapes (others are ignored), or `...`
# for any names.
POSITIVE, NUMBER, MAYBE = "a positive number", "a number", "a number or null"
SPREAD = {"median": POSITIVE, "p20": POSITIVE, "p80": POSITIVE}
COUNTS = {"launches": NUMBER, "flops": NUMBER, "bytes": NUMBER}


@dataclass(frozen=True)
class Kind:
    """One script's results."""

    name: str
    pattern: str
    """Of the names its files have."""
    command: str
    """That makes one."""
    told_by: frozenset[str]
    """Fields of the record, its first row or its first variant, which no other kind has."""
    shape: dict[str, Any]
    flat: Callable[[Any], Any] = lambda record: record
    """The record with names in place of numbered rows, for `compare.quantities`."""


def _named(rows: Sequence[Any], *keys: str) -> dict[str, Any]:
    """Rows by what tells them apart."""
    return {", ".join(str(row[key]) for key in keys): row for row in rows}


def _kernels(record: Any) -> Any:
    rows = _named(record["rows"], "op", "direction").items()
    ratios = {name: {k: v for k, v in row.items() if "_over_" in k} for name, row in rows}
    return {"counted": ratios}


def _flops(record: Any) -> Any:
    rows = _named(record["rows"], "model", "pixels", "text").items()
    counted = ("parameters", "forward", "training", "sampling")
    return {"counted": {name: {key: row[key] for key in counted} for name, row in rows}}


def _precision(record: Any) -> Any:
    rows = record["variants"].items()
    rates = {name: {"median": row["images_per_second"], **row} for name, row in rows}
    return {"images_per_second": rates}


def _demo(record: Any) -> Any:
    factors, final = record["data_efficiency"], record["final"]
    verifier = {
        setting: {model: scores.get("verifier") for model, scores in models.items()}
        for setting, models in final.items()
    }
    return {"counted": {"crossing factor": factors, "verifier": verifier}}


_BUDGET = {
    "counted": {...: COUNTS},
    "projected_seconds": {...: POSITIVE},
    "operations": [{"op": str, "group": str, "calls": NUMBER, **COUNTS}],
}
_DATA_ROW = {
    "task": str, "pixels": [NUMBER], "images_per_second": {...: SPREAD},
    "ratio_to_pillow": {...: SPREAD}, "bytes_a_pixel": NUMBER,
}  # fmt: skip
KINDS = (
    Kind(
        "step budget", "budget-*.json", "python profiling/step_budget.py",
        frozenset({"assumptions", "projected_seconds"}),
        {
            "date": str, "settings": {"preset": str, "batch": POSITIVE, "text": NUMBER},
            "useful_flops": POSITIVE,
            "assumptions": {...: {
                "flops": POSITIVE, "bandwidth": POSITIVE, "gemm": POSITIVE, "attention": POSITIVE,
                "memory": POSITIVE, "launch": NUMBER,
            }},
            "variants": {"eager": _BUDGET, "fused": _BUDGET},
        },
    ),
    Kind(
        "GPU check", "gpu-*.json", "make gpu-check",
        frozenset({"peaks", "steps"}),
        {
            "device": str, "date": str, "commit": str,
            "peaks": {"gigabytes": POSITIVE, "teraflops": POSITIVE},
            "rows": [{"op": str, "direction": str, "variant": str, "bytes": NUMBER,
                      "flops": NUMBER, **SPREAD}],
            "steps": {...: {"milliseconds": POSITIVE, "gigabytes": POSITIVE}},
        },
        lambda record: {
            "milliseconds": _named(record["rows"], "op", "direction", "variant"),
            "steps": {"counted": record["steps"]},
        },
    ),
    Kind(
        "tiles", "tiles-*.json", "python profiling/search_tiles.py",
        frozenset({"kernel"}),
        {"device": str, "date": str, "rows": [{"kernel": str, "settings": dict, **SPREAD}]},
        lambda record: {},
    ),
    Kind(
        "kernels", "kernels.json", "python profiling/kernel_report.py",
        frozenset({"bytes_over_least"}),
        {"rows": [{"op": str, "direction": str, "bytes_over_least": POSITIVE,
                   "bytes_over_eager": POSITIVE, "bytes_over_inductor": POSITIVE}]},
        _kernels,
    ),
    Kind(
        "step", "step-*.json", "python profiling/bench_step.py --released FOLDER",
        frozenset({"ratio", "peak_bytes"}),
        {
            "device": str, "date": str, "commit": str, "ratio": {...: SPREAD},
            "settings": {"scale": POSITIVE, "batch": POSITIVE},
            "variants": {...: {"images_per_second": SPREAD, "milliseconds": {...: SPREAD},
                               "peak_bytes": POSITIVE, "counted": {...: POSITIVE}}},
        },
    ),
    Kind(
        "FLOPs", "flops.json", "python profiling/count_flops.py --released FOLDER",
        frozenset({"derived"}),
        {"date": str, "rows": [{
            "model": str, "pixels": NUMBER, "text": NUMBER, "steps": NUMBER, "calls": NUMBER,
            "parameters": POSITIVE, "forward": POSITIVE, "training": POSITIVE, "sampling": POSITIVE,
        }]},
        _flops,
    ),
    Kind(
        "scale plan", "scale_plan.json", "python profiling/scale_plan.py",
        frozenset({"gpus", "gpu_bytes"}),
        {"assumptions": {"gpu": str, "peak": POSITIVE, "utilisation": POSITIVE, "inside": POSITIVE,
                         "between": POSITIVE, "hidden": NUMBER},
         "rows": [{"preset": str, "gpus": POSITIVE, "stage": NUMBER,
                   "images_per_second": POSITIVE, "gpu_bytes": POSITIVE}]},
        lambda record: {},
    ),
    Kind(
        "sampling", "sample-*.json", "python profiling/bench_sample.py",
        frozenset({"variants", "seconds"}),
        {"device": str, "date": str, "commit": str,
         "settings": {"preset": str, "steps": POSITIVE, "precision": str},
         "variants": {...: {"seconds": SPREAD, "images_per_second": SPREAD,
                            "ratio": {"eager": SPREAD}}}},
    ),
    Kind(
        "precision", "precision-*.json",
        "python profiling/bench_precision.py --out profiling/results",
        frozenset({"ratio_to_eager_fp32"}),
        {"date": str, "variants": {...: {"images_per_second": POSITIVE, "p20": POSITIVE,
                                         "p80": POSITIVE, "ratio_to_eager_fp32": [POSITIVE]}}},
        _precision,
    ),
    Kind(
        "demo", "demo-*.json", "make demo",
        frozenset({"data_efficiency", "final"}),
        {"date": str, "commit": str, "data_efficiency": {...: {...: MAYBE}},
         "final": {...: {...: {...: NUMBER}}}},
        _demo,
    ),
    Kind(
        "data", "data-*.json", "python profiling/bench_data.py",
        frozenset({"decoding", "loading"}),
        {"device": str, "date": str, "commit": str, "decoding": [_DATA_ROW],
         "loading": {"batch": POSITIVE, "loader_images_per_second": SPREAD,
                     "step_images_per_second": SPREAD, "share_of_time_waiting": NUMBER}},
        lambda record: record | {"decoding": _named(record["decoding"], "task", "pixels")},
    ),
    Kind(
        "rewards", "rewards-cpu-*.json", "python profiling/bench_rewards.py",
        frozenset({"scoring", "projection"}),
        {
            "device": str, "date": str, "commit": str,
            "scoring": {"pixels": [NUMBER], "images_per_second": {...: SPREAD},
                        "together_to_apart": SPREAD},
            "projection": {"rewards": {...: {"projected_h100_hours": NUMBER}},
                           "pictures": POSITIVE, "share_of_peak_assumed": POSITIVE,
                           "projected_h100_hours": POSITIVE, "released_gpu_hours": POSITIVE},
        },
    ),
    Kind(
        "rewards on a GPU", "rewards-cuda-*.json",
        "python profiling/bench_rewards.py --device cuda",
        frozenset({"networks"}),
        {"device": str, "date": str, "commit": str,
         "networks": {"rewards": {...: {"pictures_per_second": POSITIVE, "gpu_hours": POSITIVE}},
                      "gpu_hours": POSITIVE}},
    ),
)  # fmt: skip
KIND = {kind.name: kind for kind in KINDS}
COUNTED = {"step budget", "FLOPs", "kernels"}
"""Kinds whose files say nothing of the machine they were made on."""
