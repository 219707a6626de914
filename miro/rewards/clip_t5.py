"""CLIP-FlanT5, the network of VQAScore, on transformers' CLIP and T5, and its published files.

CLIP's vision tower sees the picture (the patches of its last layer but one), a projector of two
layers turns each patch into a token, and FLAN-T5 reads them in the place of a word of the question.
Source: Lin et al. 2024, arXiv 2404.01291, with what their package t2v_metrics makes of a question.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from miro.rewards.vlm import local_folder

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What the published models were tuned with, so it is part of them."""

PATCH_LAYER = -2


class ClipT5(nn.Module):
    """vision: a CLIPVisionModel; projector: to T5's width; t5: a T5ForConditionalGeneration."""

    def __init__(self, vision: nn.Module, t5: nn.Module) -> None:
        super().__init__()
        self.vision: Any = vision
        self.t5: Any = t5
        seen, width = self.vision.config.hidden_size, self.t5.config.d_model
        self.projector = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    def see(self, pixels: Tensor) -> Tensor:
        """(n, 3, size, size), normalised, to (n, patches, width of T5)."""
        layers = self.vision(pixels, output_hidden_states=True).hidden_states
        return self.projector(layers[PATCH_LAYER][:, 1:])

    def log_likelihood(
        self, before: Tensor, seen: Tensor, after: Sequence[Tensor], answer: Tensor, words: int
    ) -> Tensor:
        """float32 (B, a): log-probability of each token of the answer to B questions.

        before, int64 (p,): what all questions say before the picture; seen (B, patches, width);
        after: int64 tokens (q_i,) behind it; answer: int64 (a,); words: the vocabulary's size, as
        tables of words may have rows to spare.
        """
        embed, device = self.t5.get_input_embeddings(), seen.device
        count, patches = seen.shape[:2]
        tokens = nn.utils.rnn.pad_sequence(list(after), batch_first=True).to(device)
        lengths = torch.tensor([len(text) for text in after], device=device)
        head = embed(before.to(device)).expand(count, -1, -1)
        inputs = torch.cat([head, seen, embed(tokens)], 1)
        first = len(before) + patches
        mask = torch.arange(inputs.shape[1], device=device) < (first + lengths)[:, None]
        # T5 starts an answer with its padding token, 0.
        said = torch.cat([answer.new_zeros(1), answer[:-1]]).to(device).expand(count, -1)
        logits = self.t5(
            inputs_embeds=inputs, attention_mask=mask.long(), decoder_input_ids=said
        ).logits
        found = logits[..., :words].float().log_softmax(-1)
        return found.gather(-1, answer.to(device).expand(count, -1)[..., None])[..., 0]


def is_clip_t5(folder: Path) -> bool:
    """Whether a folder's config.json is that of a T5 with a vision tower."""
    config = _config(folder)
    return config.get("model_type") in ("t5", "clip_t5") and "mm_vision_tower" in config


def load_clip_t5(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ClipT5, Any]:
    """The network in a folder as published, and its tokenizer.

    Raises:
        ValueError: a file is missing, not of this network or another model's; names it.
    """
    from transformers import T5Tokenizer

    config, tensors = _config(folder), {}
    for part in _weight_files(folder):
        for name, tensor in _read(part).items():
            if (ours := our_name(name)) is not None:
                tensors[ours] = tensor.to(dtype)
    try:
        network = assemble(config, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: its weights are not those of a CLIP-FlanT5: {error}"
        ) from error
    tokenizer: Any = T5Tokenizer.from_pretrained(folder)
    rows = network.t5.get_input_embeddings().weight.shape[0]
    # Where its files are absent, transformers builds a tokenizer of 104 tokens without a word.
    if not rows // 2 <= len(tokenizer) <= rows:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its network {rows}; tokenizer"
            ".json or spiece.model is missing, copy it from google/flan-t5-xxl"
        )
    return network, tokenizer


def assemble(config: dict[str, Any], tensors: dict[str, Tensor]) -> ClipT5:
    """The network of a published config.json on the tensors, named as ours; they are not copied.

    KeyError or RuntimeError where one is missing or does not fit, ValueError for another projector.
    """
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

    projector = config.get("mm_projector_type", "mlp2x_gelu")
    layer, feature = (config.get(f"mm_vision_select_{n}") for n in ("layer", "feature"))
    if projector != "mlp2x_gelu" or layer not in (None, -2) or feature not in (None, "patch"):
        raise ValueError(
            f"projector {projector!r} of layer {layer}, {feature!r}: only 'mlp2x_gelu' of the"
            " patches of layer -2 is known; take zhiqiulin/clip-flant5-xxl or -xl"
        )
    not_t5 = ("mm_", "model_type", "architectures")
    t5_config = T5Config(**{k: v for k, v in config.items() if not k.startswith(not_t5)})
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(t5_config)
        network = ClipT5(CLIPVisionModel(_vision_config(tensors)), t5)
    places = network.vision.embeddings.num_positions
    network.vision.embeddings.position_ids = torch.arange(places)[None]  # no file holds it now
    # T5's two halves read words from one table, which files hold once, twice or thrice.
    tables = [f"t5.{n}.weight" for n in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    table = next((tensors[name] for name in tables if name in tensors), None)
    if table is not None:
        tensors = tensors | dict.fromkeys(tables, table)
    # Assigned, so that T5's output table is not the input's: FLAN-T5 has two, and transformers ties
    # them from version 5 on.
    network.load_state_dict(tensors, assign=True)
    t5.set_input_embeddings(t5.shared)
    return network


def _vision_config(tensors: dict[str, Tensor]) -> Any:
    """The size of an OpenAI CLIP tower, whose heads have 64 channels, from its tensors."""
    from transformers import CLIPVisionConfig

    width, _, _, patch = tensors["vision.embeddings.patch_embedding.weight"].shape
    places = len(tensors["vision.embeddings.position_embedding.weight"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in tensors),
        num_attention_heads=width // 64,
        image_size=math.isqrt(places - 1) * patch,
        patch_size=patch,
    )


def our_name(published: str) -> str | None:
    """What ClipT5 calls a tensor of the published files; None for one it does not need."""
    if published == "embed_tokens.weight" or published.endswith(".position_ids"):
        return None
    if published.startswith("mm_projector."):
        return published.removeprefix("mm_")
    tower = re.match(r"vision_tower\.vision_tower\.(vision_model\.)?", published)
    return f"vision.{published[tower.end() :]}" if tower else f"t5.{published}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder of a model, or a hub id") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); get it again") from None


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files with the weights, one or many, safetensors before torch's own."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = json.loads(index.read_text("utf-8"))["weight_map"].values()
            yield from (folder / part for part in sorted(set(parts)))
            return
        if (folder / name).is_file():
            yield folder / name
            return
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin, nor parts of it")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); get it again") from error


def open_clip_t5(weights: str) -> Path | None:
    """The folder of a CLIP-FlanT5 (a folder or a hub id), None where it is another model."""
    folder = local_folder(weights, ("*.json", "*.model", "*.txt"))
    if not is_clip_t5(folder):
        return None
    return local_folder(weights, ("*.json", "*.model", "*.bin", "*.safetensors"))
