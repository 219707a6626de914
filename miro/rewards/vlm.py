"""Any vision-language model of transformers: a picture and a question in, the answer out.

The model's own processor makes its inputs and its own chat template the prompt, where it has one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miro.utils.rng import generator_from

log = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 1900
"""Of a user's text in a question: what fits the 2,048 of LLaVA and CLIP-FlanT5 beside the rest."""


class VisionLanguage:
    """A transformers model with its processor. `name`: what it was loaded from."""

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._processor = processor
        tokenizer = processor.tokenizer
        # A decoder's answers all begin behind the last position. An encoder counts distances, and
        # BLIP-2 lays the picture before the padding, so there it comes last.
        two_halves = getattr(model.config.get_text_config(), "is_encoder_decoder", False)
        tokenizer.padding_side = "right" if two_halves else "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_token = getattr(processor, "image_token", None)
        self._image_token = None if image_token is None else str(image_token)
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= {*tokenizer.all_special_tokens, self._image_token} - {None}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def plain(self, text: str) -> str:
        """A user's text as it may stand in a prompt: no token that means something to the model.

        An "<image>" in a caption would ask for a second picture. Texts are cut to MAX_TEXT_TOKENS.
        """
        return cut(self._processor.tokenizer, self._special.sub(" ", text), self.name)

    def prompt(self, question: str) -> str:
        """The text the processor gets for one picture and a question about it."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        # BLIP-2's processor puts the picture before the text by itself; captioners need no token.
        places_it = getattr(self._processor, "num_query_tokens", None) is not None
        return question if places_it else (self._image_token or "") + question

    def token(self, word: str) -> list[int]:
        """The tokens that are this whole word, with a leading space or without.

        Which of them an answer begins with is up to the template before it. ValueError for a
        tokenizer that has none.
        """
        tokenizer = self._processor.tokenizer
        spelt = [tokenizer.encode(s, add_special_tokens=False) for s in (word, f" {word}")]
        found = sorted({ids[0] for ids in spelt if len(ids) == 1} - {tokenizer.unk_token_id})
        if not found:
            raise ValueError(f"{self.name!r}: its tokenizer has no token {word!r}; take another")
        return found

    @torch.inference_mode()
    def first_token(self, images: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """float32 (B, vocabulary): log-probability of each token as the first of the answer.

        images: uint8 (3, H, W) each. The answer's place is where the model would write it.
        """
        made = self._generate(
            self._inputs(images, questions),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return made.logits[0].float().log_softmax(-1)

    @torch.inference_mode()
    def answer(
        self,
        images: Sequence[Tensor],
        questions: Sequence[str],
        max_tokens: int,
        temperature: float = 0.0,
        streams: Sequence[tuple[int | str, ...]] = (),
    ) -> list[str]:
        """What the model writes, special tokens and outer white space removed.

        Its likeliest words where the temperature is 0; else words drawn at random, those of answer
        i from the stream named `streams[i]` (miro.utils.rng) alone, whatever else is in the batch.
        """
        inputs = self._inputs(images, questions)
        draw = [_Draw(temperature, streams, self.model.device)] if temperature else []
        tokens = self._generate(inputs, max_new_tokens=max_tokens, logits_processor=draw)
        asked = inputs["input_ids"]
        width = asked.shape[1]
        # Decoders give the question back before the answer, encoder-decoders do not.
        if tokens.shape[1] >= width and torch.equal(tokens[:, :width], asked):
            tokens = tokens[:, width:]
        texts = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _inputs(self, images: Sequence[Tensor], questions: Sequence[str]) -> Any:
        inputs = self._processor(
            images=[[image] for image in images],
            text=[self.prompt(question) for question in questions],
            padding=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs: Any, **options: Any) -> Any:
        return self.model.generate(**inputs, do_sample=False, num_beams=1, **options)


class _Draw:
    """Makes the likeliest token a drawn one: logits / temperature + Gumbel noise (Gumbel-max)."""

    def __init__(
        self, temperature: float, streams: Sequence[tuple[int | str, ...]], device: torch.device
    ) -> None:
        self._temperature = temperature
        self._generators = [generator_from(*stream, device=device) for stream in streams]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [
            torch.empty_like(row, dtype=torch.float32).exponential_(generator=generator)
            for row, generator in zip(scores, self._generators, strict=True)
        ]
        return scores.float() / self._temperature - torch.stack(noise).log()


def cut(tokenizer: Any, text: str, who: str) -> str:
    """The text, or as much of it as has MAX_TEXT_TOKENS tokens, which is said."""
    if len(text.encode()) <= MAX_TEXT_TOKENS:  # a token is at least a byte
        return text
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= MAX_TEXT_TOKENS:
        return text
    log.warning("%s: a text of %d tokens is cut to %d", who, len(ids), MAX_TEXT_TOKENS)
    return tokenizer.decode(ids[:MAX_TEXT_TOKENS], skip_special_tokens=True)


def load_vision_language(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    allow_code: bool = False,
) -> VisionLanguage:
    """The model in a folder or of a hub id, by AutoModelForImageTextToText; safetensors only.

    allow_code: run Python code that comes with the weights.

    Raises:
        ValueError: it is not there, or transformers knows no such model; says what to do.
    """
    # Imported here: transformers takes seconds to import.
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = local_folder(name, ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors", "*.py"))
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": allow_code}
    try:
        processor = AutoProcessor.from_pretrained(folder, **here)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **here
        )
    except OSError as error:
        raise ValueError(f"{name!r}: its weights or their files are missing: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name!r}: no vision-language model of transformers: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{name!r}: the files of its processor or its tokenizer are missing")
    return VisionLanguage(name, model.to(device), processor)


def local_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder of this name, or that of a hub id's files; ValueError says how to get them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{name!r} is no folder, and cannot be had from the hub ({error}). Get it where there "
            f"is a network with `hf download HUB_ID --local-dir FOLDER`, and give FOLDER"
        ) from error
