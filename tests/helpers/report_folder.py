"""Folders of a demo and of a training run with invented results, for test_report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

METRICS = ("colourfulness", "sharpness", "alignment", "verifier")
MODELS = ("baseline", "miro", "only_alignment")
CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)
TOTAL = 115_200
START, STEP = 17_280, 7_200
FINAL = {
    "unguided": {
        "baseline": (32.5, 2.00, 0.436, 0.188),
        "miro": (69.2, 2.90, 0.685, 0.514),
        "only_alignment": (41.3, 2.21, 0.742, 0.598),
    },
    "guided": {
        "baseline": (51.9, 2.46, 0.705, 0.479),
        "miro": (74.3, 2.75, 0.716, 0.523),
        "only_alignment": (55.0, 2.38, 0.759, 0.641),
    },
    "reward_guided": {"miro": (85.8, 3.07, 0.673, 0.509)},
}
EFFICIENCIES = {
    "unguided": {
        "colourfulness": TOTAL / START,
        "sharpness": TOTAL / START,
        "alignment": 4.0,
        "verifier": 3.3,
    },
    "guided": {
        "colourfulness": TOTAL / START,
        "sharpness": 3.2,
        "alignment": 1.25,
        "verifier": None,
    },
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_log(path: Path, rng: np.random.Generator, total: int = TOTAL, every: int = 1_280) -> None:
    lines = [
        {
            "images": images,
            "time": 1000.0 + images / 229,
            "loss": 0.42 * (images / every) ** -0.3 + 0.01 * rng.standard_normal(),
            "gradient_norm": 1.4 * (images / every) ** -0.2 + 0.05 * abs(rng.standard_normal()),
            "images_per_second": 229 + 6 * rng.standard_normal(),
            "mfu": 0.31,
            **{f"loss_by_t/0.{k}5": 0.1 * (10 - k) for k in range(10) if k != 3},
            **{f"loss_by_reward/only_art/{third}": 0.4 for third in ("low", "middle", "high")},
        }
        for images in range(every, total + 1, every)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_random_image(path: Path, width: int, height: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def grid_record(folder: Path, name: str, title: str, rows: list[str], columns: list[str]) -> dict:
    rng = np.random.default_rng(len(name))
    write_random_image(folder / f"grids/{name}.png", 8 * len(columns), 8 * len(rows), rng)
    return {
        "title": title,
        "caption": f"A note on {name}.",
        "rows": rows,
        "columns": columns,
        "image": f"grids/{name}.png",
        "cell": 8,
    }


def make_curves() -> dict[str, Any]:
    """Curves that end at FINAL; one checkpoint is before `start`."""
    checkpoints = [*range(START - STEP, TOTAL, STEP), TOTAL]
    curves: dict[str, Any] = {"checkpoints": checkpoints, "start": START}
    for setting in ("unguided", "guided"):
        curves[setting] = {
            model: {
                metric: [end * (1 - 0.7 * math.exp(-m / 3e4) + 0.7 * math.exp(-TOTAL / 3e4))
                         for m in checkpoints]
                for metric, end in zip(METRICS, FINAL[setting][model], strict=True)
            }
            for model in ("baseline", "miro")
        }  # fmt: skip
    return curves


def make_demo(folder: Path) -> Path:
    """Write a demo folder; returns it."""
    rng = np.random.default_rng(0)
    final = {
        setting: {model: dict(zip(METRICS, row, strict=True)) for model, row in models.items()}
        for setting, models in FINAL.items()
    }
    errors = dict(zip(METRICS, (0.7, 0.02, 0.006, 0.018), strict=True))
    categories = {
        setting: {
            model: {
                c: min(1.0, row[3] * w)
                for c, w in zip(CATEGORIES, (1.6, 0.9, 1.1, 1.3, 0.5, 0.6), strict=True)
            }
            for model, row in models.items()
        }
        for setting, models in FINAL.items()
    }
    results = {
        "data_efficiency": EFFICIENCIES,
        "final": final,
        "standard_error": {s: {m: errors for m in models} for s, models in FINAL.items()},
        "verifier_by_category": categories,
        "diversity": {"baseline": 0.412, "miro": 0.377, "only_alignment": 0.391},
        "images_per_second": 229.4,
        "wall_seconds": 1483.2,
        "seconds": {"scenes": 27.2, "fit_clip": 105, "encode": 41, "train": 1050, "evaluate": 260},
        "settings": {
            "unguided": {
                "text_scale": 0,
                "targets": {"colourfulness": 0.75, "sharpness": 1, "alignment": 1},
                "steps": 16,
                "description": "s⁺ = (0.75, 1, 1), one network call per step.",
            },
            "guided": {
                "text_scale": 3,
                "targets": {},
                "steps": 16,
                "description": "Text guidance of scale 3 in both models.",
            },
        },
        "versions": {"python": "3.13.5", "torch": "2.14.1", "miro-trainer": "0.1.0"},
        "seed": 0,
        "quick": False,
    }
    write_json(folder / "results.json", results)
    write_json(folder / "curves.json", make_curves())
    prompts = ["a photo of a red apple", "two cars", "a frog left of a star"]
    grids = [
        grid_record(folder, "targets", "Highest and lowest targets",
                    ["s⁺ = 1", "s⁺ = 0"], prompts),
        grid_record(folder, "trade", "Colour traded against alignment",
                    ["colourfulness", "alignment"], ["0", "0.25", "0.5", "0.75", "1"]),
    ]  # fmt: skip
    write_json(folder / "grids.json", grids)
    for model in MODELS:
        write_log(folder / model / "metrics.jsonl", rng)
    return folder


def make_run(folder: Path) -> Path:
    config = {
        "model": {"channels": 192, "depth": 6},
        "images": TOTAL,
        "seed": 0,
        "optimizer": {"learning_rate": 0.002},
        "data": "/data/cats & dogs",
    }
    write_json(folder / "config.json", config)
    write_log(folder / "metrics.jsonl", np.random.default_rng(1))
    return folder
