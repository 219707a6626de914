"""Training throughput of the demo preset: eager and compiled, fp32 and bf16, side by side.

    python profiling/bench_precision.py [--steps 12] [--rounds 3] [--threads 1]

Every variant takes the same batches of the demo's shapes through whole optimizer steps. They are
warmed up, then interleaved round by round in one process; the table gives the median images/s of
all steps with the 20th and 80th percentile, and the ratio to eager fp32 round by round. What does
not compile is reported with its reason, not left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import InductorError

from miro import flow
from miro.conditioning import keep_rewards
from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.config import TrainConfig
from miro.training.engine import Engine
from miro.training.presets import preset
from miro.utils.rng import generator_from

VARIANTS = {
    "eager fp32": ("fp32", False),
    "eager bf16": ("bf16", False),
    "compiled fp32": ("fp32", True),
    "compiled bf16": ("bf16", True),
}
LATENTS, TEXT_CHANNELS, REWARDS = (3, 32, 32), 384, 3


def texts(batch: int, generator: torch.Generator) -> PackedText:
    """Random states of the demo's caption lengths, 5 to 14 tokens."""
    lengths = torch.randint(5, 15, (batch,), generator=generator).tolist()
    return pack([torch.randn(n, TEXT_CHANNELS, generator=generator) for n in lengths])


def step(engine: Engine, config: TrainConfig, number: int) -> float:
    """One optimizer step on the batch `number`; its seconds, the batch's making left out."""
    generator = generator_from(0, "bench", number)
    x = torch.randn(config.batch, *LATENTS, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    uniform = torch.rand(config.batch, REWARDS + 2, generator=generator)
    t = flow.sample_timesteps(config.flow, uniform[:, 0])
    bins = torch.randint(64, (config.batch, REWARDS), generator=generator)
    known = torch.ones(bins.shape, dtype=torch.bool)
    keep = keep_rewards(config.conditioning, known, known[0], uniform[:, 1:])
    rewards = RewardCond(torch.arange(64) / 63, bins, keep)
    text = texts(config.batch, generator)
    started = time.perf_counter()
    prediction = engine.predict(flow.add_noise(x, noise, t), t, rewards, text)
    loss = flow.velocity_errors(config.flow, prediction, x, noise, t).mean()
    engine.backward(loss)
    engine.step(64_000)
    return time.perf_counter() - started


def make(config: TrainConfig, precision: Any, compiled: bool) -> Engine:
    torch.manual_seed(0)
    model = FlowTransformer(
        config.model, LATENTS, TEXT_CHANNELS, REWARDS, regional_compile=compiled
    )
    return Engine(
        model,
        config.optimizer,
        BatchPlan(stage=0, world=1, micro_batch=config.batch, accumulation=1),
        total_images=config.images,
        precision=precision,
        compiled=compiled,
    )


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = replace(preset("demo"), threads=options.threads)
    engines, failed, compile_seconds = {}, {}, {}
    for name in options.only:
        started = time.perf_counter()
        try:
            engine = make(config, *VARIANTS[name])
            for number in range(3):
                step(engine, config, number)
        except InductorError as error:
            failed[name] = str(error).strip().splitlines()[0]
            continue
        engines[name], compile_seconds[name] = engine, time.perf_counter() - started
    rates: dict[str, list[list[float]]] = {name: [] for name in engines}
    for round_ in range(options.rounds):
        for name, engine in engines.items():
            numbers = range(100 * round_, 100 * round_ + options.steps)
            rates[name].append([config.batch / step(engine, config, n) for n in numbers])
    rows = {}
    for name, rounds in rates.items():
        every = [rate for round_ in rounds for rate in round_]
        base = rates.get("eager fp32", rounds)
        ratios = [
            statistics.median(a) / statistics.median(b) for a, b in zip(rounds, base, strict=True)
        ]
        rows[name] = {
            "images_per_second": round(statistics.median(every), 1),
            "p20": round(percentile(every, 0.2), 1),
            "p80": round(percentile(every, 0.8), 1),
            "ratio_to_eager_fp32": [round(ratio, 2) for ratio in ratios],
            "start_seconds": round(compile_seconds[name], 1),
        }
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "variants": rows,
        "failed": failed,
    }
    for name, row in rows.items():
        print(f"{name:15}{row['images_per_second']:8.1f} images/s  ({row['p20']}-{row['p80']})  "
              f"x {row['ratio_to_eager_fp32']}  start {row['start_seconds']} s")  # fmt: skip
    for name, reason in failed.items():
        print(f"{name:15}  does not compile: {reason}")
    if options.out:
        path = options.out / f"precision-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
