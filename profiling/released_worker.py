"""Worker process of bench_step.py with the training step of the released MIRO.

    PYTHONPATH=FOLDER python profiling/released_worker.py SETTINGS

Install the package with `pip install --no-deps --target FOLDER miro-t2i==0.1.4`. It imports as
`miro`, as this project does, so this module imports nothing of ours. SETTINGS are
bench_step.Settings as JSON. The step is that of the package's training: self-conditioning pass with
gradients, flow loss with learned weights, backward, clipping, LAMB and EMA. Network,
preconditioning and loss are the package's, with the width divided by `scale`.
"""

# The modules of miro are those of the released package.
# pyright: reportMissingImports=false
from __future__ import annotations

import copy
from typing import Any

import torch
from miro.models.loss import FlowMatchingLoss
from miro.models.networks.rin import CADRINTextCond
from miro.models.preconditioning import FlowPrecond
from miro.models.scheduler import LinearScheduler
from miro.utils.optimizers import Lamb
from torch import Tensor, nn
from worker import Phases, Step, serve

NAMES = ("clip", "aesthetic", "image_reward", "pick_a_score", "hpsv2", "vqa", "sciscore")
TEXT_CHANNELS = 2048


def network(scale: int) -> tuple[nn.Module, nn.Module]:
    """Network of the released configuration, and its preconditioning."""
    width = 1024 // scale
    model = CADRINTextCond(
        data_size=32, data_dim=width // 2, num_input_channels=4, num_latents=256,
        latents_dim=width, label_dim=TEXT_CHANNELS, num_processing_layers=4, num_blocks=4,
        patch_size=2, num_cond_tokens=77, read_write_heads=16, compute_heads=32,
        latent_mlp_multiplier=4, data_mlp_multiplier=4, num_text_registers=16,
        coherence_keys=[f"{name}_score" for name in NAMES], coherence_dropout=0.0,
        use_cond_rin_block=True, concat_cond_token_to_latents=False, use_self_conditioning=True,
    )  # fmt: skip
    return model.train(), FlowPrecond(num_latents=256, latents_dim=width)


class ReleasedStep(Step):
    """A step of the released training on random latents, texts and scores."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.device = settings, settings["device"]
        torch.manual_seed(0)
        model, precondition = network(settings["scale"])
        self.model, self.precondition = model.to(self.device), precondition.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
        self.ema_pairs = [(a, b) for a, b in pairs if b.is_floating_point()]
        self.params = [
            param
            for module in (self.model, self.precondition)
            for param in module.parameters()
            if param.requires_grad
        ]
        self.optimizer = Lamb(self.params, lr=1e-3, weight_decay=0.01, decouple=False)
        self.loss = FlowMatchingLoss(
            LinearScheduler(), torch.zeros(1, TEXT_CHANNELS), self_cond_rate=0.9,
            cond_drop_rate=0.0, do_gradnorm_reweighting=True,
        )  # fmt: skip
        # The package's loss zeroes gradients through the uncompiled module.
        self.compiled_model: Any = torch.compile(self.model) if settings["compiled"] else self.model
        self.parameters = sum(param.numel() for param in self.model.parameters())

    def batch(self, number: int) -> dict[str, Tensor]:
        """The random batch `number`."""
        generator = torch.Generator().manual_seed(number)
        batch, longest = self.settings["batch"], self.settings["padded"]
        lengths = torch.tensor(self.settings["lengths"])
        data = {
            "x_0": torch.randn(batch, 4, 32, 32, generator=generator),
            "text_tokens_embeddings": torch.randn(
                batch, longest, TEXT_CHANNELS, generator=generator
            ),
            "text_tokens_mask": torch.arange(longest) < lengths[:, None],
        }
        scores = torch.rand(len(NAMES), batch, generator=generator)
        data |= {f"{n}_score_coherence": s for n, s in zip(NAMES, scores, strict=True)}
        return {name: value.to(self.device) for name, value in data.items()}

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        bf16 = self.settings["precision"] == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            value, _ = self.loss(self.precondition, self.compiled_model, None, data, 0)
        return value.mean()

    def run(self, number: int, phases: Phases) -> Tensor:
        """Run a training step and return its loss."""
        with phases("data"):
            data = self.batch(number)
        with phases("forward"):
            loss = self.forward(data)
        with phases("backward"):
            loss.backward()
        with phases("optimizer"):
            nn.utils.clip_grad_norm_(self.params, 2.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        with phases("average"), torch.no_grad():
            averages, weights = (list(part) for part in zip(*self.ema_pairs, strict=True))
            torch._foreach_lerp_(averages, weights, 1e-4)
        return loss.detach()

    def useful(self) -> Tensor:
        """Run the network once, without the self-conditioning pass."""
        data = self.batch(0)
        generator = torch.Generator().manual_seed(0)
        t = torch.rand(len(data["x_0"]), generator=generator).to(self.device)
        noise = torch.randn(data["x_0"].shape, generator=generator).to(self.device)
        y, data = self.loss._calculate_noisy_input(data["x_0"], noise, t, data, None)
        data |= {"y": y, "previous_latents": None}
        return self.precondition(self.model, data)[0]


if __name__ == "__main__":
    serve(ReleasedStep)
