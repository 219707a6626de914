"""The demo's figures: each measured once, in a file of its own, then gathered in results.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miro.evaluate.measure import data_efficiency
from miro.rewards.base import Reward
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline
from miro.training.checkpoint import RunFolder
from miro.training.metrics_log import read_metrics
from miro.utils.atomic_io import write_text
from openmoji.alignment_auc import alignment_auc
from openmoji.scene_metrics import CURVE_START, Setting, diversity, measure
from openmoji.scenes import heldout_prompts
from openmoji.verifier import Verifier, load_verifier

CURVE_SEED, FINAL_SEED = 4_242, 91_919
"""Seeds of the prompts of curves and of final figures; nothing is tuned on the latter."""
CURVE_SETTINGS = ("unguided", "guided")


@dataclass(frozen=True)
class Judges:
    """The rewards the models are conditioned on, and the verifier they are not."""

    rewards: tuple[Reward, ...]
    verifier: Verifier

    @classmethod
    def load(cls, verifier: Path, rewards: Sequence[str]) -> Judges:
        """From the verifier's folder and rewards as `build_reward` takes them."""
        return cls(tuple(build_reward(spec) for spec in rewards), load_verifier(verifier))


def _measured(folder: Path, model: str, name: str) -> Path:
    return folder / "measured" / model / f"{name}.json"


def measure_weights(
    folder: Path,
    model: str,
    name: str,
    setting: Setting,
    images: int,
    weights: Path,
    judges: Judges,
    *,
    prompts: int,
    prompt_seed: int,
) -> None:
    """Measure weights under one setting, unless that was done."""
    path = _measured(folder, model, f"{name}-{images:012d}")
    if path.exists():
        return
    pipeline = Pipeline.load(weights)
    asked = heldout_prompts(prompts, prompt_seed)
    captions = [prompt.caption for prompt in asked]
    pictures = pipeline(captions, setting.guidance(pipeline), steps=setting.steps)
    said = [prompt.said for prompt in asked]
    result = measure(pictures, captions, judges.rewards, judges.verifier, said)
    write_text(path, json.dumps({"images": images, **asdict(result)}))


def measure_diversity(
    folder: Path, model: str, setting: Setting, weights: Path, prompts: int, seeds: int
) -> None:
    """Measure how much pictures of one caption differ, unless that was done."""
    path = _measured(folder, model, "diversity")
    if path.exists():
        return
    captions = [prompt.caption for prompt in heldout_prompts(prompts, CURVE_SEED)]
    value = diversity(Pipeline.load(weights), captions, setting, seeds)
    write_text(path, json.dumps({"diversity": value, "prompts": prompts, "seeds": seeds}))


def write_results(
    folder: Path,
    *,
    settings: Mapping[str, Setting],
    models: Sequence[str],
    marks: Sequence[int],
    seed: int,
    quick: bool,
) -> None:
    """Gather what was measured into curves.json and results.json."""
    curves = _curves(folder, marks)
    write_text(folder / "curves.json", json.dumps(curves, indent=1))
    final = {name: _finals(folder, name, models, marks[-1]) for name in settings}
    rates = [line["images_per_second"] for line in read_metrics(RunFolder(folder / "miro").metrics)]
    results = {
        "crossing_factor": {
            name: {
                metric: data_efficiency(
                    marks, curves[name]["baseline"][metric], curve, curves["start"]
                )
                for metric, curve in curves[name]["miro"].items()
            }
            for name in CURVE_SETTINGS
        },
        "final": _part(final, "means"),
        "standard_error": _part(final, "errors"),
        "verifier_by_category": _part(final, "by_category"),
        "diversity": {
            model: _read(_measured(folder, model, "diversity"))["diversity"] for model in models
        },
        "alignment_auc": _alignment_auc(folder, quick),
        "images_per_second": round(statistics.median(rates), 1),
        **_read(folder / "seconds.json"),
        "settings": {name: asdict(setting) for name, setting in settings.items()},
        "versions": _read(RunFolder(folder / "miro").versions),
        "seed": seed,
        "quick": quick,
    }
    write_text(folder / "results.json", json.dumps(results, indent=1))


def _curves(folder: Path, marks: Sequence[int]) -> dict[str, Any]:
    curves: dict[str, Any] = {"marks": list(marks), "start": int(marks[-1] * CURVE_START)}
    for name in CURVE_SETTINGS:
        curves[name] = {}
        for model in ("baseline", "miro"):
            points = [
                _read(_measured(folder, model, f"{name}-{mark:012d}"))["means"] for mark in marks
            ]
            curves[name][model] = {
                metric: [point[metric] for point in points] for metric in points[0]
            }
    return curves


def _finals(folder: Path, name: str, models: Sequence[str], images: int) -> dict[str, Any]:
    paths = {model: _measured(folder, model, f"final-{name}-{images:012d}") for model in models}
    return {model: _read(path) for model, path in paths.items() if path.exists()}


def _part(final: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {
        name: {model: result[key] for model, result in by_model.items()}
        for name, by_model in final.items()
    }


def _alignment_auc(folder: Path, quick: bool) -> dict[str, float]:
    path = _measured(folder, "clip", "auc")
    if not path.exists():
        reward = build_reward(f"alignment={folder / 'clip'}", torch.device("cpu"))
        write_text(path, json.dumps(alignment_auc(reward, scenes=40 if quick else 1_000)))
    return _read(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
