"""FLOPs of our presets and of published models, in one convention: 2 for a multiply and an add.

    python profiling/count_flops.py [--released FOLDER] [--out profiling/results]

Counted by torch on tensors without data, so nothing is run and no weights are needed: a forward
pass of one image, a training step (three forward passes), and sampling (steps × forward passes a
step, two where guidance calls the network twice). Ours are derived by hand beside it, and the two
must agree. The published networks are diffusers' classes in their published configurations; the
released MIRO, which imports as `miro` too, is counted in a process of its own where FOLDER holds
the package miro-t2i (see bench_step.py).

The paper's Table 1 calls 4.16 TFLOPs what is 50 steps of one call each, in multiply-adds, without
attention's products (shared/miro-facts.md 0.a); FLUX's 1540 is taken the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measured import machine, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.flops import forward_flops
from miro.training.presets import preset
from miro_kernels import use_backend

HERE = Path(__file__).parent
LATENTS, TEXT_CHANNELS, REWARDS, LEVELS = (4, 32, 32), 2048, 7, 64


@dataclass(frozen=True)
class Counted:
    """One network at one resolution."""

    model: str
    pixels: int
    """Side of the image."""
    text: int
    """Text tokens, 0 where it takes a class."""
    parameters: int
    forward: float
    """FLOPs of one image."""
    steps: int
    calls: int
    """Forward passes of a sampling step: 2 with guidance, 1 where guidance is distilled."""

    @property
    def training(self) -> float:
        return 3 * self.forward

    @property
    def sampling(self) -> float:
        return self.steps * self.calls * self.forward


def count(run: Callable[[], Any]) -> float:
    with use_backend("torch"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def size(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def ours(name: str, config: ModelConfig, text: int, latents: tuple[int, int, int]) -> Counted:
    """One of our presets on one image with `text` tokens."""
    with torch.device("meta"):
        model = FlowTransformer(config, latents, TEXT_CHANNELS, REWARDS)
        x, t = torch.empty(1, *latents), torch.empty(1)
        states = torch.empty(text, TEXT_CHANNELS)
        offsets = torch.zeros(2, dtype=torch.int32)
        bins = torch.zeros(1, REWARDS, dtype=torch.int64)
        rewards = RewardCond(torch.empty(LEVELS), bins, bins.bool())
    packed = PackedText(states, offsets, text)
    forward = count(lambda: model(x, t, rewards, model.encode_context(packed)))
    return Counted(name, 8 * latents[1], text, size(model), forward, 50, 2)


def derived(config: ModelConfig, text: int, latents: tuple[int, int, int]) -> dict[str, float]:
    """The same forward pass by hand: FLOPs of its parts.

    The reference gathers the rows of the rewards' tables by a product with one-hot vectors, which
    the kernels do not.
    """
    shapes = (1, *latents), (text, TEXT_CHANNELS), (REWARDS, LEVELS)
    parts = forward_flops(config, *shapes)
    parts["modulation"] += 2 * REWARDS * LEVELS * config.channels * (3 * (2 * config.depth + 1) - 1)
    return parts


def published() -> list[Counted]:
    """Networks with open configurations, as diffusers builds them."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    found = []

    def add(name: str, pixels: int, text: int, steps: int, calls: int, model: nn.Module, **given):
        forward = count(lambda: model(**given))
        found.append(Counted(name, pixels, text, size(model), forward, steps, calls))

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


def released(folder: Path) -> list[Counted]:
    """The released network at its real width, counted by its worker."""
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
            raise ValueError(f"the released network did not run: {run.stderr.strip()[-400:]}")
        answer = json.loads(run.stdout.partition("answer ")[2].splitlines()[0])
        forward = answer["counted"]["useful_flops"] / 3
        parameters = answer["counted"]["parameters"]
        found.append(Counted("released MIRO", 256, text, parameters, forward, 50, 2))
    return found


def table(rows: list[Counted]) -> str:
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--released", type=Path, help="folder with the package miro-t2i")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    rows, parts = [], {}
    for name in ("small", "large"):
        config = preset(name).model
        for text in (77, 256):
            rows.append(ours(name, config, text, LATENTS))
            parts[f"{name} {text}"] = derived(config, text, LATENTS)
    rows += released(given.released) if given.released else []
    rows += published()
    print(table(rows))
    record = {
        **machine("cpu"),
        "derived": parts,
        "rows": [asdict(r) | {"training": r.training, "sampling": r.sampling} for r in rows],
    }
    write(record, given.out / "flops.json")


if __name__ == "__main__":
    main()
