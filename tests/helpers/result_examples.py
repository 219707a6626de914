"""Small results of every type on the profiling page, with round numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMIT = "abc1234"


def timed(median: float, spread: float = 0.1) -> dict[str, float]:
    return {"median": median, "p20": median - spread, "p80": median + spread}


def head(date: str = "2026-01-02", device: str = "a processor") -> dict[str, Any]:
    return {"date": date, "device": device, "commit": COMMIT}


def operation(op: str, group: str, launches: int, flops: float, moved: float) -> dict[str, Any]:
    return {"op": op, "group": group, "calls": 1, "launches": launches, "flops": flops,
            "bytes": moved}  # fmt: skip


def variant(*operations: dict[str, Any]) -> dict[str, Any]:
    return {
        "counted": {
            row["group"]: {key: row[key] for key in ("launches", "flops", "bytes")}
            for row in operations
        },
        "operations": list(operations),
        "projected_seconds": {"H100 SXM": 1.0},
    }


def budget() -> dict[str, Any]:
    """At half of 1 TFLOP/s and of 1 TB/s and 1 ms per launch, fused: 2 s, 1 s and 1 s."""
    one = {"flops": 1e12, "bandwidth": 1e12, "gemm": 0.5, "attention": 0.25, "memory": 0.5,
           "launch": 1e-3}  # fmt: skip
    product = operation("mm", "GEMM", 500, 1e12, 1e9)
    return head() | {
        "settings": {"preset": "small", "batch": 64, "text": 65},
        "useful_flops": 0.8e12,
        "assumptions": {"H100 SXM": one, "twice": one | {"flops": 2e12, "bandwidth": 2e12}},
        "variants": {
            "fused": variant(product, operation("copy_", "data movement", 500, 0.0, 0.5e12)),
            "eager": variant(product, operation("copy_", "data movement", 500, 0.0, 3.5e12)),
        },
    }


def gpu(device: str = "an H100") -> dict[str, Any]:
    """Steps of 100, 125 and 400 ms; one kernel twice as fast as torch.compile, one half."""

    def row(op: str, variant: str, milliseconds: float, flops: float = 0) -> dict[str, Any]:
        return {"op": op, "direction": "forward", "variant": variant, "bytes": 1e9, "flops": flops,
                **timed(milliseconds)}  # fmt: skip

    def step(milliseconds: float, gigabytes: float) -> dict[str, float]:
        return {"milliseconds": milliseconds, "gigabytes": gigabytes}

    return head(device=device) | {
        "peaks": {"gigabytes": 2000.0, "teraflops": 500.0},
        "rows": [
            row("adaln", "kernels", 1.0), row("adaln", "torch.compile", 2.0),
            row("attention", "kernels", 2.0, 1e11), row("attention", "torch.compile", 1.0, 1e11),
            row("unpaired", "kernels", 1.0),
        ],
        "steps": {"kernels, rest compiled": step(100, 20), "compiled": step(125, 25),
                  "eager": step(400, 50), "kernels": step(200, 21)},
    }  # fmt: skip


def kernels() -> dict[str, Any]:
    def row(op: str, over_inductor: float) -> dict[str, Any]:
        return {"op": op, "direction": "forward", "bytes_over_least": 1.0, "bytes_over_eager": 0.1,
                "bytes_over_inductor": over_inductor}  # fmt: skip

    return {"rows": [row("adaln", 0.4), row("attention", 1.0)]}


def step(released: bool = True) -> dict[str, Any]:
    """Three times the released rate, with half its memory and half its FLOPs."""

    def row(rate: float, peak: float, **counted: float) -> dict[str, Any]:
        return {"images_per_second": timed(rate), "milliseconds": {"forward": timed(1e3 / rate)},
                "peak_bytes": peak, "library_bytes": 1e9, "counted": counted}  # fmt: skip

    variants = {
        "ours compiled bf16": row(6.0, 2e9),
        "ours eager fp32": row(2.0, 3e9, executed_flops=1.1e11, useful_flops=1e11),
    }
    released_variants = {
        "released compiled bf16": row(2.0, 4e9),
        "released eager fp32": row(1.0, 5e9, executed_flops=2.2e11, useful_flops=1e11),
    }
    return head() | {
        "settings": {"scale": 4, "batch": 8},
        "variants": variants | (released_variants if released else {}),
        "ratio": {"eager": timed(3.0)} | ({"released": timed(3.0)} if released else {}),
        "failed": {},
    }


def flops() -> dict[str, Any]:
    def row(text: int, forward: float) -> dict[str, Any]:
        return {"model": "released MIRO", "pixels": 256, "text": text, "parameters": 3.6e8,
                "forward": forward, "training": 3 * forward, "sampling": 100 * forward,
                "steps": 50, "calls": 2}  # fmt: skip

    return head() | {"derived": {}, "rows": [row(77, 1e11), row(256, 1.1e11)]}


def precision(date: str, rate: float, **more: Any) -> dict[str, Any]:
    row = {"images_per_second": timed(rate, 1), "ratio_to_eager_fp32": [1]}
    return {"date": date, "variants": {"eager fp32": row}, **more}


def data() -> dict[str, Any]:
    row = {"task": "decode", "pixels": [640, 480], "bytes_per_pixel": 0.3,
           "images_per_second": {"Pillow": timed(100), "ours with DALI": timed(150)},
           "ratio_to_pillow": {"Pillow": timed(1), "ours with DALI": timed(1.5)}}  # fmt: skip
    loading = {"batch": 64, "loader_images_per_second": timed(9000),
               "step_images_per_second": timed(200), "share_of_time_waiting": 0.004}  # fmt: skip
    return head() | {"settings": {}, "decoding": [row], "loading": loading}


def rewards() -> dict[str, Any]:
    return head() | {
        "settings": {},
        "scoring": {"pixels": [1024, 768], "ratio_to_separate_passes": timed(1.75),
                    "images_per_second": {"one pass": timed(35), "separate passes": timed(20)}},
        "projection": {"rewards": {"clip": {"projected_h100_hours": 40.0}}, "images": 16e6,
                       "assumed_share_of_peak": 0.4, "projected_h100_hours": 123.0,
                       "released_gpu_hours": 369},
    }  # fmt: skip


EXAMPLES = {
    "budget-small.json": budget, "gpu-card.json": gpu, "kernels.json": kernels,
    "step-cpu.json": step, "flops.json": flops, "data-cpu.json": data, "rewards-cpu.json": rewards,
}  # fmt: skip


def write(folder: Path, **records: Any) -> Path:
    """Write the examples to `folder`; `records` replace some of them, None omits one."""
    examples = {name.removesuffix(".json"): make() for name, make in EXAMPLES.items()}
    for name, record in (examples | records).items():
        if record is not None:
            (folder / f"{name}.json").write_text(json.dumps(record))
    return folder
