"""Toy CLIPs and BLIPs with generated weights, in the files and folders of the published ones."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
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
oracle: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)
FIXTURES = Path(__file__).parents[1] / "miro" / "fixtures"
TOY = "toy"
"""The architecture that `open_clip_toy` registers with open_clip."""


def fixture(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def generated(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: oracle.weight(name, shape) for name, shape in shapes.items()}


def image_reward_state(
    shapes: Mapping[str, Sequence[int]], make: Any = oracle.weight
) -> dict[str, Tensor]:
    """The state dict of an ImageReward with generated weights."""
    return {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else make(name, shape)
        for name, shape in shapes.items()
    }


def as_pil(pixels: Tensor) -> Any:
    """A PIL image, which torchvision takes though it declares tensors alone."""
    return Image.fromarray(np.asarray(pixels.permute(1, 2, 0)))


def random_images(*shapes: tuple[int, int]) -> list[Tensor]:
    return [oracle.image(f"{height}x{width}", height, width) for height, width in shapes]


def open_clip_model(file: Path) -> tuple[Any, Any]:
    """open_clip's own toy with the weights of a file, and its image transform."""
    network: Any
    network, _, transform = open_clip.create_model_and_transforms(TOY, pretrained=str(file))
    return network.eval(), transform


def open_clip_toy(folder: Path, name: str = "HPS_v2.1_compressed.pt") -> Path:
    """Write weights of the architecture TOY into `folder`; returns the file."""
    record = fixture("hpsv2_scores.json")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{TOY}.json"
    config.write_text(json.dumps(record["config"]))
    open_clip.add_model_config(config)
    config.unlink()
    torch.save({"state_dict": generated(record["shapes"])}, folder / name)
    return folder / name


def clip_tokenizer(folder: Path) -> None:
    """Write OpenAI's tokenizer, from open_clip's vocabulary, in transformers' format."""
    from transformers import CLIPTokenizer

    words = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(word, word): number for word, number in words.encoder.items()}
    merges: Any = sorted(words.bpe_ranks, key=words.bpe_ranks.__getitem__)
    CLIPTokenizer(vocab=ids, merges=merges).save_pretrained(folder)


def transformers_toy(folder: Path, *, tokenizer: bool = True) -> Path:
    """Write a CLIPModel of transformers; returns its folder."""
    record = fixture("pick_scores.json")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **record["config"]}))
    save_file(generated(record["shapes"]), folder / "model.safetensors")
    if tokenizer:
        clip_tokenizer(folder)
    return folder


def aesthetic_head(folder: Path, width: int = 32) -> tuple[Path, nn.Sequential]:
    """Write an aesthetic head; returns its file and the module as its authors build it."""
    drop = nn.Dropout()
    layers = nn.Sequential(
        *(nn.Linear(width, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop),
        *(nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    layers.load_state_dict(oracle.weights(layers.state_dict()))
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
    """Imports and interface of jina-clip-v2: features are tensors; 1 is the id of padding."""

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
        mask = (input_ids != 1)[..., None]
        return (self.words(input_ids) * mask).sum(1) / mask.sum(1)

    def get_image_features(self, pixel_values=None, *_, **__):
        return self.patches(pixel_values).relu().mean((2, 3))
'''


def remote_code_toy(folder: Path) -> Path:
    """Write a network with its own Python code, images of 20 x 20 and a mean of 0.5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    (folder / "modeling_toy.py").write_text(CODE)
    auto = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy_jina", "auto_map": auto}))
    preprocess = {"size": 20, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "shortest"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    shapes = {
        "words.weight": (40, 16),
        "patches.weight": (16, 3, 4, 4),
        "patches.bias": (16,),
    }
    tensors = generated(shapes) | {"logit_scale": torch.tensor(2.5)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["<s>", "<pad>", "</s>", "<unk>", *"a cat dog red frog photo of".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
