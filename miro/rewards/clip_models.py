"""Pretrained pairs of towers, opened by the library that knows them, as `Towers`.

What is asked for is told by how it is named: "open_clip:MODEL/PRETRAINED" (a tag or a file), or a
folder or hub id with open_clip_config.json (open_clip), with the config.json of a CLIPModel
(transformers), or with a config.json that names Python code of its own, as jina-clip-v2 does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from miro.rewards.weights import find_folder, named, tensors_alone

OPEN_CLIP = "open_clip:"
CODED = "jinaai/jina-clip-v2"
CODED_TOKENS = 1024
"""Of a caption that networks with code of their own read, as the released MIRO asks of them."""
CLIP_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VOCABULARIES = ("tokenizer.json", "vocab.json", "sentencepiece.bpe.model")
"""Files one of which a tokenizer cannot do without."""
TOKENIZER = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
FILES = (*CONFIGS, *TOKENIZER, "*.safetensors", "open_clip_pytorch_model.bin", "*.py")


@dataclass(frozen=True)
class Towers:
    """A network with a tower for pictures and one for captions, whatever library it is of."""

    model: str
    """Architecture and weights."""
    network: nn.Module
    view: ImageTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    see: Callable[[Tensor], Tensor]
    """Pixels, normalised, in the network's dtype (n, 3, size, size), to features (n, width)."""
    tokens: Callable[[list[str]], tuple[Tensor, ...]]
    """Captions to what `read` takes, on the host."""
    read: Callable[..., Tensor]
    """Tokens to features (n, width)."""
    scale: float
    """What the network multiplies a cosine by to make a logit of it."""


def open_towers(weights: str, *, allow_code: bool = False, captions: bool = True) -> Towers:
    """The towers named by `weights` (see above), in fp32 on the host.

    allow_code: run Python code that comes with the weights. captions: False to leave the tower for
    captions away where the library lets us; `tokens` and `read` are not to be called then.

    Raises:
        ValueError: they are not there, not whole, or need code that is not allowed.
    """
    if weights.startswith(OPEN_CLIP):
        return open_clip_towers(weights, captions=captions)
    if weights == CODED and not allow_code:
        raise _code_refused(weights)
    folder = find_folder(weights, FILES)
    if (folder / CONFIGS[0]).is_file():
        return open_clip_towers(f"{OPEN_CLIP}{weights}", folder=folder, captions=captions)
    config = _read_json(folder / CONFIGS[1])
    if "auto_map" in config:
        if not allow_code:
            raise _code_refused(weights)
        return coded_towers(weights, folder)
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{folder / CONFIGS[1]} describes a {config.get('model_type')!r}, not a 'clip'; other "
            "networks with two towers are taken as open_clip has them: open_clip:MODEL/PRETRAINED"
        )
    return transformers_towers(weights, captions=captions)


def open_clip_towers(weights: str, *, folder: Path | None = None, captions: bool = True) -> Towers:
    """Towers of open_clip: `weights` is "open_clip:MODEL/PRETRAINED", unless `folder` has them."""
    import open_clip

    name, _, pretrained = weights.removeprefix(OPEN_CLIP).partition("/")
    of = f"{name}/{named(pretrained)}" if folder is None else named(weights[len(OPEN_CLIP) :])
    if folder is not None:
        name, asked = f"local-dir:{folder}", {}
    elif name not in open_clip.list_models():
        raise ValueError(f"{weights!r}: open_clip knows no model {name!r}")
    elif not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"{weights!r} names no weights: {OPEN_CLIP}{name}/TAG_OR_FILE ({tags})")
    else:
        # open_clip only warns where a tag was trained with the other of the two GELUs.
        tag: dict = open_clip.get_pretrained_cfg(name, pretrained) or {}
        asked = {"pretrained": pretrained, "force_quick_gelu": bool(tag.get("quick_gelu"))}
    try:
        with tensors_alone(weights):
            network: Any = open_clip.create_model(name, require_pretrained=True, **asked)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{weights!r} could not be loaded by open_clip: {error}\nWhere there is no network, "
            f"give the weights' file: {OPEN_CLIP}MODEL/FILE"
        ) from error
    prepared = network.visual.preprocess_cfg
    tokenizer: Any = open_clip.get_tokenizer(name) if captions else None

    def tokens(texts: list[str]) -> tuple[Tensor]:
        return (tokenizer(texts),)

    if captions:
        _check_words(weights, tokens)
    return Towers(
        model=f"open_clip {of}",
        network=network if captions else network.visual,
        view=_view(weights, prepared["size"], prepared["resize_mode"], prepared["interpolation"]),
        mean=tuple(prepared["mean"]),
        std=tuple(prepared["std"]),
        see=network.encode_image if captions else network.visual,
        tokens=tokens,
        read=network.encode_text,
        scale=_scale(network),
    )


def transformers_towers(
    weights: str, tokenizer: str | None = None, *, captions: bool = True
) -> Towers:
    """A CLIPModel of transformers, in a folder or on the hub.

    tokenizer: the folder or hub id of its tokenizer; None for that in the folder of the weights or,
    where none is there, OpenAI's, which all published ones use, from CLIP_TOKENIZER.
    """
    from transformers import CLIPModel

    folder = find_folder(weights, FILES)
    network = _load(CLIPModel, weights, folder, local_files_only=True)
    limit = network.config.text_config.max_position_embeddings
    model = f"transformers CLIPModel {named(weights)}"
    words: Any = None
    if captions:
        own = any((folder / name).is_file() for name in VOCABULARIES)
        source = tokenizer or (weights if own else CLIP_TOKENIZER)
        words = _tokenizer(folder if source == weights else find_folder(source, TOKENIZER))
        if len(words) != network.config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer {source!r} has {len(words)} tokens, {weights!r} reads "
                f"{network.config.text_config.vocab_size}: its files are missing, or another's"
            )
        model += "" if source == weights else f", tokenizer {named(source)}"
    else:
        del network.text_model, network.text_projection

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        # Padded to the end: the shape stays the same, and causal attention does not look there.
        given = words(
            texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        )
        return given["input_ids"], given["attention_mask"]

    if captions:
        _check_words(weights, tokens)
    return Towers(
        model=model,
        network=network,
        view=ImageTransform(network.config.vision_config.image_size, crop_rounding="down"),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        see=lambda pixels: network.get_image_features(pixel_values=pixels).pooler_output,
        tokens=tokens,
        read=lambda ids, mask: (
            network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        ),
        scale=_scale(network),
    )


def coded_towers(weights: str, folder: Path) -> Towers:
    """A network with Python code of its own, which runs here, and that speaks as jina-clip-v2.

    That is get_image_features(pixels) and get_text_features(ids), each giving a tensor, logit_scale
    and a preprocessor_config.json in open_clip's words (size, mean, std, resize_mode).
    """
    from transformers import AutoModel
    from transformers.models.clip import modeling_clip

    # jina-clip-v2's code imports it, for training alone, and transformers 5 no longer has it.
    if not hasattr(modeling_clip, "clip_loss"):
        modeling_clip.__dict__["clip_loss"] = None
    prepared = _read_json(folder / CONFIGS[2])
    network = _load(AutoModel, weights, folder, trust_remote_code=True)
    words = _tokenizer(folder, trust_remote_code=True)

    def tokens(texts: list[str]) -> tuple[Tensor]:
        given = words(
            texts, padding=True, truncation=True, max_length=CODED_TOKENS, return_tensors="pt"
        )
        return (given["input_ids"],)

    _check_words(weights, tokens)
    return Towers(
        model=f"{named(weights)} by its own code",
        network=network,
        view=_view(
            weights,
            prepared["size"],
            prepared.get("resize_mode", "shortest"),
            prepared.get("interpolation", "bicubic"),
        ),
        mean=tuple(prepared.get("mean", CLIP_MEAN)),
        std=tuple(prepared.get("std", CLIP_STD)),
        see=network.get_image_features,
        tokens=tokens,
        read=network.get_text_features,
        scale=_scale(network),
    )


def _load(loader: Any, weights: str, folder: Path, **options: Any) -> Any:
    """loader.from_pretrained in fp32; ValueError unless every weight of the network was there."""
    try:
        network, found = loader.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"{weights!r} could not be loaded by transformers: {error}") from error
    # transformers fills these with random numbers, and says so in its log.
    if found["missing_keys"]:
        some = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(
            f"{weights!r} lacks {len(found['missing_keys'])} of the network's weights: {some}"
        )
    return network


def _tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(VOCABULARIES)}")
    return AutoTokenizer.from_pretrained(folder, **options)


def _check_words(weights: str, tokens: Callable[[list[str]], Sequence[Tensor]]) -> None:
    """Refuse a tokenizer that cannot tell two words apart.

    transformers makes one, without a word, where a tokenizer's files are absent or not understood.
    """
    (cat, dog), *_ = tokens(["a cat", "a dog"])
    if torch.equal(cat, dog):
        raise ValueError(
            f"the tokenizer of {weights!r} takes 'a cat' and 'a dog' for the same tokens: its "
            "files are missing or damaged"
        )


def _view(
    weights: str, size: int | Sequence[int], resize_mode: str, interpolation: str
) -> ImageTransform:
    """The view that open_clip's words for preparing a picture describe."""
    sides = {size} if isinstance(size, int) else set(size)
    fits = {"shortest": "crop", "squash": "stretch"}
    if len(sides) > 1 or resize_mode not in fits or interpolation != "bicubic":
        raise ValueError(
            f"{weights!r} looks at pictures of {size} by {resize_mode!r} and {interpolation!r}; "
            "known are squares, 'shortest' and 'squash', 'bicubic'"
        )
    return ImageTransform(sides.pop(), "stretch" if fits[resize_mode] == "stretch" else "crop")


def _scale(network: Any) -> float:
    return network.logit_scale.detach().float().exp().item()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; what is in that folder is no such model") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def _code_refused(weights: str) -> ValueError:
    return ValueError(
        f"{weights!r} comes with Python code of its own, which would run here with all your "
        "rights. Allow it (allow_code) if you trust its authors, or give a CLIP that needs none: "
        f"{OPEN_CLIP}ViT-L-14-quickgelu/openai"
    )
