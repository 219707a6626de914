"""Visual question answering by any vision-language model of transformers.

Inputs are prepared by the model's own processor, and the prompt by its chat template if it has one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miro.rewards.weights import resolve_folder
from miro.utils.rng import generator_from

log = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 1900
"""Limit of a user's text within a question; the context of LLaVA and CLIP-FlanT5 is 2,048."""


class VisionLanguage:
    """A vision-language model of transformers with its processor.

    Args:
        name: The folder or hub id it was loaded from.
        model: An AutoModelForImageTextToText.
        processor: Its AutoProcessor.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._processor = processor
        tokenizer = processor.tokenizer
        # Decoders generate after the last position, so they need left padding. Encoders have
        # relative positions, and BLIP-2 puts the image before the padding: right padding.
        is_encoder_decoder = getattr(model.config.get_text_config(), "is_encoder_decoder", False)
        tokenizer.padding_side = "right" if is_encoder_decoder else "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_token = getattr(processor, "image_token", None)
        self._image_token = None if image_token is None else str(image_token)
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= {*tokenizer.all_special_tokens, self._image_token} - {None}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def plain(self, text: str) -> str:
        """Remove special tokens from a user's text and truncate it to MAX_TEXT_TOKENS.

        An "<image>" in a caption would be a placeholder for a second image.
        """
        return truncate_text(self._processor.tokenizer, self._special.sub(" ", text), self.name)

    def prompt(self, question: str) -> str:
        """The processor's text input for one image and a question about it."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        # BLIP-2's processor inserts the image tokens itself; captioning models have none.
        inserts_image = getattr(self._processor, "num_query_tokens", None) is not None
        return question if inserts_image else (self._image_token or "") + question

    def word_token_ids(self, word: str) -> list[int]:
        """Ids of the tokens that are this whole word, with a leading space or without.

        Which of them an answer begins with depends on the chat template.

        Raises:
            ValueError: The tokenizer has no such token.
        """
        tokenizer = self._processor.tokenizer
        encoded = [tokenizer.encode(s, add_special_tokens=False) for s in (word, f" {word}")]
        found = sorted({ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id})
        if not found:
            raise ValueError(
                f"{self.name!r}: its tokenizer has no token {word!r}; give another model"
            )
        return found

    @torch.inference_mode()
    def first_token_log_probs(self, images: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """Log-probability of each token as the first of the answer.

        Args:
            images: B tensors uint8 (3, H, W).
            questions: B strings.

        Returns:
            float32 (B, vocabulary).
        """
        output = self._generate(
            self._inputs(images, questions),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return output.logits[0].float().log_softmax(-1)

    @torch.inference_mode()
    def answer(
        self,
        images: Sequence[Tensor],
        questions: Sequence[str],
        max_tokens: int,
        temperature: float = 0.0,
        streams: Sequence[tuple[int | str, ...]] = (),
    ) -> list[str]:
        """Generate an answer to each question, without special tokens and outer white space.

        Args:
            images: B tensors uint8 (3, H, W).
            questions: B strings.
            max_tokens: Length limit of an answer.
            temperature: 0 for greedy decoding.
            streams: One random stream (miro.utils.rng) per answer, so that a sampled answer does
                not depend on the rest of the batch.
        """
        inputs = self._inputs(images, questions)
        samplers = [_GumbelMax(temperature, streams, self.model.device)] if temperature else []
        tokens = self._generate(inputs, max_new_tokens=max_tokens, logits_processor=samplers)
        prompt = inputs["input_ids"]
        width = prompt.shape[1]
        # Decoders return the prompt before the answer, encoder-decoders do not.
        if tokens.shape[1] >= width and torch.equal(tokens[:, :width], prompt):
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


class _GumbelMax:
    """A logits processor whose argmax is a sample: logits / temperature + Gumbel noise."""

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


def truncate_text(tokenizer: Any, text: str, model: str) -> str:
    """Truncate a text to MAX_TEXT_TOKENS, with a warning that names the model."""
    if len(text.encode()) <= MAX_TEXT_TOKENS:  # a token is at least a byte
        return text
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= MAX_TEXT_TOKENS:
        return text
    log.warning("%s: a text of %d tokens is truncated to %d", model, len(ids), MAX_TEXT_TOKENS)
    return tokenizer.decode(ids[:MAX_TEXT_TOKENS], skip_special_tokens=True)


def load_vision_language(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    allow_code: bool = False,
) -> VisionLanguage:
    """Load a model by AutoModelForImageTextToText, from safetensors only.

    Args:
        name: A folder or hub id.
        device: Where the model computes.
        dtype: Of weights and activations.
        allow_code: Run Python code that comes with the weights.

    Raises:
        ValueError: The model is missing, or transformers does not support it.
    """
    # Imported here: transformers takes seconds to import.
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = resolve_folder(
        name, ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors", "*.py")
    )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": allow_code}
    try:
        processor = AutoProcessor.from_pretrained(folder, **options)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **options
        )
    except OSError as error:
        raise ValueError(f"{name!r}: files are missing: {error}; download it again") from error
    except ValueError as error:
        raise ValueError(
            f"{name!r}: not a vision-language model of transformers: {error}"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{name!r}: the files of its processor or tokenizer are missing")
    return VisionLanguage(name, model.to(device), processor)
