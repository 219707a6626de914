"""Pretrained dual encoders of open_clip and transformers behind one interface.

The library follows from the name: "open_clip:MODEL/PRETRAINED" (a tag or a file), or a folder or
hub id with an open_clip_config.json (open_clip), with the config.json of a CLIPModel
(transformers), or with a config.json that refers to its own Python code, as jina-clip-v2's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from miro.rewards.weights import (
    display_name,
    read_json_object,
    resolve_folder,
    weights_only_errors,
)

OPEN_CLIP = "open_clip:"
JINA_CLIP = "jinaai/jina-clip-v2"
REMOTE_CODE_MAX_TOKENS = 1024
"""Caption length of networks with their own code, as in the released MIRO."""
CLIP_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VOCABULARIES = ("tokenizer.json", "vocab.json", "sentencepiece.bpe.model")
"""A tokenizer needs one of these files."""
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
FILES = (*CONFIGS, *TOKENIZER_FILES, "*.safetensors", "open_clip_pytorch_model.bin", "*.py")


@dataclass(frozen=True)
class DualEncoder:
    """A network with an image encoder and a text encoder, from any library.

    Attributes:
        model: Architecture and weights, for the dataset's manifest.
        transform: Preprocessing of the images.
        mean: Per-channel mean of the normalization.
        std: Per-channel standard deviation of the normalization.
        encode_image: Normalized pixels (n, 3, size, size) in the network's dtype to (n, width).
        tokenize: Captions to the arguments of `encode_text`, on the CPU.
        encode_text: Token tensors to (m, width).
        scale: exp(logit_scale), by which the network multiplies cosines.
    """

    model: str
    network: nn.Module
    transform: ImageTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encode_image: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], tuple[Tensor, ...]]
    encode_text: Callable[..., Tensor]
    scale: float


def load_dual_encoder(
    weights: str, *, allow_code: bool = False, captions: bool = True
) -> DualEncoder:
    """Load the network named `weights` (see the module docstring), in fp32 on the CPU.

    Args:
        weights: Its name.
        allow_code: Run Python code that comes with the weights.
        captions: False to drop the text encoder where the library allows it; `tokenize` and
            `encode_text` must not be called then.

    Raises:
        ValueError: The weights are missing or incomplete, or need code that is not allowed.
    """
    if weights.startswith(OPEN_CLIP):
        return load_open_clip(weights, captions=captions)
    if weights == JINA_CLIP and not allow_code:
        raise _code_refused(weights)
    folder = resolve_folder(weights, FILES)
    if (folder / CONFIGS[0]).is_file():
        return load_open_clip(f"{OPEN_CLIP}{weights}", folder=folder, captions=captions)
    config = read_json_object(folder / CONFIGS[1])
    if "auto_map" in config:
        if not allow_code:
            raise _code_refused(weights)
        return load_remote_code(weights, folder)
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{folder / CONFIGS[1]} has model_type {config.get('model_type')!r}, not 'clip'; load "
            "other dual encoders by open_clip: open_clip:MODEL/PRETRAINED"
        )
    return load_transformers_clip(weights, captions=captions)


def load_open_clip(
    weights: str, *, folder: Path | None = None, captions: bool = True
) -> DualEncoder:
    """Load "open_clip:MODEL/PRETRAINED", or the open_clip model in `folder`."""
    import open_clip

    name, _, pretrained = weights.removeprefix(OPEN_CLIP).partition("/")
    if folder is not None:
        model = display_name(weights[len(OPEN_CLIP) :])
        name, options = f"local-dir:{folder}", {}
    elif name not in open_clip.list_models():
        raise ValueError(f"{weights!r}: open_clip has no model {name!r}; see open_clip.list_models")
    elif not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"{weights!r} names no weights: {OPEN_CLIP}{name}/TAG_OR_FILE ({tags})")
    else:
        model = f"{name}/{display_name(pretrained)}"
        # open_clip only warns if a tag was trained with QuickGELU and the model has GELU.
        tag: dict = open_clip.get_pretrained_cfg(name, pretrained) or {}
        options = {"pretrained": pretrained, "force_quick_gelu": bool(tag.get("quick_gelu"))}
    try:
        with weights_only_errors(weights):
            network: Any = open_clip.create_model(name, require_pretrained=True, **options)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{weights!r} could not be loaded by open_clip: {error}\nWithout a network, give the "
            f"weights' file: {OPEN_CLIP}MODEL/FILE"
        ) from error
    preprocess = network.visual.preprocess_cfg
    tokenizer: Any = open_clip.get_tokenizer(name) if captions else None

    def tokenize(texts: list[str]) -> tuple[Tensor]:
        return (tokenizer(texts),)

    if captions:
        _check_tokenizer(weights, tokenize)
    return DualEncoder(
        model=f"open_clip {model}",
        network=network if captions else network.visual,
        transform=_image_transform(
            weights, preprocess["size"], preprocess["resize_mode"], preprocess["interpolation"]
        ),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        encode_image=network.encode_image if captions else network.visual,
        tokenize=tokenize,
        encode_text=network.encode_text,
        scale=_scale(network),
    )


def load_transformers_clip(
    weights: str, tokenizer: str | None = None, *, captions: bool = True
) -> DualEncoder:
    """Load a CLIPModel of transformers.

    Args:
        weights: Its folder or hub id.
        tokenizer: The folder or hub id of its tokenizer; None for the one in the folder of the
            weights or, if there is none, OpenAI's from CLIP_TOKENIZER, which all published CLIPs
            use.
        captions: False to drop the text encoder.
    """
    from transformers import CLIPModel

    folder = resolve_folder(weights, FILES)
    network = _from_pretrained(CLIPModel, weights, folder, local_files_only=True)
    max_length = network.config.text_config.max_position_embeddings
    model = f"transformers CLIPModel {display_name(weights)}"
    clip_tokenizer: Any = None
    if captions:
        has_tokenizer = any((folder / name).is_file() for name in VOCABULARIES)
        source = tokenizer or (weights if has_tokenizer else CLIP_TOKENIZER)
        clip_tokenizer = _load_tokenizer(
            folder if source == weights else resolve_folder(source, TOKENIZER_FILES)
        )
        if len(clip_tokenizer) != network.config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer {source!r} has {len(clip_tokenizer)} tokens, {weights!r} expects "
                f"{network.config.text_config.vocab_size}: files are missing or belong to another "
                "model; give NETWORK,TOKENIZER"
            )
        model += "" if source == weights else f", tokenizer {display_name(source)}"
    else:
        del network.text_model, network.text_projection

    def tokenize(texts: list[str]) -> tuple[Tensor, ...]:
        # Fixed-length padding keeps the shape constant; causal attention ignores the padding.
        return _tokenize(clip_tokenizer, texts, max_length, padding="max_length")

    if captions:
        _check_tokenizer(weights, tokenize)
    return DualEncoder(
        model=model,
        network=network,
        transform=ImageTransform(network.config.vision_config.image_size, crop_rounding="down"),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        encode_image=lambda pixels: network.get_image_features(pixel_values=pixels).pooler_output,
        tokenize=tokenize,
        encode_text=lambda ids, mask: (
            network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        ),
        scale=_scale(network),
    )


def load_remote_code(weights: str, folder: Path) -> DualEncoder:
    """Load a network by its own Python code, with the interface of jina-clip-v2.

    That is get_image_features(pixels) and get_text_features(ids), each returning a tensor,
    logit_scale, and a preprocessor_config.json with open_clip's keys (size, mean, std,
    resize_mode).
    """
    from transformers import AutoModel
    from transformers.models.clip import modeling_clip

    # jina-clip-v2's code imports clip_loss, for training only; transformers 5 removed it.
    if not hasattr(modeling_clip, "clip_loss"):
        modeling_clip.__dict__["clip_loss"] = None
    preprocess = read_json_object(folder / CONFIGS[2])
    network = _from_pretrained(AutoModel, weights, folder, trust_remote_code=True)
    tokenizer = _load_tokenizer(folder, trust_remote_code=True)

    def tokenize(texts: list[str]) -> tuple[Tensor, ...]:
        return _tokenize(tokenizer, texts, REMOTE_CODE_MAX_TOKENS)[:1]

    _check_tokenizer(weights, tokenize)
    return DualEncoder(
        model=f"{display_name(weights)} by its own code",
        network=network,
        transform=_image_transform(
            weights,
            preprocess["size"],
            preprocess.get("resize_mode", "shortest"),
            preprocess.get("interpolation", "bicubic"),
        ),
        mean=tuple(preprocess.get("mean", CLIP_MEAN)),
        std=tuple(preprocess.get("std", CLIP_STD)),
        encode_image=network.get_image_features,
        tokenize=tokenize,
        encode_text=network.get_text_features,
        scale=_scale(network),
    )


def _from_pretrained(loader: Any, weights: str, folder: Path, **options: Any) -> Any:
    """loader.from_pretrained in fp32; ValueError if any weight of the network is missing."""
    try:
        network, info = loader.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"{weights!r} could not be loaded by transformers: {error}") from error
    # transformers initializes missing weights randomly and only logs a warning.
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{weights!r} lacks {len(info['missing_keys'])} of the network's weights: {some}; "
            "download it again"
        )
    return network


def _load_tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder} contains no tokenizer: none of {', '.join(VOCABULARIES)}")
    return AutoTokenizer.from_pretrained(folder, **options)


def _tokenize(
    tokenizer: Any, texts: list[str], max_length: int, padding: bool | str = True
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask by a tokenizer of transformers, int64 (m, length) each."""
    tokens = tokenizer(
        texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


def _check_tokenizer(weights: str, tokenize: Callable[[list[str]], Sequence[Tensor]]) -> None:
    """Refuse a tokenizer that maps different words to the same tokens.

    transformers builds one without an error if a tokenizer's files are missing or not recognized.
    """
    (cat, dog), *_ = tokenize(["a cat", "a dog"])
    if torch.equal(cat, dog):
        raise ValueError(
            f"the tokenizer of {weights!r} maps 'a cat' and 'a dog' to the same tokens: its files "
            "are missing or damaged"
        )


def _image_transform(
    weights: str, size: int | Sequence[int], resize_mode: str, interpolation: str
) -> ImageTransform:
    """The ImageTransform of an open_clip preprocessing configuration."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1 or resize_mode not in ("shortest", "squash") or interpolation != "bicubic":
        raise ValueError(
            f"{weights!r} preprocesses images to {size} with resize mode {resize_mode!r} and "
            f"{interpolation!r} interpolation; supported are square sizes, 'shortest', "
            "'squash' and 'bicubic'"
        )
    return ImageTransform(sides.pop(), "stretch" if resize_mode == "squash" else "crop")


def _scale(network: Any) -> float:
    return network.logit_scale.detach().float().exp().item()


def _code_refused(weights: str) -> ValueError:
    return ValueError(
        f"{weights!r} comes with Python code of its own, which would run with all your rights. "
        "Allow it (allow_code) if you trust its authors, or give a CLIP without code: "
        f"{OPEN_CLIP}ViT-L-14-quickgelu/openai"
    )
