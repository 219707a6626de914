"""Throughput of the demo's training step: eager and compiled, in fp32 and bf16.

    python profiling/bench_precision.py [--steps 12] [--rounds 3] [--threads 1]

All variants run whole optimizer steps on the same batches, warmed up and interleaved round by
round. Reports images/s of all steps, median with 20th and 80th percentile, and the ratio to eager
fp32 round by round, or why a variant does not compile. Writes precision-DATE.json.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from bench_utils import argument_parser, interleave, metadata, quantiles, write_json
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
DEMO_LATENTS, DEMO_TEXT_CHANNELS, DEMO_REWARDS = (3, 32, 32), 384, 3


def texts(batch: int, generator: torch.Generator) -> PackedText:
    """Random states of captions of 5 to 14 tokens, as in the demo."""
    lengths = torch.randint(5, 15, (batch,), generator=generator).tolist()
    return pack([torch.randn(n, DEMO_TEXT_CHANNELS, generator=generator) for n in lengths])


def timed_step(engine: Engine, config: TrainConfig, number: int) -> float:
    """Run an optimizer step on the random batch `number` and return its seconds."""
    generator = generator_from(0, "bench", number)
    x = torch.randn(config.batch, *DEMO_LATENTS, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    uniform = torch.rand(config.batch, DEMO_REWARDS + 2, generator=generator)
    t = flow.sample_timesteps(config.flow, uniform[:, 0])
    bins = torch.randint(64, (config.batch, DEMO_REWARDS), generator=generator)
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


def build_engine(config: TrainConfig, precision: Any, compiled: bool) -> Engine:
    """An engine of the demo's network."""
    torch.manual_seed(0)
    model = FlowTransformer(
        config.model, DEMO_LATENTS, DEMO_TEXT_CHANNELS, DEMO_REWARDS, regional_compile=compiled
    )
    return Engine(
        model,
        config.optimizer,
        BatchPlan(stage=0, world=1, micro_batch=config.batch, accumulation=1),
        total_images=config.images,
        precision=precision,
        compiled=compiled,
    )


def main() -> None:
    """Time the demo preset by precision and compilation, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = replace(preset("demo"), threads=args.threads)
    runs, failed, start_seconds = {}, {}, {}
    for name in args.only:
        started = time.perf_counter()
        try:
            engine = build_engine(config, *VARIANTS[name])
            for number in range(3):
                timed_step(engine, config, number)
        except InductorError as error:
            failed[name] = str(error).strip().splitlines()[0]
            print(f"{name:15}  does not compile: {failed[name]}")
            continue
        start_seconds[name] = time.perf_counter() - started

        def run(round_: int, engine: Engine = engine) -> list[float]:
            numbers = range(100 * round_, 100 * round_ + args.steps)
            return [config.batch / timed_step(engine, config, number) for number in numbers]

        runs[name] = run
    rows = {}
    rates = interleave(runs, args.rounds, warmup=0)
    for name, rounds in rates.items():
        medians, base = (
            [statistics.median(rates_) for rates_ in found]
            for found in (rounds, rates.get("eager fp32", rounds))
        )
        rows[name] = {
            "images_per_second": quantiles([rate for round_ in rounds for rate in round_]),
            "ratio_to_eager_fp32": [round(a / b, 2) for a, b in zip(medians, base, strict=True)],
            "start_seconds": round(start_seconds[name], 1),
        }
        rate = rows[name]["images_per_second"]
        print(
            f"{name:15}{rate['median']:8.1f} images/s  ({rate['p20']:.1f}-{rate['p80']:.1f})  "
            f"x {rows[name]['ratio_to_eager_fp32']}  start {rows[name]['start_seconds']} s"
        )
    record = {**metadata("cpu"), "variants": rows, "failed": failed}
    write_json(record, args.out / f"precision-{record['date']}.json")


if __name__ == "__main__":
    main()
