"""What the package hpsv2 1.2.0 scores, for tests/miro/test_clip_family.py to compare with.

Run by `make reward-oracles`, in its environment: python hpsv2_scores.py FIXTURE.json. The package's
own `score` runs, on a network of its own class with the shape of ViT-H-14 and the size of a toy.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from weights import image as oracle_image
from weights import weights

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
# (height, width): the first is not resized, so there both sides see the same pixels.
SIZES = ((32, 32), (48, 80), (101, 33), (225, 452), (20, 27))
PROMPTS = (
    "a red frog",
    "Two cats left of a dog, café &amp; bar — photograph",
    "",
    "a very long caption " * 20,
)


def import_hpsv2() -> Any:
    """The package's scoring module; its wheel lacks the vocabulary, so open_clip's is read."""
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    opened = gzip.open

    def instead(path: Any, *args: Any, **kwargs: Any) -> Any:
        missing = str(path).endswith(vocabulary.name) and not Path(path).exists()
        return opened(vocabulary if missing else path, *args, **kwargs)

    gzip.open = instead
    try:
        from hpsv2 import img_score
    finally:
        gzip.open = opened
    return img_score


def folded(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Names and shapes with a * for layer numbers: all layers of an encoder have equal shapes."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        general = re.sub(r"\.resblocks\.\d+\.", ".resblocks.*.", name)
        assert shapes.setdefault(general, list(tensor.shape)) == list(tensor.shape), name
    return shapes


def main(fixture: Path) -> None:
    img_score = import_hpsv2()
    from hpsv2.src.open_clip import add_model_config, create_model_and_transforms

    # The package's own options, which decide the preprocessing.
    options = {"precision": "fp32", "light_augmentation": True, "output_dict": True}
    with torch.device("meta"):
        published, *_ = create_model_and_transforms("ViT-H-14", None, device="meta", **options)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "toy.json")
        config.write_text(json.dumps(CONFIG))
        add_model_config(config)
        network, _, prepare = create_model_and_transforms("toy", None, device="cpu", **options)
        state = weights(network.state_dict())
        checkpoint = str(Path(folder, "toy.pt"))
        torch.save({"state_dict": state}, checkpoint)
        img_score.model_dict.update(model=network, preprocess_val=prepare)
        scores = []
        for height, width in SIZES:
            pixels = oracle_image(f"{height}x{width}", height, width).permute(1, 2, 0)
            image = Image.fromarray(np.asarray(pixels))
            scores.append([float(img_score.score(image, text, checkpoint)[0]) for text in PROMPTS])
    record = {
        "versions": {name: version(name) for name in ("hpsv2", "torch", "torchvision")},
        "config": CONFIG,
        "sizes": SIZES,
        "prompts": PROMPTS,
        "scores": scores,
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "published": {
            "tensors": len(published.state_dict()),
            "shapes": folded(published.state_dict()),
        },
    }
    fixture.parent.mkdir(parents=True, exist_ok=True)
    fixture.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
