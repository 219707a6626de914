"""`miro demo`: every stage, from pictures to a report, on two CPU cores.

Three models, the same network, seed and number of images, are trained on the same uncurated pairs:
a baseline that is told no reward, MIRO that is told all of them, and a specialist that is told one.
What they are asked for when they are measured is fixed in SETTINGS. Every stage goes on where it
was stopped, and what is done is not done again.
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
# Fixed before the runs that are reported, on earlier ones and the prompts of the curves; the final
# figures have prompts of their own. The text scale is the best of 3, 5, 7, 9, 12 and 16 for a
# baseline; colourfulness at its very highest leaves the natural range of tints.
TARGETS = {"colourfulness": 0.75}
SETTINGS: Mapping[str, Setting] = {
    "unguided": Setting(
        targets=TARGETS, description="No guidance: one evaluation of the network a step."
    ),
    "guided": Setting(
        targets=TARGETS,
        text_scale=9.0,
        description="Text guidance at the baseline's best scale, with the same rewards asked for "
        "in both branches.",
    ),
    "reward_guided": Setting(
        targets=TARGETS,
        reward_scale=1.0,
        description="The paper's guidance: away from the worst level of every reward, the caption "
        "the same in both branches.",
    ),
}
COMPILER = os.environ.get("CXX", "g++")
"""What torch.compile translates a CPU's kernels with."""
SPREAD = 1.19
"""Ratio of neighbouring marks of a curve: fine enough to read a crossing factor to a fifth."""


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo lives and how much it does."""

    folder: Path = Path("runs/demo")
    seed: int = 0
    quick: bool = False
    """All of it at a tiny size, in minutes, for tests: its figures mean nothing."""
    workers: int = 0
    """Stages at once, a thread each; 0 for one a core, at most three."""

    @property
    def samples(self) -> int:
        return 600 if self.quick else 60_000

    @property
    def prompts(self) -> tuple[int, int]:
        """Held-out prompts of a curve's point, and of the final figures."""
        return (12, 24) if self.quick else (192, 768)

    def train_config(self, model: str) -> TrainConfig:
        """The run of one of MODELS."""
        config = preset("demo")
        if self.quick:
            small = replace(config.model, channels=64, depth=2, heads=2, hidden=128)
            config = replace(
                config, model=small, images=2_560, report_every=640, checkpoint_every=1_280
            )
        # Compiling takes longer than all of a quick run, and is not to keep a bare machine out.
        compiled = config.compile and not self.quick and shutil.which(COMPILER) is not None
        # A place for every reward: a run that is not told one can begin before it is scored.
        conditioning = replace(config.conditioning, rewards=MODELS[model], reward_slots=REWARDS)
        return replace(
            config,
            data=self.folder / "encoded",
            seed=self.seed,
            ema_weights_at=self.marks(config),
            conditioning=conditioning,
            compile=compiled,
        )

    def marks(self, config: TrainConfig) -> tuple[int, ...]:
        """Images after which curves are measured: evenly spaced in their logarithm."""
        marks, mark = {config.images}, float(config.images)
        while mark > config.images * CURVE_START:
            marks.add(max(1, round(mark / config.batch)) * config.batch)
            mark /= SPREAD if not self.quick else 2.0
        return tuple(sorted(marks))


def run_demo(config: DemoConfig) -> Path:
    """Do what is not done yet, and return the report.

    Raises:
        ValueError: the folder holds a demo of another configuration.
    """
    with exclusive_lock(config.folder):
        return _run_demo(config)


def _run_demo(config: DemoConfig) -> Path:
    folder = config.folder
    _same_demo(config)
    if not config.quick and shutil.which(COMPILER) is None:
        log.warning("no C++ compiler %s: the networks are not compiled and train slower", COMPILER)
    trained = tuple(f"train {model}" for model in MODELS)
    jobs = [
        Job("scenes", _scenes, (config,)),
        Job("fit-clip", _fit_clip, (config,), needs=("scenes",)),
        Job("fit-verifier", _fit_verifier, (config,)),
        # What needs no fitted model is done meanwhile; encoding again takes up the new scores only.
        Job("annotate", _annotate, (config, PIXEL_REWARDS), needs=("scenes",)),
        Job("encode", _encode, (config,), needs=("annotate",)),
        Job("annotate alignment", _annotate, (config, REWARDS), needs=("fit-clip", "encode")),
        Job("encode scores", _encode, (config,), needs=("annotate alignment",)),
        *(
            Job(f"train {model}", _train, (config, model), needs=(_scored(model),))
            for model in MODELS
        ),
        *(
            Job(f"curve {model}", _curve, (config, model), (f"train {model}", "fit-verifier"))
            for model in ("baseline", "miro")
        ),
        *(
            Job(f"final {model}", _final, (config, model), (f"train {model}", "fit-verifier"))
            for model in MODELS
        ),
        Job("grids", _grids, (config,), needs=trained),
    ]
    started = time.perf_counter()
    seconds = run_jobs(jobs, config.workers or min(os.cpu_count() or 1, 3))
    _note_seconds(folder, seconds, time.perf_counter() - started)
    from openmoji.demo_page import write_demo_report
    from openmoji.evaluations import write_results

    write_results(
        folder,
        settings=SETTINGS,
        models=tuple(MODELS),
        marks=config.marks(config.train_config("miro")),
        seed=config.seed,
        quick=config.quick,
    )
    return write_demo_report(folder)


def _scored(model: str) -> str:
    """The job after which the data holds every reward the model is told."""
    return "encode" if set(MODELS[model]) <= set(PIXEL_REWARDS) else "encode scores"


def _same_demo(config: DemoConfig) -> None:
    record = {"seed": config.seed, "quick": config.quick, "samples": config.samples}
    record["models"] = {
        model: to_dict(replace(config.train_config(model), data=None)) for model in MODELS
    }
    path = config.folder / "demo.json"
    if path.exists() and (found := differences(record, json.loads(path.read_text()))):
        raise ValueError(
            f"{config.folder} holds a demo of another configuration ({'; '.join(found)}); give "
            "another --folder, or delete it"
        )
    write_text(path, json.dumps(record, indent=2))


def _note_seconds(folder: Path, seconds: Mapping[str, float], wall: float) -> None:
    """Add this call's seconds to those of calls before it."""
    path = folder / "seconds.json"
    before = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "wall_seconds": 0.0}
    total = {name: before["seconds"].get(name, 0.0) + taken for name, taken in seconds.items()}
    record = {
        "seconds": {name: round(taken, 1) for name, taken in total.items()},
        "wall_seconds": round(before["wall_seconds"] + wall, 1),
    }
    write_text(path, json.dumps(record))


def _specs(config: DemoConfig, rewards: tuple[str, ...]) -> list[str]:
    """Rewards as the command line names them, with the folder of weights where one needs it."""
    specs = {"alignment": f"openmoji.alignment:Alignment={config.folder / 'clip'}"}
    return [specs.get(name, name) for name in rewards]


# The stages: each is what the command of its name does.


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
    if (dest / "metrics.json").exists():
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
    from openmoji.evaluations import CURVE_SEED, Judges, measure_weights

    judges = Judges.load(config.folder / "verifier", _specs(config, REWARDS))
    weights = RunFolder(config.folder / model).weights_written()
    for done, (images, path) in enumerate(weights):
        for name in ("unguided", "guided"):
            setting = SETTINGS[name]
            measure_weights(
                config.folder, model, name, setting, images, path, judges,
                prompts=config.prompts[0], prompt_seed=CURVE_SEED,
            )  # fmt: skip
        report(done + 1, len(weights), f"{images:,} images")


def _final(config: DemoConfig, model: str, report: Report) -> None:
    from openmoji.evaluations import FINAL_SEED, Judges, measure_diversity, measure_weights

    judges = Judges.load(config.folder / "verifier", _specs(config, REWARDS))
    images, path = RunFolder(config.folder / model).weights_written()[-1]
    for name, setting in SETTINGS.items():
        if name == "reward_guided" and model != "miro":
            continue
        measure_weights(
            config.folder, model, f"final-{name}", setting, images, path, judges,
            prompts=config.prompts[1], prompt_seed=FINAL_SEED,
        )  # fmt: skip
    prompts, seeds = (4, 2) if config.quick else (24, 8)
    measure_diversity(config.folder, model, SETTINGS["unguided"], path, prompts, seeds)


def _grids(config: DemoConfig, report: Report) -> None:
    from openmoji.grids import write_grids

    write_grids(config.folder, SETTINGS["unguided"], columns=4 if config.quick else 10)
