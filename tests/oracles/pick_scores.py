"""What transformers 4.55 makes of PickScore's calls, for tests/miro/test_clip_family.py.

Run by `make reward-oracles`, in its environment: python pick_scores.py FIXTURE.json. PickScore and
SciScore were published for transformers before 5, whose image processor works on PIL images and
whose networks give tensors; a CLIPModel of CLIP-H's shape and a toy's size is scored as their model
cards say.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
from weights import image as oracle_image
from weights import weights

# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which both were tuned from.
PUBLISHED = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "projection_dim": 1024,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
SMALL = {
    "projection_dim": 32,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
}
# (height, width): the first is not resized, so there both sides see the same pixels.
SIZES = ((32, 32), (48, 80), (101, 33), (32, 35), (225, 452), (20, 27))
PROMPTS = (
    "a red frog",
    "Two cats left of a dog,  café &amp; bar — photograph",
    "",
    "a very long caption " * 20,
)


def tokenizer() -> CLIPTokenizerFast:
    """What CLIPProcessor takes: OpenAI's vocabulary, from the file that open_clip carries."""
    words = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(word, word): number for word, number in words.encoder.items()}
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.__getitem__)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, pairs = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps(ids), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizerFast(str(vocabulary), str(pairs))


def folded(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Names and shapes with a * for layer numbers: all layers of an encoder have equal shapes."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        general = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        assert shapes.setdefault(general, list(tensor.shape)) == list(tensor.shape), name
    return shapes


@torch.inference_mode()
def main(fixture: Path) -> None:
    with torch.device("meta"):
        published = CLIPModel(CLIPConfig(**PUBLISHED))
    network = CLIPModel(CLIPConfig(**SMALL)).eval()
    state = weights(network.state_dict())
    network.load_state_dict(state)
    process = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = tokenizer()(
        list(PROMPTS), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    text = network.get_text_features(**tokens)
    text = text / text.norm(dim=-1, keepdim=True)
    scores = []
    for height, width in SIZES:
        pixels = oracle_image(f"{height}x{width}", height, width).permute(1, 2, 0)
        image = network.get_image_features(
            **process(images=Image.fromarray(np.asarray(pixels)), return_tensors="pt")
        )
        image = image / image.norm(dim=-1, keepdim=True)
        scores.append((network.logit_scale.exp() * text @ image[0] / 100).tolist())
    record = {
        "versions": {name: version(name) for name in ("transformers", "torch", "pillow")},
        "config": SMALL,
        "sizes": SIZES,
        "prompts": PROMPTS,
        "tokens": tokens["input_ids"].tolist(),
        "scores": scores,
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "published": {
            "config": PUBLISHED,
            "tensors": len(published.state_dict()),
            "shapes": folded(published.state_dict()),
        },
    }
    fixture.parent.mkdir(parents=True, exist_ok=True)
    fixture.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
