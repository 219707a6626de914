"""Evaluations of the demo, each in a file of its own, and their summary in results.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miro.evaluate.measure import data_efficiency
from miro.rewards.base import Reward
from miro.rewards.registry import build_reward
from miro.sampling.pipeline import Pipeline
from miro.training.checkpoint import RunFolder
from miro.training.metrics_log import read_metrics
from miro.utils.atomic_io import write_text
from openmoji.alignment import alignment_auc
from openmoji.scene_metrics import CURVE_START, Setting, diversity, measure_scenes
from openmoji.scenes import heldout_prompts
from openmoji.verifier import Verifier, load_verifier

CURVE_SEED, FINAL_SEED = 4_242, 91_919
"""Seeds of the prompts of curves and of final evaluations; nothing is tuned on the latter."""
CURVE_SETTINGS = ("unguided", "guided")


@dataclass(frozen=True)
class Evaluators:
    """The rewards that models are conditioned on, and the verifier, which they are not."""

    rewards: tuple[Reward, ...]
    verifier: Verifier

    @classmethod
    def load(cls, verifier: Path, rewards: Sequence[str]) -> Evaluators:
        """Load the verifier's folder, and rewards as specified to `build_reward`."""
        return cls(tuple(build_reward(spec) for spec in rewards), load_verifier(verifier))


def alignment_spec(folder: Path) -> str:
    """The alignment reward of a demo folder, as specified to `build_reward`."""
    return f"openmoji.alignment:Alignment={folder / 'clip'}"


def _measured(folder: Path, model: str, name: str) -> Path:
    return folder / "measured" / model / f"{name}.json"


def evaluate_weights(
    folder: Path,
    model: str,
    name: str,
    setting: Setting,
    images: int,
    weights: Path,
    evaluators: Evaluators,
    *,
    prompts: int,
    prompt_seed: int,
) -> None:
    """Evaluate the weights of a model after `images` under a setting, unless already done."""
    path = _measured(folder, model, f"{name}-{images:012d}")
    if path.exists():
        return
    pipeline = Pipeline.load(weights)
    specs = [prompt.caption_spec for prompt in heldout_prompts(prompts, prompt_seed)]
    captions = [spec.caption for spec in specs]
    generated = pipeline(captions, setting.guidance(pipeline), steps=setting.steps)
    result = measure_scenes(generated, specs, evaluators.rewards, evaluators.verifier)
    write_text(path, json.dumps({"images": images, **asdict(result)}))


def evaluate_diversity(
    folder: Path, model: str, setting: Setting, weights: Path, prompts: int, seeds: int
) -> None:
    """Measure the diversity of the images of one caption, unless already done."""
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
    checkpoints: Sequence[int],
    seed: int,
    quick: bool,
) -> None:
    """Summarize all evaluations in curves.json and results.json."""
    curves = _curves(folder, checkpoints)
    write_text(folder / "curves.json", json.dumps(curves, indent=1))
    final = {name: _final(folder, name, models, checkpoints[-1]) for name in settings}
    rates = [line["images_per_second"] for line in read_metrics(RunFolder(folder / "miro").metrics)]

    def part(key: str) -> dict[str, Any]:
        return {
            name: {model: result[key] for model, result in by_model.items()}
            for name, by_model in final.items()
        }

    results = {
        "data_efficiency": {
            name: {
                metric: data_efficiency(
                    checkpoints, curves[name]["baseline"][metric], curve, curves["start"]
                )
                for metric, curve in curves[name]["miro"].items()
            }
            for name in CURVE_SETTINGS
        },
        "final": part("means"),
        "standard_error": part("errors"),
        "verifier_by_category": part("by_category"),
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


def _curves(folder: Path, checkpoints: Sequence[int]) -> dict[str, Any]:
    start = int(checkpoints[-1] * CURVE_START)
    curves: dict[str, Any] = {"checkpoints": list(checkpoints), "start": start}
    for name in CURVE_SETTINGS:
        curves[name] = {}
        for model in ("baseline", "miro"):
            paths = [_measured(folder, model, f"{name}-{images:012d}") for images in checkpoints]
            points = [_read(path)["means"] for path in paths]
            curves[name][model] = {
                metric: [point[metric] for point in points] for metric in points[0]
            }
    return curves


def _final(folder: Path, name: str, models: Sequence[str], images: int) -> dict[str, Any]:
    paths = {model: _measured(folder, model, f"final-{name}-{images:012d}") for model in models}
    return {model: _read(path) for model, path in paths.items() if path.exists()}


def _alignment_auc(folder: Path, quick: bool) -> dict[str, float]:
    path = _measured(folder, "clip", "auc")
    if not path.exists():
        reward = build_reward(alignment_spec(folder))
        write_text(path, json.dumps(alignment_auc(reward, scenes=40 if quick else 1_000)))
    return _read(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
