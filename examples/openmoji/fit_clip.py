"""Fitting the small CoCa of the alignment reward to a dataset's own, partly wrong pairs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miro.data.shards import Manifest, shard_path
from miro.images.pillow import decode
from miro.sources.tar import iterate_shard
from miro.utils.atomic_io import atomic_write
from miro.utils.rng import generator_from, seed_from
from miro.utils.serialize import differences
from openmoji.coca import (
    CONFIG,
    PAD,
    WEIGHTS,
    Captioner,
    CaptionerConfig,
    config_text,
    open_clip_tokens,
)

METRICS = "metrics.json"
MAX_TOKENS = 64
"""Longer captions are truncated."""


@dataclass(frozen=True)
class FitClipConfig:
    """Size and training of the model; deterministic for a seed."""

    steps: int = 3_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    """Of AdamW, for embeddings, norms and biases."""
    matrix_rate: float = 3e-3
    """Of Muon (Keller Jordan 2024), for hidden matrices."""
    warmup_steps: int = 100
    weight_decay: float = 0.01
    trim: float = 0.45
    """Share of a batch that gets no gradient: the pairs whose captions the image contradicts most.
    Wrong captions would otherwise dominate the gradient of relations (trimmed loss)."""
    trim_from: float = 0.15
    """Share of the steps after which the loss is trimmed."""
    image_dropout: float = 0.1
    """Share of pairs without an image, which trains the unconditional likelihood."""
    image_size: int = 32
    conv_width: int = 24
    text_width: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup_steps", "image_size", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit-clip: {name} is {getattr(self, name)}; give 1 or more")
        for name in ("trim", "trim_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"fit-clip: {name} is {getattr(self, name)}; give 0 to below 1")
        if not 0 < self.image_dropout < 1:
            raise ValueError(
                f"fit-clip: image_dropout is {self.image_dropout}; give a number between 0 and 1"
            )


def fit_clip(
    data: Path,
    dest: Path,
    *,
    config: FitClipConfig | None = None,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> Path:
    """Fit a Captioner and write it to `dest`, unless `dest` has it already.

    Args:
        data: A dataset folder of captioned images.
        dest: The folder to write.
        config: Size and training.
        progress: Called with (step, steps, detail).

    Returns:
        `dest`.

    Raises:
        ValueError: `data` has no images, or `dest` a model of another configuration or dataset.
    """
    config = config or FitClipConfig()
    manifest = Manifest.read(data)
    if manifest.kind != "images" or not manifest.samples:
        raise ValueError(f"{data}: fit-clip needs a dataset folder of captioned images")
    made_from = {"config": asdict(config), "shards": [s.sha256 for s in manifest.shards]}
    if (dest / METRICS).exists():
        found = differences(made_from, json.loads((dest / METRICS).read_text())["made_from"])
        if found:
            raise ValueError(f"{dest} has another model ({'; '.join(found)}); give another DEST")
        return dest
    started = time.perf_counter()
    images, captions = _read_pairs(data, manifest, config.image_size)
    distinct = sorted(set(captions))
    ids = open_clip_tokens(distinct, MAX_TOKENS)
    context = int((ids != 0).sum(1).max())
    torch.manual_seed(seed_from(config.seed, "fit-clip"))
    model = Captioner(
        CaptionerConfig(
            vocabulary=tuple(token for token in ids.unique().tolist() if token),
            context=context,
            image_size=config.image_size,
            conv_width=config.conv_width,
            text_width=config.text_width,
        )
    )
    position = {caption: row for row, caption in enumerate(distinct)}
    tokens = model.tokenize(distinct)[torch.tensor([position[caption] for caption in captions])]
    losses = _fit(model, images, tokens, config, progress)
    dest.mkdir(parents=True, exist_ok=True)
    atomic_write(dest / WEIGHTS, save(dict(model.state_dict())))
    atomic_write(dest / CONFIG, config_text(model.config).encode())
    metrics = {
        "made_from": made_from,
        "pairs": len(captions),
        "distinct_captions": len(distinct),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": losses,
        "seconds": round(time.perf_counter() - started, 1),
    }
    # Written last: it marks the folder as complete.
    atomic_write(dest / METRICS, json.dumps(metrics, indent=1).encode())
    return dest


def _read_pairs(data: Path, manifest: Manifest, size: int) -> tuple[Tensor, list[str]]:
    """Images uint8 (N, 3, size, size), one per caption, and the captions."""
    from miro.images.transforms import center_crop_resize

    images, captions = [], []
    for shard in manifest.shards:
        for _, members in iterate_shard(shard_path(data, shard)):
            record = json.loads(members["json"])
            image = decode(next(d for name, d in members.items() if name != "json"))
            if image.shape[1:] != (size, size):
                image = center_crop_resize(image, size, size)
            for caption in record["captions"].values():
                images.append(image)
                captions.append(caption)
    return torch.stack(images), captions


def _fit(
    model: Captioner,
    images: Tensor,
    tokens: Tensor,
    config: FitClipConfig,
    progress: Callable[[int, int | None, str], None] | None,
) -> list[float]:
    """Train in place; returns the mean loss in nats per caption of each fiftieth of the steps."""
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and ("blocks" in n or "attn" in n)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices,
        lr=config.matrix_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        others,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    rates = {muon: config.matrix_rate, adamw: config.learning_rate}
    weights = _token_weights(tokens)
    window = max(1, config.steps // 50)
    total, means = torch.zeros(()), []
    model.train()
    for step in range(config.steps):
        generator = generator_from(config.seed, "fit-clip", step)
        factor = min(1.0, (step + 1) / config.warmup_steps) * (1 - step / config.steps)
        for optimizer, rate in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        pairs = torch.randint(len(images), (config.batch_size,), generator=generator)
        dropped = torch.rand(config.batch_size, generator=generator) < config.image_dropout
        batch = tokens[pairs]
        with _bf16():
            encoded = model.encode_image(images[pairs])
            null = model.no_picture.to(encoded.dtype)
            encoded = torch.where(dropped[:, None, None], null, encoded)
            likelihoods = model.log_likelihoods(encoded, batch)
        losses = -(likelihoods * weights[batch[:, 1:]]).sum(1)
        if step >= config.trim_from * config.steps:
            losses = losses[_least_contradicted(model, likelihoods, batch, dropped, config.trim)]
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in rates:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if (step + 1) % window == 0:
            means.append(round(float(total) / window, 4))
            total.zero_()
            if progress is not None:
                progress(step + 1, config.steps, f"loss {means[-1]:.3f}")
    return means


@torch.no_grad()
def _least_contradicted(
    model: Captioner, likelihoods: Tensor, tokens: Tensor, dropped: Tensor, trim: float
) -> Tensor:
    """Indices of all pairs but the share `trim` whose captions the image contradicts most."""
    with _bf16():
        information = likelihoods - model.unconditional_log_likelihoods(tokens)
    contradiction = information.clamp(max=0).sum(1)
    # The unconditional likelihood is trained on all captions, wrong ones included.
    contradiction[dropped] = 0
    return contradiction.topk(len(contradiction) - int(trim * len(contradiction))).indices


def _token_weights(tokens: Tensor) -> Tensor:
    """Loss weight per vocabulary entry: count^-½, with a mean of 1 over the corpus.

    Frequent tokens (articles) are easy; the rarer ones describe the image.
    """
    counts = tokens[:, 1:].flatten().bincount(minlength=int(tokens.max()) + 1).float()
    counts[PAD] = 0
    weights = counts.clamp(min=1).rsqrt()
    return weights * (counts.sum() / (weights * counts).sum())


@contextlib.contextmanager
def _bf16() -> Iterator[None]:
    """Autocast to bf16 with SDPA's math backend.

    On CPUs the bf16 backward of the flash backend is much slower.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
