"""The whole demo, from images to a report, on two CPU cores.

Three models with the same network, seed and number of images are trained on the same uncurated
pairs: a baseline without rewards, MIRO with all rewards, and a specialist with one. The settings of
their evaluation are fixed in SETTINGS. Every stage resumes after an interruption, and complete
stages are skipped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.presets import preset
from miro.utils.atomic_io import write_text
from miro.utils.locks import exclusive_lock
from miro.utils.serialize import differences, to_dict
from openmoji.jobs import Job, Report, run_jobs
from openmoji.scene_metrics import CURVE_START, Setting

log = logging.getLogger(__name__)

PIXEL_REWARDS = ("colourfulness", "sharpness")
REWARDS = (*PIXEL_REWARDS, "alignment")
SPECIALIST = "alignment"
MODELS: Mapping[str, tuple[str, ...]] = {
    "baseline": (),
    "miro": REWARDS,
    f"only_{SPECIALIST}": (SPECIALIST,),
}
# Fixed before the reported runs, on earlier runs and the prompts of the curves; final evaluations
# have other prompts. The text scale is the best of 3, 5, 7, 9, 12 and 16 for a baseline; maximum
# colourfulness is outside the natural range of tints.
TARGETS = {"colourfulness": 0.75}
SETTINGS: Mapping[str, Setting] = {
    "unguided": Setting(
        targets=TARGETS, description="No guidance: one evaluation of the network per step."
    ),
    "guided": Setting(
        targets=TARGETS,
        text_scale=9.0,
        description="Text guidance at the baseline's best scale, with the same reward targets in "
        "both branches.",
    ),
    "reward_guided": Setting(
        targets=TARGETS,
        reward_scale=1.0,
        description="The paper's guidance: away from the lowest level of every reward, with the "
        "same caption in both branches.",
    ),
}
COMPILER = os.environ.get("CXX", "g++")
"""The C++ compiler of torch.compile's CPU kernels."""
CHECKPOINT_RATIO = 1.19
"""Of successive evaluated checkpoints: resolves a data efficiency to a fifth."""


@dataclass(frozen=True)
class DemoConfig:
    """Folder and size of the demo."""

    folder: Path = Path("runs/demo")
    seed: int = 0
    quick: bool = False
    """A tiny size that takes minutes, for tests; its results are meaningless."""
    workers: int = 0
    """Stages at a time, one thread each; 0 for one per core, at most three."""

    @property
    def samples(self) -> int:
        """Training images."""
        return 600 if self.quick else 60_000

    @property
    def prompts(self) -> tuple[int, int]:
        """Held-out prompts per point of a curve, and per final evaluation."""
        return (12, 24) if self.quick else (192, 768)

    def train_config(self, model: str) -> TrainConfig:
        """The training of one of MODELS."""
        config = preset("demo")
        if self.quick:
            small = replace(config.model, channels=64, depth=2, heads=2, hidden=128)
            config = replace(
                config, model=small, images=2_560, report_every=640, checkpoint_every=1_280
            )
        # Compilation takes longer than a quick run, and needs a C++ compiler.
        compiled = config.compile and not self.quick and shutil.which(COMPILER) is not None
        # All models have slots for all rewards, so they are the same network, and a model without a
        # reward can start before it is scored.
        conditioning = replace(config.conditioning, rewards=MODELS[model], reward_slots=REWARDS)
        return replace(
            config,
            data=self.folder / "encoded",
            seed=self.seed,
            ema_weights_at=self.eval_checkpoints(config),
            conditioning=conditioning,
            compile=compiled,
        )

    def eval_checkpoints(self, config: TrainConfig) -> tuple[int, ...]:
        """Images after which weights are evaluated, in geometric progression."""
        checkpoints, images = {config.images}, float(config.images)
        while images > config.images * CURVE_START:
            checkpoints.add(max(1, round(images / config.batch)) * config.batch)
            images /= CHECKPOINT_RATIO if not self.quick else 2.0
        return tuple(sorted(checkpoints))


def run_demo(config: DemoConfig) -> Path:
    """Run the stages that are not complete yet.

    Returns:
        The path of the report.

    Raises:
        ValueError: The folder has a demo of another configuration.
    """
    with exclusive_lock(config.folder):
        return _run_demo(config)


def _run_demo(config: DemoConfig) -> Path:
    _check_same_demo(config)
    if not config.quick and shutil.which(COMPILER) is None:
        log.warning("no C++ compiler %s: training is slower without torch.compile", COMPILER)
    jobs = [
        Job("scenes", _scenes, (config,)),
        Job("fit-clip", _fit_clip, (config,), ("scenes",)),
        Job("fit-verifier", _fit_verifier, (config,)),
        # Rewards of pixels need no fit-clip, so the baseline can start early; the second encode
        # only adds the new scores.
        Job("annotate", _annotate, (config, PIXEL_REWARDS), ("scenes",)),
        Job("encode", _encode, (config,), ("annotate",)),
        Job("annotate alignment", _annotate, (config, REWARDS), ("fit-clip", "encode")),
        Job("encode scores", _encode, (config,), ("annotate alignment",)),
    ]
    for model, rewards in MODELS.items():
        scored = "encode" if set(rewards) <= set(PIXEL_REWARDS) else "encode scores"
        jobs.append(Job(f"train {model}", _train, (config, model), (scored,)))
    for name, function, models in (
        ("curve", _curve, ("baseline", "miro")),
        ("final", _final, tuple(MODELS)),
    ):
        for model in models:
            needs = (f"train {model}", "fit-verifier")
            jobs.append(Job(f"{name} {model}", function, (config, model), needs))
    jobs.append(Job("grids", _grids, (config,), tuple(f"train {model}" for model in MODELS)))
    started = time.perf_counter()
    seconds = run_jobs(jobs, config.workers or min(os.cpu_count() or 1, 3))
    _add_seconds(config.folder, seconds, time.perf_counter() - started)
    from openmoji.demo_page import write_demo_report
    from openmoji.evaluations import write_results

    write_results(
        config.folder,
        settings=SETTINGS,
        models=tuple(MODELS),
        checkpoints=config.eval_checkpoints(config.train_config("miro")),
        seed=config.seed,
        quick=config.quick,
    )
    return write_demo_report(config.folder)


def _check_same_demo(config: DemoConfig) -> None:
    record = {"seed": config.seed, "quick": config.quick, "samples": config.samples}
    record["models"] = {
        model: to_dict(replace(config.train_config(model), data=None)) for model in MODELS
    }
    path = config.folder / "demo.json"
    if path.exists() and (found := differences(record, json.loads(path.read_text()))):
        raise ValueError(
            f"{config.folder} has a demo of another configuration ({'; '.join(found)}); give "
            "another --folder, or delete it"
        )
    write_text(path, json.dumps(record, indent=2))


def _add_seconds(folder: Path, seconds: Mapping[str, float], wall: float) -> None:
    """Add the seconds of this call to those of earlier calls."""
    path = folder / "seconds.json"
    before = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "wall_seconds": 0.0}
    total = {name: before["seconds"].get(name, 0.0) + taken for name, taken in seconds.items()}
    record = {
        "seconds": {name: round(taken, 1) for name, taken in total.items()},
        "wall_seconds": round(before["wall_seconds"] + wall, 1),
    }
    write_text(path, json.dumps(record))


def _specs(config: DemoConfig, rewards: tuple[str, ...]) -> list[str]:
    """Rewards as specified to `build_reward`."""
    from openmoji.evaluations import alignment_spec

    return [alignment_spec(config.folder) if name == "alignment" else name for name in rewards]


# The stages. They import on use, as each runs in a process of its own.


def _scenes(config: DemoConfig, report: Report) -> None:
    from openmoji.scenes import write_scenes

    write_scenes(config.folder / "scenes", samples=config.samples, seed=config.seed, split="train")


def _fit_clip(config: DemoConfig, report: Report) -> None:
    from openmoji.fit_clip import FitClipConfig, fit_clip

    small = FitClipConfig(steps=20, batch_size=16) if config.quick else FitClipConfig()
    fit_clip(config.folder / "scenes", config.folder / "clip", config=small, progress=report)


def _fit_verifier(config: DemoConfig, report: Report) -> None:
    from openmoji.verifier import VerifierConfig, fit_verifier

    dest = config.folder / "verifier"
    if (dest / "verifier.json").exists():
        return
    small = VerifierConfig(steps=20, scenes=400, test_scenes=60, width=8, warmup_steps=2)
    fit_verifier(dest, small if config.quick else VerifierConfig())


def _annotate(config: DemoConfig, rewards: tuple[str, ...], report: Report) -> None:
    from miro.prepare.annotate import AnnotateConfig, annotate

    annotate(
        config.folder / "scenes",
        config.folder / "annotated",
        rewards=_specs(config, rewards),
        config=AnnotateConfig(workers=1),
        progress=lambda done, total: report(done, total, ""),
    )


def _encode(config: DemoConfig, report: Report) -> None:
    from miro.prepare.encode import EncodeConfig, encode

    encode(
        config.folder / "annotated",
        config.folder / "encoded",
        config=EncodeConfig(workers=1),
        progress=lambda done, total: report(done, total, ""),
    )


def _train(config: DemoConfig, model: str, report: Report) -> None:
    from miro.training.loop import train
    from miro.training.metrics import TrainingProgress

    def show(progress: TrainingProgress) -> None:
        detail = f"loss {progress.loss:.4f}  {progress.images_per_second:,.0f} images/s"
        report(progress.images, progress.total, detail)

    train(config.train_config(model), config.folder / model, report=show)


def _curve(config: DemoConfig, model: str, report: Report) -> None:
    from openmoji.evaluations import CURVE_SEED, CURVE_SETTINGS, Evaluators, evaluate_weights

    evaluators = Evaluators.load(config.folder / "verifier", _specs(config, REWARDS))
    weights = RunFolder(config.folder / model).weights_written()
    for done, (images, path) in enumerate(weights):
        for name in CURVE_SETTINGS:
            evaluate_weights(
                config.folder, model, name, SETTINGS[name], images, path, evaluators,
                prompts=config.prompts[0], prompt_seed=CURVE_SEED,
            )  # fmt: skip
        report(done + 1, len(weights), f"{images:,} images")


def _final(config: DemoConfig, model: str, report: Report) -> None:
    from openmoji.evaluations import FINAL_SEED, Evaluators, evaluate_diversity, evaluate_weights

    evaluators = Evaluators.load(config.folder / "verifier", _specs(config, REWARDS))
    images, path = RunFolder(config.folder / model).weights_written()[-1]
    for name, setting in SETTINGS.items():
        if name == "reward_guided" and model != "miro":
            continue
        evaluate_weights(
            config.folder, model, f"final-{name}", setting, images, path, evaluators,
            prompts=config.prompts[1], prompt_seed=FINAL_SEED,
        )  # fmt: skip
    prompts, seeds = (4, 2) if config.quick else (24, 8)
    evaluate_diversity(config.folder, model, SETTINGS["unguided"], path, prompts, seeds)


def _grids(config: DemoConfig, report: Report) -> None:
    from openmoji.grids import write_grids

    write_grids(config.folder, SETTINGS["unguided"], columns=4 if config.quick else 10)
