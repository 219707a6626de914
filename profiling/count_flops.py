"""Count FLOPs of our presets and of published networks, 2 per multiply-add.

    python profiling/count_flops.py [--released FOLDER] [--out profiling/results]

Counted on the meta device, without weights: a forward pass of one image, a training step (three
forward passes), and sampling (steps × forward passes per step, two with guidance). Those of our
presets are also derived by hand, and must agree. Published networks are the classes of diffusers in
their published configurations. The released MIRO, which imports as `miro` too, is counted in a
process of its own if FOLDER has the package miro-t2i (see bench_step.py).

Table 1 of the paper counts 4.16 TFLOPs: multiply-adds of 50 steps without guidance and without the
matrix products of attention. Its 1540 for FLUX are counted the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_utils import (
    BINS,
    HERE,
    LATENTS,
    REWARDS,
    TEXT_CHANNELS,
    argument_parser,
    metadata,
    write_json,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.flops import forward_flops
from miro.training.presets import preset
from miro_kernels import use_backend


@dataclass(frozen=True)
class NetworkFlops:
    """FLOPs of a network at one resolution.

    pixels: side of the image. text: text tokens, 0 if class-conditional. forward: FLOPs per image.
    calls: forward passes per sampling step, 2 with guidance unless it is distilled.
    """

    model: str
    pixels: int
    text: int
    parameters: int
    forward: float
    steps: int
    calls: int

    @property
    def training(self) -> float:
        """FLOPs per image of a training step."""
        return 3 * self.forward

    @property
    def sampling(self) -> float:
        """FLOPs to sample an image."""
        return self.steps * self.calls * self.forward


def count(run: Callable[[], Any]) -> float:
    """FLOPs of a call."""
    with use_backend("torch"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(param.numel() for param in model.parameters())


def ours(name: str, config: ModelConfig, text: int, latents: tuple[int, int, int]) -> NetworkFlops:
    """A preset of ours, with `text` tokens."""
    with torch.device("meta"):
        model = FlowTransformer(config, latents, TEXT_CHANNELS, REWARDS)
        x, t = torch.empty(1, *latents), torch.empty(1)
        states = torch.empty(text, TEXT_CHANNELS)
        offsets = torch.zeros(2, dtype=torch.int32)
        bins = torch.zeros(1, REWARDS, dtype=torch.int64)
        rewards = RewardCond(torch.empty(BINS), bins, bins.bool())
    packed = PackedText(states, offsets, text)
    forward = count(lambda: model(x, t, rewards, model.encode_context(packed)))
    return NetworkFlops(name, 8 * latents[1], text, parameter_count(model), forward, 50, 2)


def derived(config: ModelConfig, text: int, latents: tuple[int, int, int]) -> dict[str, float]:
    """FLOPs of the parts of the same forward pass, derived by hand.

    The reference looks up reward embeddings by a product with one-hot vectors; the kernels do not.
    """
    shapes = (1, *latents), (text, TEXT_CHANNELS), (REWARDS, BINS)
    parts = forward_flops(config, *shapes)
    parts["modulation"] += 2 * REWARDS * BINS * config.channels * (3 * (2 * config.depth + 1) - 1)
    return parts


def published() -> list[NetworkFlops]:
    """Networks of diffusers in their published configurations."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    found = []

    def add(name: str, pixels: int, text: int, steps: int, calls: int, model: nn.Module, **inputs):
        forward = count(lambda: model(**inputs))
        found.append(
            NetworkFlops(name, pixels, text, parameter_count(model), forward, steps, calls)
        )

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape)

    with torch.device("meta"):
        step = torch.zeros(1, dtype=torch.int64)
        add(
            "DiT-XL/2", 256, 0, 250, 2, DiTTransformer2DModel(out_channels=8),
            hidden_states=empty(1, 4, 32, 32), timestep=step, class_labels=step,
        )  # fmt: skip
        for pixels in (256, 512):
            side = pixels // 8
            model = PixArtTransformer2DModel(
                sample_size=side, caption_channels=4096, use_additional_conditions=False
            )
            add(
                "PixArt-α", pixels, 120, 20, 2, model, hidden_states=empty(1, 4, side, side),
                encoder_hidden_states=empty(1, 120, 4096), timestep=step,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )  # fmt: skip
        sd3 = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=192,
        )  # fmt: skip
        sana = SanaTransformer2DModel()
        flux = FluxTransformer2DModel(guidance_embeds=True)
        for pixels in (256, 1024):
            side = pixels // 8
            add(
                "SD3-medium", pixels, 333, 28, 2, sd3, hidden_states=empty(1, 16, side, side),
                encoder_hidden_states=empty(1, 333, 4096), pooled_projections=empty(1, 2048),
                timestep=step,
            )  # fmt: skip
            small = pixels // 32
            add(
                "Sana 1.6B", pixels, 300, 20, 2, sana, hidden_states=empty(1, 32, small, small),
                encoder_hidden_states=empty(1, 300, 2304), timestep=step,
            )  # fmt: skip
            tokens = (pixels // 16) ** 2
            add(
                "FLUX.1-dev", pixels, 512, 50, 1, flux, hidden_states=empty(1, tokens, 64),
                encoder_hidden_states=empty(1, 512, 4096), pooled_projections=empty(1, 768),
                timestep=torch.zeros(1), img_ids=empty(tokens, 3), txt_ids=empty(512, 3),
                guidance=torch.zeros(1),
            )  # fmt: skip
    return found


def released(folder: Path) -> list[NetworkFlops]:
    """The released network at full width, counted by its worker."""
    found = []
    for text in (77, 256):
        settings = {
            "scale": 1, "batch": 1, "lengths": [text], "padded": text, "precision": "fp32",
            "compiled": False, "device": "cpu", "counted_only": True,
        }  # fmt: skip
        command = [sys.executable, str(HERE / "released_worker.py"), json.dumps(settings)]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            raise ValueError(f"the released network failed: {run.stderr.strip()[-400:]}")
        answer = json.loads(run.stdout.partition("answer ")[2].splitlines()[0])
        forward = answer["counted"]["useful_flops"] / 3
        parameters = answer["counted"]["parameters"]
        found.append(NetworkFlops("released MIRO", 256, text, parameters, forward, 50, 2))
    return found


def table(rows: list[NetworkFlops]) -> str:
    """Format the rows."""
    head = ("model", "image", "text", "B param.", "GFLOP forward", "GFLOP to train", "sampling",
            "TFLOP to sample")  # fmt: skip
    lines = [f"{head[0]:16}{head[1]:>6}{head[2]:>6}{head[3]:>10}{head[4]:>15}{head[5]:>16}"
             f"{head[6]:>10}{head[7]:>17}"]  # fmt: skip
    for row in rows:
        lines.append(
            f"{row.model:16}{row.pixels:6}{row.text:6}{row.parameters / 1e9:10.3f}"
            f"{row.forward / 1e9:15.1f}{row.training / 1e9:16.1f}"
            f"{f'{row.steps} × {row.calls}':>10}{row.sampling / 1e12:17.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Count FLOPs, and write the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--released", type=Path, help="folder with the package miro-t2i")
    args = parser.parse_args()
    rows, parts = [], {}
    for name in ("small", "large"):
        config = preset(name).model
        for text in (77, 256):
            rows.append(ours(name, config, text, LATENTS))
            parts[f"{name} {text}"] = derived(config, text, LATENTS)
    rows += released(args.released) if args.released else []
    rows += published()
    print(table(rows))
    record = {
        **metadata("cpu"),
        "derived": parts,
        "rows": [asdict(r) | {"training": r.training, "sampling": r.sampling} for r in rows],
    }
    write_json(record, args.out / "flops.json")


if __name__ == "__main__":
    main()
