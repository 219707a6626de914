"""The training loop. Progress is counted in images; randomness is a function of (seed, images)."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from miro import flow
from miro.conditioning import Bins, conditioned_rewards
from miro.data.mixture import TrainingData, open_data
from miro.data.on_the_fly import OnTheFlyEncoders
from miro.encoders.encoder import EncodingConfig
from miro.model.transformer import FlowTransformer
from miro.training import checkpoint
from miro.training.async_checkpoint import AsyncCheckpointer
from miro.training.batch_plan import DTYPES, BatchPlan, deepspeed_config, plan_batch
from miro.training.batches import BatchBuilder, TrainBatch
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.engine import Engine
from miro.training.flops import training_flops
from miro.training.memory import choose_stage
from miro.training.metrics import MetricsTracker, Progress, StepRecord
from miro.training.metrics_log import MetricsWriter
from miro.training.peaks import peak_flops
from miro.utils.atomic_io import write_text
from miro.utils.distributed import DistEnv, Stopped, StopSignal, dist_env, join
from miro.utils.locks import exclusive_lock, machine_lock
from miro.utils.rng import seed_from
from miro.utils.serialize import differences, to_dict
from miro_kernels import backend, prewarm, use_backend

__all__ = ["Progress", "train"]

log = logging.getLogger(__name__)

# What may differ between a run and its resumption: none of it changes a result.
FREE_TO_CHANGE = (
    "report_every",
    "peak_flops",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "on_failed_save",
    "data",
    "sharding",
    "threads",
)


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train to the end of `config.images` and return the folder of the final weights.

    Args:
        config: the run.
        folder: the run's folder; made if absent.
        resume: `auto` goes on from the newest whole checkpoint in the folder, if there is one;
            `never` refuses a folder that holds a run.
        report: called at each report.

    Raises:
        ValueError: the configuration is impossible, on this machine or at all, or the folder holds
            another run.
        FloatingPointError: too many steps in a row had to be skipped; no checkpoint holds them.
        Stopped: SIGTERM was received; the run is saved.
    """
    if config.data is None:
        raise ValueError("train: data is not set; give the folder `miro encode` wrote: --data DIR")
    if config.threads:
        torch.set_num_threads(config.threads)
    ranks = dist_env(os.environ)
    device = ranks.device(config.device)
    live = OnTheFlyEncoders(config.encode, device) if config.on_the_fly else None
    dataset = open_data(config.data, config.conditioning.reward_slots, live)
    asked = config.encode != EncodingConfig()
    if asked and (otherwise := config.encode.diff(dataset.encoding)):
        raise ValueError(f"{config.data} was encoded otherwise ({'; '.join(otherwise)})")
    pairs = dataset.scores.size // max(1, len(dataset.rewards))
    trained = conditioned_rewards(config.conditioning, dataset.rewards)
    # What the network is not told is not known, so a score that comes later changes nothing.
    known = np.where(trained.numpy(), dataset.scores, np.float32(np.nan))
    scores = known.reshape(pairs, len(dataset.rewards))
    bins = Bins.fit(
        scores,
        dataset.rewards,
        config.conditioning.bins,
        config.conditioning.binning,
        optional=[n for n, told in zip(dataset.rewards, trained.tolist(), strict=True) if not told],
    )
    visits = BatchBuilder(config, dataset, trained, scores, bins)
    for _, height, width in dataset.shapes:
        config.model.grid(height, width)
    run = RunFolder(folder)
    layout = plan_batch(
        config.sharding,
        batch=config.batch,
        world=ranks.world,
        stage=choose_stage(
            config,
            max(dataset.shapes, key=math.prod),
            dataset.text_dim,
            len(dataset.rewards),
            ranks,
            device,
        ),
    )
    with use_backend(config.kernels), ExitStack() as stack:
        backend.ready(device)
        _prewarm(config, dataset, layout, len(bins.quantile_levels()), device)
        join(config.device)

        def open_run() -> None:
            stack.enter_context(exclusive_lock(folder))
            _open_run(run, config, bins, dataset, resume)
            told = deepspeed_config(layout, config.precision, device.type)
            write_text(run.deepspeed, json.dumps(told, indent=2))
            checkpoint.clear_unfinished(run.checkpoints)

        ranks.on_first(open_run)
        engine = _engine(config, dataset, layout, device, ranks)
        return _train(config, run, dataset, bins, engine, visits, report)


def _train(
    config: TrainConfig,
    run: RunFolder,
    dataset: TrainingData,
    bins: Bins,
    engine: Engine,
    visits: BatchBuilder,
    report: Callable[[Progress], None],
) -> Path:
    """The loop, on checked arguments."""
    ranks, layout = engine.ranks, engine.layout
    images = _resume(run, engine)
    with ExitStack() as stack:
        metrics = None
        if ranks.first:
            metrics = stack.enter_context(
                closing(MetricsWriter(run.metrics, run.tensorboard, images))
            )
        saver = stack.enter_context(
            AsyncCheckpointer(
                run,
                ranks,
                keep_last=config.keep_checkpoints,
                keep_every=config.keep_every,
                on_failure=config.on_failed_save,
            )
        )
        stop = stack.enter_context(StopSignal(ranks))
        ahead = stack.enter_context(closing(visits.ahead(layout, ranks.rank, images)))
        meter = MetricsTracker(
            engine,
            metrics,
            report,
            lambda start: visits.keys(layout, ranks.rank, start),
            images,
            rewards=dataset.rewards,
            peak=config.peak_flops or peak_flops(engine.device, config.precision),
        )
        coming = meter.wait.timed(ahead)
        while images < config.images:
            seen = [
                _learn(config, engine, v) for v in itertools.islice(coming, layout.accumulation)
            ]
            meter.add(images, seen, engine.step(images))
            images += config.batch
            done, stopped = images == config.images, stop.should_stop()
            if done or images % config.report_every == 0:
                meter.tell(images, config.images)
            if done or images in config.weights_at:
                meter.check(images)
                saver.weights(
                    images, engine.ema_state_dict(), _inference_state(config, dataset, bins, images)
                )
            if (done or stopped or images % config.checkpoint_every == 0) and meter.check(images):
                if metrics is not None:
                    metrics.flush()
                pieces, numbers = engine.state()
                # With it a checkpoint can be exported without its data.
                encoding = dataset.encoding
                saver.checkpoint(images, pieces, {**numbers, "encoding": encoding})
            if stopped and not done:
                saver.wait()
                raise Stopped(
                    f"stopped after {images:,} images, and saved; the same command goes on"
                )
        saver.wait()
    ranks.all_true(True)  # None leaves while another still hears from it.
    return run.weights_at(images)


def _learn(config: TrainConfig, engine: Engine, visit: TrainBatch) -> StepRecord:
    """Add the gradients of a micro-batch; what the meter keeps of it, on the device."""
    visit = visit.to(engine.device)
    x, noise, t, rewards = visit.x, visit.noise, visit.t, visit.rewards
    prediction = engine.predict(flow.add_noise(x, noise, t), t, rewards, visit.text)
    losses = flow.velocity_errors(config.flow, prediction, x, noise, t)
    engine.backward(losses.mean())
    told = rewards.bins.shape[1], rewards.levels.numel()
    flops = training_flops(config.model, x.shape, visit.text.states.shape, told)
    return StepRecord(losses.detach(), t, rewards, flops)


def _prewarm(
    config: TrainConfig, dataset: TrainingData, layout: BatchPlan, levels: int, device: torch.device
) -> None:
    """Compile the kernels before the ranks meet, so that none keeps the others waiting.

    One process of a machine compiles, and the others find the kernels in Triton's cache.
    """
    with machine_lock("miro-prewarm"):
        for tokens in sorted({math.prod(config.model.grid(*s[1:])) for s in dataset.shapes}):
            prewarm(
                config.model,
                batch=layout.micro_batch,
                tokens=tokens,
                rewards=len(dataset.rewards),
                levels=levels,
                dtype=DTYPES[config.precision],
                device=device,
                optimized=layout.optimized(config.precision),
            )


def _engine(
    config: TrainConfig,
    dataset: TrainingData,
    layout: BatchPlan,
    device: torch.device,
    ranks: DistEnv,
) -> Engine:
    """The engine of a new run; every rank begins with the same weights."""
    torch.manual_seed(seed_from(config.seed, "weights"))
    return Engine(
        FlowTransformer(
            config.model,
            dataset.latent_shape,
            dataset.text_dim,
            len(dataset.rewards),
            regional_compile=config.compile and device.type == "cpu",
            activation_checkpointing=layout.activation_checkpointing,
        ),
        config.optimizer,
        layout,
        total_images=config.images,
        precision=config.precision,
        compiled=config.compile,
        device=device,
        ranks=ranks,
    )


def _resume(run: RunFolder, engine: Engine) -> int:
    """Take up the newest checkpoint that is whole; the images it was saved after, or 0."""
    ranks = engine.ranks
    reader = checkpoint.open_newest(
        run.checkpoints, ranks.rank, ranks.world, ranks.all_true, engine.check_state
    )
    if reader is None:
        return 0
    engine.load_state(
        lambda key, piece: reader.read(key, piece.name, piece.start, piece.size), reader.state
    )
    images = int(reader.state["images"])
    log.info("resumed at %d images", images)
    return images


def _open_run(
    run: RunFolder,
    config: TrainConfig,
    bins: Bins,
    dataset: TrainingData,
    resume: Literal["auto", "never"],
) -> None:
    """Write what the run is, or check that the folder's run is this one."""
    record = to_dict(config)
    if run.config.exists():
        if resume == "never":
            raise ValueError(f"{run.root} holds a run already; choose another folder, or resume it")
        theirs = json.loads(run.config.read_text())
        free = set(FREE_TO_CHANGE)
        found = differences(
            {k: v for k, v in record.items() if k not in free},
            {k: v for k, v in theirs.items() if k not in free},
        )
        if found:
            raise ValueError(
                f"{run.root} holds a run of another configuration ({'; '.join(found)}); choose "
                "another folder, or give the same configuration to resume"
            )
        if run.bins.read_text() != bins.to_json():
            raise ValueError(
                f"{run.root} was trained on other scores than {dataset.folder} holds now; choose "
                "another folder"
            )
        return
    write_text(run.bins, bins.to_json())
    write_text(run.versions, json.dumps(_versions(), indent=2))
    write_text(run.config, json.dumps(record, indent=2))


def _versions() -> dict[str, str]:
    packages = ("miro-trainer", "torch", "numpy", "transformers", "open_clip_torch")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    found = {name: installed[name] for name in packages if name in installed}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _inference_state(
    config: TrainConfig, dataset: TrainingData, bins: Bins, images: int
) -> dict[str, Any]:
    """All that sampling needs beside the weights."""
    return {
        "images": images,
        "config": to_dict(config),
        "bins": json.loads(bins.to_json()),
        "encoding": dataset.encoding,
    }
