"""`miro fit-clip`: a small open_clip model fitted to a dataset's own, partly wrong pairs."""

from __future__ import annotations

import contextlib
import json
import logging
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
from openmoji.coca import CONFIG, PAD, WEIGHTS, Captioner, CaptionerConfig, save_config, tokenize

log = logging.getLogger(__name__)

METRICS = "metrics.json"
LONGEST = 64
"""Tokens of a caption that are read at most."""


@dataclass(frozen=True)
class FitClipConfig:
    """How the model is made. Steps are fixed, not seconds: a seed gives the same model."""

    steps: int = 3_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    """Of words, places, gains and biases, by AdamW."""
    matrix_rate: float = 3e-3
    """Of matrices, by Muon (Keller Jordan 2024)."""
    warmup_steps: int = 100
    weight_decay: float = 0.01
    trim: float = 0.45
    """Share of a batch that is left out once the model knows its way: the pairs whose captions it
    finds contradicted most. Wrong captions teach nothing, and drown what relations teach."""
    trim_from: float = 0.15
    """Share of the steps after which pairs are left out."""
    hide_picture: float = 0.1
    """Share of pairs whose picture is withheld, so that the model knows captions by habit too."""
    image_size: int = 32
    conv_width: int = 24
    text_width: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup_steps", "image_size", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit-clip: {name} must be 1 or more, got {getattr(self, name)}")
        for name in ("trim", "trim_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"fit-clip: {name} is {getattr(self, name)}; give 0 to below 1")
        if not 0 < self.hide_picture < 1:
            raise ValueError(
                f"fit-clip: hide_picture is {self.hide_picture}; give 0 to 1, both out"
            )


def fit_clip(
    data: Path,
    dest: Path,
    *,
    config: FitClipConfig | None = None,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> Path:
    """Fit to the pairs of the images folder `data`, write `dest`, and return it.

    What was fitted with the same configuration to the same shards is left as it is.

    Raises:
        ValueError: `data` holds no images, or `dest` was fitted otherwise.
    """
    config = config or FitClipConfig()
    manifest = Manifest.read(data)
    if manifest.kind != "images" or not manifest.samples:
        raise ValueError(f"{data}: fit-clip needs a dataset folder of captioned images")
    made_from = {"config": asdict(config), "shards": [s.sha256 for s in manifest.shards]}
    if (dest / METRICS).exists():
        found = differences(made_from, json.loads((dest / METRICS).read_text())["made_from"])
        if found:
            raise ValueError(f"{dest} was fitted otherwise ({'; '.join(found)}); give another DEST")
        return dest
    started = time.perf_counter()
    images, captions = _read_pairs(data, manifest, config.image_size)
    distinct = sorted(set(captions))
    ids = tokenize(distinct, LONGEST)
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
    words = model.words(distinct)[torch.tensor([position[caption] for caption in captions])]
    losses = _fit(model, images, words, config, progress)
    dest.mkdir(parents=True, exist_ok=True)
    atomic_write(dest / WEIGHTS, save(dict(model.state_dict())))
    atomic_write(dest / CONFIG, save_config(dest, model.config).encode())
    metrics = {
        "made_from": made_from,
        "pairs": len(captions),
        "distinct_captions": len(distinct),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": losses,
        "seconds": round(time.perf_counter() - started, 1),
    }
    # Last: a folder with metrics is complete.
    atomic_write(dest / METRICS, json.dumps(metrics, indent=1).encode())
    return dest


def _read_pairs(data: Path, manifest: Manifest, size: int) -> tuple[Tensor, list[str]]:
    """All pictures as uint8 (N, 3, size, size), one a caption, and the captions."""
    from miro.images.transforms import center_crop_resize

    pictures, captions = [], []
    for shard in manifest.shards:
        for _, members in iterate_shard(shard_path(data, shard)):
            record = json.loads(members["json"])
            image = next(d for name, d in members.items() if name != "json")
            picture = decode(image)
            if picture.shape[1:] != (size, size):
                picture = center_crop_resize(picture, size, size)
            for caption in record["captions"].values():
                pictures.append(picture)
                captions.append(caption)
    return torch.stack(pictures), captions


def _fit(
    model: Captioner,
    images: Tensor,
    words: Tensor,
    config: FitClipConfig,
    progress: Callable[[int, int | None, str], None] | None,
) -> list[float]:
    """Train in place; the mean loss in nats a caption, of each fiftieth of the steps."""
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
    weights = _rare_words_count_more(words)
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
        hidden = torch.rand(config.batch_size, generator=generator) < config.hide_picture
        said = words[pairs]
        with _fast_arithmetic():
            seen = model.see(images[pairs])
            seen = torch.where(hidden[:, None, None], model.no_picture.to(seen.dtype), seen)
            likelihoods = model.log_likelihoods(seen, said)
        losses = -(likelihoods * weights[said[:, 1:]]).sum(1)
        if step >= config.trim_from * config.steps:
            losses = losses[_least_contradicted(model, likelihoods, said, hidden, config.trim)]
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
    model: Captioner, likelihoods: Tensor, words: Tensor, hidden: Tensor, trim: float
) -> Tensor:
    """The pairs of a batch to learn from: all but the `trim` share the picture speaks against."""
    with _fast_arithmetic():
        ratios = likelihoods - model.without_picture(words)
    against = ratios.clamp(max=0).sum(1)
    # Pairs whose picture is withheld teach habit, wrong captions included: they stay.
    against[hidden] = 0
    return against.topk(len(against) - int(trim * len(against))).indices


def _rare_words_count_more(words: Tensor) -> Tensor:
    """A weight for each row of the vocabulary: one over the root of its count, 1 on average.

    Articles and full stops are easily learned and many; what a picture says is in rarer words.
    """
    counts = words[:, 1:].flatten().bincount(minlength=int(words.max()) + 1).float()
    counts[PAD] = 0
    weights = counts.clamp(min=1).rsqrt()
    return weights * (counts.sum() / (weights * counts).sum())


@contextlib.contextmanager
def _fast_arithmetic() -> Iterator[None]:
    """bf16 matrix products, and attention as plain products.

    Torch's fused attention is much slower than that in its bf16 backward on a CPU.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
