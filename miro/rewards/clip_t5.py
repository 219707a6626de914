"""CLIP-FlanT5, the network of VQAScore, on transformers' CLIP and T5.

CLIP's vision encoder gives patch features (of its last layer but one), an MLP projects each to a
token embedding, and FLAN-T5 gets these within the embeddings of the question.
Source: Lin et al. 2024, arXiv 2404.01291, with the prompt of their package t2v_metrics.
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

from miro.rewards.weights import read_json_object, resolve_folder

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt of the published models' fine-tuning."""

PATCH_LAYER = -2


class ClipT5(nn.Module):
    """A CLIPVisionModel, a projector to T5's width, and a T5ForConditionalGeneration."""

    def __init__(self, vision: nn.Module, t5: nn.Module) -> None:
        super().__init__()
        self.vision: Any = vision
        self.t5: Any = t5
        channels, width = self.vision.config.hidden_size, self.t5.config.d_model
        self.projector = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width)
        )

    @property
    def image_size(self) -> int:
        """Side of the input images in pixels."""
        return self.vision.config.image_size

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels (n, 3, size, size) as tokens (n, patches, d_model)."""
        layers = self.vision(pixels, output_hidden_states=True).hidden_states
        return self.projector(layers[PATCH_LAYER][:, 1:])

    def log_likelihood(
        self,
        before: Tensor,
        image_tokens: Tensor,
        after: Sequence[Tensor],
        answer: Tensor,
        vocabulary: int,
    ) -> Tensor:
        """Log-probability of each token of one answer to B questions.

        Args:
            before: int64 (p,), the tokens of every question before the image.
            image_tokens: (B, patches, d_model).
            after: B tensors int64 (q_i,), the tokens of each question after the image.
            answer: int64 (a,).
            vocabulary: Number of tokens to normalize over; the output table may be larger.

        Returns:
            float32 (B, a).
        """
        embed, device = self.t5.get_input_embeddings(), image_tokens.device
        count, patches = image_tokens.shape[:2]
        tokens = nn.utils.rnn.pad_sequence(list(after), batch_first=True).to(device)
        lengths = torch.tensor([len(text) for text in after], device=device)
        head = embed(before.to(device)).expand(count, -1, -1)
        inputs = torch.cat([head, image_tokens, embed(tokens)], 1)
        first = len(before) + patches
        mask = torch.arange(inputs.shape[1], device=device) < (first + lengths)[:, None]
        # T5 starts decoding with its padding token, 0.
        decoder_ids = torch.cat([answer.new_zeros(1), answer[:-1]]).to(device).expand(count, -1)
        logits = self.t5(
            inputs_embeds=inputs, attention_mask=mask.long(), decoder_input_ids=decoder_ids
        ).logits
        log_probs = logits[..., :vocabulary].float().log_softmax(-1)
        return log_probs.gather(-1, answer.to(device).expand(count, -1)[..., None])[..., 0]


def find_clip_t5(weights: str) -> Path | None:
    """The local folder of a CLIP-FlanT5, given by folder or hub id; None for another model."""
    folder = resolve_folder(weights, ("*.json", "*.model", "*.txt"))
    config = read_json_object(folder / "config.json")
    if config.get("model_type") not in ("t5", "clip_t5") or "mm_vision_tower" not in config:
        return None
    return resolve_folder(weights, ("*.json", "*.model", "*.bin", "*.safetensors"))


def load_clip_t5(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ClipT5, Any]:
    """Load the network in a folder of the published layout, and its tokenizer.

    Raises:
        ValueError: A file is missing, damaged or belongs to another model.
    """
    from transformers import T5Tokenizer

    config, tensors = read_json_object(folder / "config.json"), {}
    for path in _weight_files(folder):
        for name, tensor in _read_weights(path).items():
            if (renamed := convert_name(name)) is not None:
                tensors[renamed] = tensor.to(dtype)
    try:
        network = build_clip_t5(config, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: its weights are not those of a CLIP-FlanT5: {error}"
        ) from error
    tokenizer: Any = T5Tokenizer.from_pretrained(folder)
    rows = network.t5.get_input_embeddings().weight.shape[0]
    # If its files are missing, transformers builds a tokenizer of 104 tokens without an error.
    if not rows // 2 <= len(tokenizer) <= rows:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its network {rows}; copy "
            "tokenizer.json or spiece.model from google/flan-t5-xxl"
        )
    return network, tokenizer


def build_clip_t5(config: dict[str, Any], tensors: dict[str, Tensor]) -> ClipT5:
    """Build the network of a published config.json around `tensors`, which are not copied.

    Args:
        config: The content of config.json.
        tensors: The weights by ClipT5's parameter names (see `convert_name`).

    Raises:
        KeyError: The vision encoder's weights are missing.
        RuntimeError: Weights are missing or have other shapes.
        ValueError: The projector is not supported.
    """
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

    projector = config.get("mm_projector_type", "mlp2x_gelu")
    layer, feature = (config.get(f"mm_vision_select_{n}") for n in ("layer", "feature"))
    if projector != "mlp2x_gelu" or layer not in (None, -2) or feature not in (None, "patch"):
        raise ValueError(
            f"projector {projector!r} of layer {layer}, {feature!r}: only 'mlp2x_gelu' of the"
            " patches of layer -2 is supported; give zhiqiulin/clip-flant5-xxl or -xl"
        )
    not_t5 = ("mm_", "model_type", "architectures")
    t5_config = T5Config(**{k: v for k, v in config.items() if not k.startswith(not_t5)})
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(t5_config)
        network = ClipT5(CLIPVisionModel(_vision_config(tensors)), t5)
    positions = network.vision.embeddings.num_positions
    # A non-persistent buffer, which would stay on the meta device.
    network.vision.embeddings.position_ids = torch.arange(positions)[None]
    # T5's encoder and decoder share one token embedding, which files store once, twice or thrice.
    tables = [f"t5.{n}.weight" for n in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    table = next((tensors[name] for name in tables if name in tensors), None)
    if table is not None:
        tensors = tensors | dict.fromkeys(tables, table)
    # assign=True unties the output table from the input embedding: transformers 5 ties them, but
    # FLAN-T5 has two.
    network.load_state_dict(tensors, assign=True)
    t5.set_input_embeddings(t5.shared)
    return network


def _vision_config(tensors: dict[str, Tensor]) -> Any:
    """The CLIPVisionConfig of an OpenAI CLIP, whose heads have 64 channels, from its weights."""
    from transformers import CLIPVisionConfig

    width, _, _, patch = tensors["vision.embeddings.patch_embedding.weight"].shape
    positions = len(tensors["vision.embeddings.position_embedding.weight"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in tensors),
        num_attention_heads=width // 64,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )


def convert_name(published: str) -> str | None:
    """ClipT5's name of a published tensor; None for an unused one."""
    if published == "embed_tokens.weight" or published.endswith(".position_ids"):
        return None
    if published.startswith("mm_projector."):
        return published.removeprefix("mm_")
    vision = re.match(r"vision_tower\.vision_tower\.(vision_model\.)?", published)
    return f"vision.{published[vision.end() :]}" if vision else f"t5.{published}"


def _weight_files(folder: Path) -> Iterator[Path]:
    """The weight files, sharded or not; safetensors are preferred."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
            yield from (folder / shard for shard in sorted(set(shards)))
            return
        if (folder / name).is_file():
            yield folder / name
            return
    raise ValueError(
        f"{folder}: neither model.safetensors nor pytorch_model.bin; download it again"
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again") from error
