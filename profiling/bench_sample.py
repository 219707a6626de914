"""Latency and throughput of sampling: with and without guidance, eager and compiled.

    python profiling/bench_sample.py [--preset demo] [--batches 1 16] [--steps 20] [--rounds 5]

The network has random weights and random text states. Both guidance branches run as one batch. All
variants are warmed up and interleaved; the table has the seconds of a whole sampling run, median
with 20th and 80th percentile, and the ratio to eager round by round. Writes
sample-PRESET-DATE.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from bench_utils import (
    LATENTS,
    REWARDS,
    TEXT_CHANNELS,
    add_device,
    argument_parser,
    interleave,
    metadata,
    quantiles,
    ratios,
    seconds,
    write_json,
)
from torch import Tensor

from miro.conditioning import RewardTarget
from miro.model.packed_text import PackedText, pack
from miro.model.transformer import FlowTransformer
from miro.sampling.sampler import Guidance, sample
from miro.training.batch_plan import Precision
from miro.training.config import TrainConfig
from miro.training.engine import cast_parameters
from miro.training.presets import preset

TEXT_TOKENS = 32
SHAPES = {"demo": ((3, 32, 32), 384)}
"""Shape of a latent and channels of the text, for presets that differ from the default."""
BEST, WORST = RewardTarget((1.0,) * REWARDS), RewardTarget((0.0,) * REWARDS)
GUIDANCES = {
    "no guidance": Guidance(BEST),
    "reward guidance": Guidance(BEST, WORST, reward_scale=5.0),
}


@dataclass(frozen=True)
class Variant:
    """A guidance, a batch size, and eager or compiled."""

    guidance: str
    batch: int
    compiled: bool

    @property
    def name(self) -> str:
        """Name in the results."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.guidance}, batch {self.batch}, {mode}"

    @property
    def eager(self) -> str:
        """Name of the same variant in eager mode."""
        return f"{self.guidance}, batch {self.batch}, eager"


def network(name: str, precision: Precision, device: str) -> FlowTransformer:
    """Network of the preset, with random weights in place of zeros."""
    shape, channels = SHAPES.get(name, (LATENTS, TEXT_CHANNELS))
    torch.manual_seed(0)
    model = FlowTransformer(preset(name).model, shape, channels, REWARDS)
    for param in model.parameters():
        if not param.any():
            torch.nn.init.normal_(param, std=0.02)
    return cast_parameters(model, precision).to(device).eval()


def texts(batch: int, channels: int, device: str) -> PackedText:
    """Random text states."""
    generator = torch.Generator().manual_seed(batch)
    states = [torch.randn(TEXT_TOKENS, channels, generator=generator) for _ in range(batch)]
    return pack(states).to(device)


def timed_sampler(
    model: FlowTransformer, config: TrainConfig, variant: Variant, steps: int, device: str
) -> Callable[[int], float]:
    """A function that samples from the noise of a seed and returns its seconds."""
    text = texts(variant.batch, cast(torch.nn.Linear, model.text.project[0]).in_features, device)
    compiled = torch.compile(model, dynamic=False) if variant.compiled else None

    def run(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(variant.batch, *model.latent_shape, generator=generator).to(device)
        latents: list[Tensor] = []
        duration = seconds(
            lambda: latents.append(
                sample(
                    model, config.flow, text, GUIDANCES[variant.guidance], noise, steps=steps,
                    network=compiled,
                )
            ),
            device,
        )  # fmt: skip
        if not latents[0].isfinite().all():
            raise FloatingPointError(f"{variant.name}: sampled latents are not finite")
        return duration

    return run


def summary(variant: Variant, times: list[float], eager: list[float], steps: int) -> dict[str, Any]:
    """The row of a variant: seconds, images/s, and the ratio to eager round by round."""
    branches = 2 if GUIDANCES[variant.guidance].reward_scale else 1
    return {
        "seconds": quantiles(times),
        "images_per_second": quantiles([variant.batch / t for t in times]),
        "ratio": {"eager": ratios(eager, times)},
        "counted": {"evaluations_per_image": branches * steps},
    }


def main() -> int:
    """Time sampling, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--eager-only", action="store_true")
    add_device(parser)
    args = parser.parse_args()
    config = preset(args.preset)
    model = network(args.preset, args.precision, args.device)
    modes = (False,) if args.eager_only else (False, True)
    variants = [Variant(g, b, c) for g in GUIDANCES for b in args.batches for c in modes]
    times = interleave(
        {v.name: timed_sampler(model, config, v, args.steps, args.device) for v in variants},
        args.rounds,
    )
    rows = {v.name: summary(v, times[v.name], times[v.eager], args.steps) for v in variants}
    for name, row in rows.items():
        quantile = row["seconds"]
        print(
            f"{name:40}{quantile['median']:8.3f} s ({quantile['p20']:.3f} to {quantile['p80']:.3f})"
            f"{row['images_per_second']['median']:9.2f} images/s"
            f"  × {row['ratio']['eager']['median']:.2f} of eager"
        )
    record = {
        **metadata(args.device),
        "settings": {"preset": args.preset, "steps": args.steps, "precision": args.precision,
                     "text_tokens": TEXT_TOKENS, "rewards": REWARDS},
        "variants": rows,
    }  # fmt: skip
    write_json(record, args.out / f"sample-{args.preset}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
