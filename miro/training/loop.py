"""The training loop. Progress is counted in images; randomness is a function of (seed, images)."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from miro import flow
from miro.conditioning import Bins, conditioned_rewards
from miro.data.dataset_base import Dataset
from miro.data.mixture import open_data
from miro.data.on_the_fly import OnTheFlyEncoders
from miro.encoders.encoder import EncodingConfig
from miro.model.transformer import FlowTransformer
from miro.training import checkpoint
from miro.training.async_checkpoint import AsyncCheckpointer
from miro.training.batch_plan import DTYPES, BatchPlan, deepspeed_config
from miro.training.batches import BatchBuilder, TrainBatch
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.engine import Engine
from miro.training.flops import peak_flops, training_flops
from miro.training.initial_weights import load_initial_weights
from miro.training.memory import capacity
from miro.training.metrics import MetricsTracker, StepRecord, TrainingProgress
from miro.training.metrics_log import MetricsWriter
from miro.training.planner import Cluster, Problem, choose_plan
from miro.training.run_record import (
    check_begins_anew,
    check_encoding,
    digests,
    inference_state,
    open_run,
)
from miro.utils.atomic_io import write_text
from miro.utils.distributed import DistEnv, StopSignal, dist_env, init_distributed
from miro.utils.locks import exclusive_lock, machine_lock
from miro.utils.rng import seed_from
from miro.utils.stop_request import Stopped
from miro_kernels import backend, prewarm, use_backend

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    report: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Path:
    """Train for `config.images` images and return the folder of the final EMA weights.

    Args:
        config: the run.
        folder: the run's folder; created if absent.
        resume: `auto` continues from the newest complete checkpoint in the folder, if there is one;
            `never` refuses a folder that has a run.
        report: called on rank 0 at each report.

    Raises:
        ValueError: the configuration is invalid or does not fit the data or this machine, or the
            folder has another run.
        FloatingPointError: too many steps in a row were skipped.
        Stopped: SIGTERM, SIGHUP or Ctrl-C was received and a checkpoint was saved.
    """
    if config.data is None:
        raise ValueError("train: data is not set; give the folder `miro encode` wrote: --data DIR")
    if config.threads:
        torch.set_num_threads(config.threads)
    env = dist_env(os.environ)
    device = env.device(config.device)
    dataset = _open_dataset(config, config.data, device)
    active = conditioned_rewards(config.conditioning, dataset.rewards)
    scores = _mask_inactive_scores(dataset, active)
    bins = _fit_bins(config, dataset, active, scores)
    batches = BatchBuilder(config, dataset, active, scores, bins)
    plan = _make_plan(config, dataset, env, device)
    run = RunFolder(folder)
    with use_backend(config.kernels), ExitStack() as stack:
        backend.check_backend(device)
        _prewarm(config, dataset, plan, len(bins.quantile_levels()), device)
        init_distributed(config.device)

        def claim_folder() -> None:
            stack.enter_context(exclusive_lock(folder))
            open_run(run, config, bins, dataset, resume)
            record = deepspeed_config(plan, config.precision, device.type)
            write_text(run.deepspeed, json.dumps(record, indent=2))
            checkpoint.clear_unfinished(run.checkpoints)

        env.check_equal(digests(config, bins, dataset, plan))
        env.on_first(claim_folder)
        engine = _make_engine(config, run, dataset, plan, device, env)
        return _train(config, run, dataset, bins, engine, batches, report)


def _train(
    config: TrainConfig,
    run: RunFolder,
    dataset: Dataset,
    bins: Bins,
    engine: Engine,
    builder: BatchBuilder,
    report: Callable[[TrainingProgress], None],
) -> Path:
    """Resume and loop to the end of the run."""
    env, plan = engine.env, engine.plan
    images = _resume(config, run, engine, dataset)
    with ExitStack() as stack:
        writer = None
        if env.first:
            writer = stack.enter_context(
                closing(MetricsWriter(run.metrics, run.tensorboard, images))
            )
        checkpointer = stack.enter_context(
            AsyncCheckpointer(
                run,
                env,
                keep_last=config.keep_checkpoints,
                keep_every=config.keep_every,
                on_failure=config.on_failed_save,
            )
        )
        stop = stack.enter_context(StopSignal(env))
        tracker = MetricsTracker(
            engine,
            writer,
            report,
            lambda start: builder.sample_keys(plan, env.rank, start),
            images,
            rewards=dataset.rewards,
            peak=config.peak_flops or peak_flops(engine.device, config.precision),
        )
        batches = tracker.data_wait.timed(
            stack.enter_context(closing(builder.prefetch(plan, env.rank, images)))
        )
        while images < config.images:
            # Accumulate gradients over micro-batches and update the weights.
            records = [
                _forward_backward(config, engine, batch)
                for batch in itertools.islice(batches, plan.accumulation)
            ]
            tracker.add(images, records, engine.step(images))
            images += config.batch
            done, stopped = images == config.images, stop.should_stop()

            # Report metrics.
            if done or images % config.report_every == 0:
                tracker.log(images, config.images)

            # Save EMA weights.
            if done or images in config.ema_weights_at:
                tracker.check_skipped(images)
                state = inference_state(config, dataset, bins, images)
                checkpointer.weights(images, engine.ema_state_dict(), state)

            # Save a checkpoint.
            if done or stopped or images % config.checkpoint_every == 0:
                tracker.check_skipped(images)
                if writer is not None:
                    writer.flush()
                shards, state = engine.checkpoint_state()
                # `miro export` of a checkpoint needs the encoding and must not need the data.
                checkpointer.checkpoint(images, shards, {**state, "encoding": dataset.encoding})

            if stopped and not done:
                checkpointer.wait()
                env.all_true(True)  # Barrier: no rank leaves before the checkpoint is complete.
                raise Stopped(
                    f"stopped after {images:,} images and saved; the same command resumes the run"
                )
        checkpointer.wait()
    env.all_true(True)  # Barrier before the process group is destroyed.
    return run.weights_at(images)


def _forward_backward(config: TrainConfig, engine: Engine, batch: TrainBatch) -> StepRecord:
    """Accumulate the gradients of a micro-batch; all stays on the device."""
    batch = batch.to(engine.device)
    x, noise, t, rewards = batch.x, batch.noise, batch.t, batch.rewards
    prediction = engine.predict(flow.add_noise(x, noise, t), t, rewards, batch.text)
    losses = flow.velocity_errors(config.flow, prediction, x, noise, t)
    engine.backward(losses.mean())
    tables = rewards.bins.shape[1], rewards.levels.numel()
    flops = training_flops(config.model, x.shape, batch.text.states.shape, tables)
    return StepRecord(losses.detach(), t, rewards, flops)


def _open_dataset(config: TrainConfig, folder: Path, device: torch.device) -> Dataset:
    """Open the data, and check its encoding and shapes against the configuration."""
    encoders = OnTheFlyEncoders(config.encode, device) if config.on_the_fly else None
    dataset = open_data(folder, config.conditioning.reward_slots, encoders)
    if config.encode != EncodingConfig() and (found := config.encode.diff(dataset.encoding)):
        raise ValueError(
            f"{folder} has another encoding than the configuration ({'; '.join(found)}); leave out "
            "`encode`, or encode the data again"
        )
    for _, height, width in dataset.shapes:
        config.model.grid(height, width)
    return dataset


def _mask_inactive_scores(dataset: Dataset, active: torch.Tensor) -> np.ndarray:
    """Return (captions, R) scores, NaN for inactive rewards.

    So annotating an inactive reward later changes neither bins.json nor a resumed run.
    """
    masked = np.where(active.numpy(), dataset.scores, np.float32(np.nan))
    captions = dataset.scores.size // max(1, len(dataset.rewards))
    return masked.reshape(captions, len(dataset.rewards))


def _fit_bins(
    config: TrainConfig, dataset: Dataset, active: torch.Tensor, scores: np.ndarray
) -> Bins:
    inactive = [n for n, used in zip(dataset.rewards, active.tolist(), strict=True) if not used]
    conditioning = config.conditioning
    return Bins.fit(
        scores, dataset.rewards, conditioning.bins, conditioning.binning, optional=inactive
    )


def _make_plan(
    config: TrainConfig, dataset: Dataset, env: DistEnv, device: torch.device
) -> BatchPlan:
    """Choose the plan; all ranks must choose the same one, which `digests` checks."""
    largest = max(dataset.shapes, key=math.prod)
    cluster = Cluster(env.world, capacity(device))
    plan, table = choose_plan(
        Problem(config, cluster, largest, dataset.text_dim, len(dataset.rewards))
    )
    log.info(table)
    return plan


def _prewarm(
    config: TrainConfig, dataset: Dataset, plan: BatchPlan, levels: int, device: torch.device
) -> None:
    """Compile the Triton kernels before the first collective, whose time-out could expire.

    One process per machine compiles; the others load the kernels from Triton's cache.
    """
    with machine_lock("miro-prewarm"):
        for tokens in sorted({math.prod(config.model.grid(*s[1:])) for s in dataset.shapes}):
            prewarm(
                config.model,
                batch=plan.micro_batch,
                tokens=tokens,
                rewards=len(dataset.rewards),
                levels=levels,
                dtype=DTYPES[config.precision],
                device=device,
                optimized=plan.optimizer_dtypes(config.precision),
            )


def _make_engine(
    config: TrainConfig,
    run: RunFolder,
    dataset: Dataset,
    plan: BatchPlan,
    device: torch.device,
    env: DistEnv,
) -> Engine:
    """Build the engine with the same initial weights on every rank."""
    torch.manual_seed(seed_from(config.seed, "weights"))
    model = FlowTransformer(
        config.model,
        dataset.latent_shape,
        dataset.text_dim,
        len(dataset.rewards),
        regional_compile=config.compile and device.type == "cpu",
        activation_checkpointing=plan.activation_checkpointing,
    )
    if config.init is not None and not checkpoint.list_checkpoints(run.checkpoints):
        load_initial_weights(model, dataset.rewards, config.init)
    return Engine(
        model,
        config.optimizer,
        plan,
        total_images=config.images,
        precision=config.precision,
        compiled=config.compile,
        device=device,
        env=env,
    )


def _resume(config: TrainConfig, run: RunFolder, engine: Engine, dataset: Dataset) -> int:
    """Load the newest complete checkpoint and return its number of images, or 0."""
    env = engine.env
    reader = checkpoint.open_newest(
        run.checkpoints, env.rank, env.world, env.all_true, engine.check_state
    )
    if reader is None:
        env.on_first(lambda: check_begins_anew(run, config.checkpoint_every))
        return 0
    check_encoding(run, reader.state["encoding"], dataset)
    engine.load_state(
        lambda key, shard: reader.read(key, shard.name, shard.start, shard.size), reader.state
    )
    images = int(reader.state["images"])
    log.info("resumed at %d images", images)
    return images
