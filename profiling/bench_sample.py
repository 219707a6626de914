"""Sampling of a preset: latency and images/s, without guidance and with it, eager and compiled.

    python profiling/bench_sample.py [--preset demo] [--batches 1 16] [--steps 20] [--rounds 3]

A network as a training run leaves it, with random weights and text states that are there already,
as a prompt's are after its first picture. Both branches of guidance are one batch. All variants are
warmed up and take turns, round by round; the table has the seconds of a whole sampling, median with
20th and 80th percentile, and the ratio to eager round by round. Writes sample-PRESET-DATE.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measured import machine, quantiles, write
from torch import Tensor

from miro.conditioning import RewardTarget
from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer
from miro.sampling.sampler import Guidance, sample
from miro.training.batch_plan import Precision
from miro.training.config import TrainConfig
from miro.training.engine import cast_parameters
from miro.training.presets import preset

HERE = Path(__file__).parent
REWARDS, TEXT_TOKENS = 7, 32
LATENTS, TEXT_CHANNELS = (4, 32, 32), 2048
SHAPES = {"demo": ((3, 32, 32), 384)}
"""Presets that train on something else: the shape of a latent, and of a text state."""
BEST, WORST = RewardTarget((1.0,) * REWARDS), RewardTarget((0.0,) * REWARDS)
GUIDANCES = {
    "no guidance": Guidance(BEST),
    "reward guidance": Guidance(BEST, WORST, reward_scale=5.0),
}


@dataclass(frozen=True)
class Variant:
    """One way to sample a batch of one size."""

    guidance: str
    batch: int
    compiled: bool

    @property
    def name(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.guidance}, batch {self.batch}, {how}"

    @property
    def eager(self) -> str:
        return f"{self.guidance}, batch {self.batch}, eager"


def network(name: str, precision: Precision, device: str) -> FlowTransformer:
    """The preset's network with no layer at zero, which would hide what it costs."""
    shape, channels = SHAPES.get(name, (LATENTS, TEXT_CHANNELS))
    torch.manual_seed(0)
    model = FlowTransformer(preset(name).model, shape, channels, REWARDS)
    for param in model.parameters():
        if not param.any():
            torch.nn.init.normal_(param, std=0.02)
    return cast_parameters(model, precision).to(device).eval()


def texts(batch: int, channels: int, device: str) -> PackedText:
    generator = torch.Generator().manual_seed(batch)
    states = [torch.randn(TEXT_TOKENS, channels, generator=generator) for _ in range(batch)]
    return pack(states).to(device)


def sampler(
    model: FlowTransformer, config: TrainConfig, variant: Variant, steps: int, device: str
) -> Callable[[int], Tensor]:
    """The sampling of the noise of that number."""
    text = texts(variant.batch, model.text.project[0].in_features, device)
    compiled = torch.compile(model, dynamic=False) if variant.compiled else None

    def run(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(variant.batch, *model.latent_shape, generator=generator).to(device)
        return sample(
            model, config.flow, text, GUIDANCES[variant.guidance], noise, steps=steps,
            network=compiled,
        )  # fmt: skip

    return run


def seconds(run: Callable[[int], Tensor], number: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    latents = run(number)
    if device == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    if not latents.isfinite().all():
        raise FloatingPointError("the sampled latents are not finite")
    return taken


def summary(variant: Variant, times: list[float], eager: list[float], steps: int) -> dict[str, Any]:
    """The row of a variant: seconds, images/s, and the ratio to eager round by round."""
    branches = 2 if GUIDANCES[variant.guidance].reward_scale else 1
    return {
        "seconds": quantiles(times),
        "images_per_second": quantiles([variant.batch / t for t in times]),
        "ratio": {"eager": quantiles([e / t for e, t in zip(eager, times, strict=True)])},
        "counted": {"evaluations_an_image": branches * steps},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    config = preset(given.preset)
    model = network(given.preset, given.precision, given.device)
    ways = (False,) if given.eager_only else (False, True)
    every = [Variant(g, b, c) for g in GUIDANCES for b in given.batches for c in ways]
    runs = {v.name: sampler(model, config, v, given.steps, given.device) for v in every}
    for run in runs.values():
        seconds(run, 0, given.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, 1 + number, given.device))
    rows = {v.name: summary(v, times[v.name], times[v.eager], given.steps) for v in every}
    for name, row in rows.items():
        quantile = row["seconds"]
        print(
            f"{name:40}{quantile['median']:8.3f} s ({quantile['p20']:.3f} to {quantile['p80']:.3f})"
            f"{row['images_per_second']['median']:9.2f} images/s"
            f"  × {row['ratio']['eager']['median']:.2f} of eager"
        )
    record = {
        **machine(given.device),
        "settings": {"preset": given.preset, "steps": given.steps, "precision": given.precision,
                     "text_tokens": TEXT_TOKENS, "rewards": REWARDS},
        "variants": rows,
    }  # fmt: skip
    write(record, given.out / f"sample-{given.preset}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
