"""The training loop. Progress is counted in images; randomness is a function of (seed, images)."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from miro import checkpoint, flow
from miro.checkpoint import RunFolder
from miro.conditioning import Bins, keep_rewards, keep_text, trained_rewards
from miro.config import differences, to_dict
from miro.data.loader import Batch, EncodedDataset, Loader
from miro.engine import DTYPES, Engine
from miro.locks import alone_in
from miro.model.transformer import FlowTransformer, Rewards
from miro.presets import TrainConfig
from miro.random import generator_from, seed_from
from miro.report.metrics import MetricsWriter
from miro_kernels import backend, prewarm, use_backend

log = logging.getLogger(__name__)

# What may differ between a run and its resumption: none of it changes a result.
FREE_TO_CHANGE = ("report_every", "checkpoint_every", "keep_checkpoints", "data")


@dataclass(frozen=True)
class Progress:
    """What a report says."""

    images: int
    total: int
    loss: float
    gradient_norm: float
    images_per_second: float
    seconds_left: float


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
        FloatingPointError: the loss is no longer a number; no checkpoint holds what it led to.
    """
    if config.data is None:
        raise ValueError("train: data is not set; give the folder `miro encode` wrote: --data DIR")
    if config.threads:
        torch.set_num_threads(config.threads)
    dataset = EncodedDataset(config.data, config.conditioning.places)
    pairs = dataset.scores.size // max(1, len(dataset.rewards))
    trained = trained_rewards(config.conditioning, dataset.rewards)
    # What the network is not told is not known, so a score that comes later changes nothing.
    known = np.where(trained.numpy(), dataset.scores, np.float32(np.nan))
    scores = known.reshape(pairs, len(dataset.rewards))
    bins = Bins.fit(
        scores,
        dataset.rewards,
        config.conditioning.bins,
        config.conditioning.bin_law,
        optional=[n for n, told in zip(dataset.rewards, trained.tolist(), strict=True) if not told],
    )
    with use_backend(config.kernels):
        backend.ready(config.device)
        with alone_in(folder):
            run = RunFolder(folder)
            _open_run(run, config, bins, dataset, resume)
            return _train(config, run, dataset, scores, bins, trained, report)


def _train(
    config: TrainConfig,
    run: RunFolder,
    dataset: EncodedDataset,
    scores: np.ndarray,
    bins: Bins,
    trained: Tensor,
    report: Callable[[Progress], None],
) -> Path:
    """The loop, on checked arguments."""
    torch.manual_seed(seed_from(config.seed, "weights"))
    model = FlowTransformer(
        config.model, dataset.latent_shape, dataset.text_dim, len(dataset.rewards)
    )
    engine = Engine(
        model,
        config.optimizer,
        batch=config.batch,
        total_images=config.images,
        precision=config.precision,
        compiled=config.compile,
        device=config.device,
    )
    prewarm(
        config.model,
        batch=config.batch,
        tokens=len(model.places),
        rewards=len(dataset.rewards),
        levels=len(bins.levels()),
        dtype=DTYPES[config.precision],
        device=config.device,
    )
    images = 0
    if (saved := checkpoint.load_latest(run.checkpoints)) is not None:
        engine.load_state(*saved)
        images = int(saved[1]["images"])
        log.info("resumed at %d images", images)

    loader = Loader(dataset, config.batch, config.seed)
    binned, known = (table.view(dataset.scores.shape) for table in bins.assign(scores))
    step = _Step(config, engine, trained, bins.levels())
    metrics = MetricsWriter(run.metrics, run.tensorboard, images)
    meter = _Meter(config, images, metrics, report)
    batches = loader.prefetch(images, config.batch)
    try:
        while images < config.images:
            batch = next(batches)
            chosen = batch.scores_index, batch.caption_index
            loss, norm = step(batch, binned[chosen], known[chosen], images)
            images += config.batch
            done = images == config.images
            meter.add(loss, norm, images, due=done or images % config.report_every == 0)
            if done or images in config.weights_at:
                meter.check(images)
                _save_weights(run, engine, config, dataset, bins, images)
            if done or images % config.checkpoint_every == 0:
                meter.check(images)
                metrics.flush()
                tensors, numbers = engine.state()
                checkpoint.save(run.checkpoint(images), tensors, {**numbers, "images": images})
                checkpoint.keep_last(run.checkpoints, images, config.keep_checkpoints)
    finally:
        batches.close()
        metrics.close()
    return run.weights_at(images)


class _Step:
    """One optimizer step: noise, dropout, forward, backward, update."""

    def __init__(
        self, config: TrainConfig, engine: Engine, trained: Tensor, levels: Tensor
    ) -> None:
        self.config, self.engine = config, engine
        self.trained, self.levels = trained, levels.to(config.device)

    def __call__(
        self, batch: Batch, bins: Tensor, known: Tensor, images: int
    ) -> tuple[Tensor, Tensor]:
        config, device = self.config, self.config.device
        generator = generator_from(config.seed, "step", images)
        latents = batch.latents
        if batch.std is not None:
            # The autoencoder's posterior is drawn anew at each visit.
            latents = latents + batch.std * torch.randn(latents.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = flow.draw_times(config.flow, len(batch), generator)
        keep = keep_rewards(config.conditioning, known, self.trained, generator)
        text = batch.text.keep(keep_text(config.conditioning, len(batch), generator))
        x, noise, t = (z.to(device, non_blocking=True) for z in (latents, noise, t))
        rewards = Rewards(self.levels, bins.to(device), keep.to(device))
        prediction = self.engine.predict(flow.noised(x, noise, t), t, rewards, text.to(device))
        loss = flow.velocity_errors(config.flow, prediction, x, noise, t).mean()
        return loss.detach(), self.engine.step(loss, images)


class _Meter:
    """Means between reports. Sums stay on the device, so that only a report waits for it."""

    def __init__(
        self,
        config: TrainConfig,
        images: int,
        metrics: MetricsWriter,
        report: Callable[[Progress], None],
    ) -> None:
        self.config, self.metrics, self.report = config, metrics, report
        self._begin(images)

    def _begin(self, images: int) -> None:
        self.start, self.clock, self.steps = images, time.perf_counter(), 0
        self.sums = torch.zeros(2, device=self.config.device)

    def add(self, loss: Tensor, norm: Tensor, images: int, due: bool) -> None:
        self.sums += torch.stack((loss, norm.float()))
        self.steps += 1
        if not due:
            return
        loss_mean, norm_mean = self.check(images)
        rate = (images - self.start) / (time.perf_counter() - self.clock)
        left = (self.config.images - images) / rate
        progress = Progress(images, self.config.images, loss_mean, norm_mean, rate, left)
        self.metrics.write(
            images,
            {"loss": loss_mean, "gradient_norm": norm_mean, "images_per_second": rate},
        )
        self.report(progress)
        self._begin(images)

    def check(self, images: int) -> tuple[float, float]:
        """The mean loss and gradient norm since the last report; both must be numbers."""
        loss, norm = (self.sums / max(1, self.steps)).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"the loss is {loss} after {images} images (gradient norm {norm}); the checkpoints "
                "before are untouched: train in another folder with a lower optimizer.learning_rate"
            )
        return loss, norm


def _open_run(
    run: RunFolder,
    config: TrainConfig,
    bins: Bins,
    dataset: EncodedDataset,
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
    checkpoint.write_text(run.bins, bins.to_json())
    checkpoint.write_text(run.versions, json.dumps(_versions(), indent=2))
    checkpoint.write_text(run.config, json.dumps(record, indent=2))


def _versions() -> dict[str, str]:
    packages = ("miro-trainer", "torch", "numpy", "transformers", "open_clip_torch")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    found = {name: installed[name] for name in packages if name in installed}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _save_weights(
    run: RunFolder,
    engine: Engine,
    config: TrainConfig,
    dataset: EncodedDataset,
    bins: Bins,
    images: int,
) -> None:
    """The averaged weights with all that sampling from them needs."""
    state: dict[str, Any] = {
        "images": images,
        "config": to_dict(config),
        "bins": json.loads(bins.to_json()),
        "encoding": dataset.manifest.encoding,
    }
    checkpoint.save(run.weights_at(images), engine.averaged(), state)
