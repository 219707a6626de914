"""Toy CLIPs with weights by rule, as the files and folders in which the published ones come."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

_spec = importlib.util.spec_from_file_location(
    "oracle_weights", Path(__file__).parents[1] / "oracles" / "weights.py"
)
assert _spec is not None and _spec.loader is not None
rule: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rule)
FIXTURES = Path(__file__).parents[1] / "miro" / "fixtures"
TOY = "toy"
"""The architecture that open_clip knows by this name once `open_clip_toy` was called."""


def fixture(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def by_rule(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: rule.weight(name, shape) for name, shape in shapes.items()}


def as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.asarray(pixels.permute(1, 2, 0)))


def pictures(*shapes: tuple[int, int]) -> list[Tensor]:
    return [rule.picture(f"{height}x{width}", height, width) for height, width in shapes]


def open_clip_toy(folder: Path, name: str = "HPS_v2.1_compressed.pt") -> Path:
    """A file of weights for the architecture TOY, in `folder`."""
    record = fixture("hpsv2_scores.json")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{TOY}.json"
    config.write_text(json.dumps(record["config"]))
    open_clip.add_model_config(config)
    config.unlink()
    torch.save({"state_dict": by_rule(record["shapes"])}, folder / name)
    return folder / name


def clip_tokenizer(folder: Path) -> None:
    """OpenAI's vocabulary as transformers keeps it, from the file that open_clip carries."""
    from transformers import CLIPTokenizer

    words = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(word, word): number for word, number in words.encoder.items()}
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.__getitem__)
    CLIPTokenizer(vocab=ids, merges=merges).save_pretrained(folder)


def transformers_toy(folder: Path, *, tokenizer: bool = True) -> Path:
    """A CLIPModel's folder."""
    record = fixture("pick_scores.json")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **record["config"]}))
    save_file(by_rule(record["shapes"]), folder / "model.safetensors")
    if tokenizer:
        clip_tokenizer(folder)
    return folder


def aesthetic_head(folder: Path, width: int = 32) -> tuple[Path, nn.Sequential]:
    """The head's file, and the head as its authors build it."""
    drop = nn.Dropout()
    layers = nn.Sequential(
        *(nn.Linear(width, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop),
        *(nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    layers.load_state_dict(rule.weights(layers.state_dict()))
    path = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, path)
    return path, layers.eval()


CODE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import clip_loss


class ToyConfig(PretrainedConfig):
    model_type = "toy_jina"


class ToyModel(PreTrainedModel):
    """It imports and speaks as jina-clip-v2: features are tensors; 1 is the id of padding."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(40, 16)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.post_init()

    def _init_weights(self, module):
        pass

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if "torch_dtype" not in kwargs:
            kwargs["torch_dtype"] = "auto"
        return super().from_pretrained(*args, **kwargs)

    def get_text_features(self, input_ids=None, *_, **__):
        said = (input_ids != 1)[..., None]
        return (self.words(input_ids) * said).sum(1) / said.sum(1)

    def get_image_features(self, pixel_values=None, *_, **__):
        return self.patches(pixel_values).relu().mean((2, 3))
'''


def coded_toy(folder: Path) -> Path:
    """A folder that brings its own code, and pictures of 20 x 20 with a mean of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    (folder / "modeling_toy.py").write_text(CODE)
    auto = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy_jina", "auto_map": auto}))
    prepared = {"size": 20, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "shortest"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    shapes = {
        "words.weight": (40, 16),
        "patches.weight": (16, 3, 4, 4),
        "patches.bias": (16,),
    }
    tensors = by_rule(shapes) | {"logit_scale": torch.tensor(2.5)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["<s>", "<pad>", "</s>", "<unk>", *"a cat dog red frog photo of".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
