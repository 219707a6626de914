"""VQAScore: the probability of "Yes" as the answer to whether an image shows its caption.

    P("Yes" | image, 'Does this figure show "{caption}"? Please answer yes or no.')

Source: Lin et al. 2024, arXiv 2404.01291. Computed by the published CLIP-FlanT5, or any
vision-language model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miro.images.transforms import ImageTransform, normalize
from miro.rewards.base import Reward, RewardOptions, check_lengths
from miro.rewards.clip_t5 import SYSTEM, ClipT5, find_clip_t5, load_clip_t5
from miro.rewards.image_batch import ImageBatch
from miro.rewards.network import NetworkReward
from miro.rewards.vlm import VisionLanguage, load_vision_language, truncate_text
from miro.rewards.weights import display_name

PUBLISHED = "zhiqiulin/clip-flant5-xxl"
ANSWER = "Yes"


def question(caption: str) -> str:
    """The question about an image; the caption is inserted verbatim, quotes included."""
    return f'Does this figure show "{caption}"? Please answer yes or no.'


def build_vqa(weights: str | None, options: RewardOptions) -> Reward:
    """Build the reward of a folder or hub id; None for the published clip-flant5-xxl.

    Raises:
        ValueError: The weights are missing, or belong to a model that answers no questions.
    """
    weights = weights or PUBLISHED
    folder = find_clip_t5(weights)
    if folder is not None:
        network, tokenizer = load_clip_t5(folder, options.dtype)
        return ClipT5Score(weights, network, tokenizer, options)
    model = load_vision_language(weights, dtype=options.dtype, allow_code=options.allow_code)
    return VisionLanguageScore(model, options)


class _VQAScore(NetworkReward):
    """Sorts the questions of a batch by length, to minimize padding."""

    name = "vqa"
    reads_caption = True

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`. A caption longer than MAX_TEXT_TOKENS is truncated."""
        check_lengths(images, captions)
        if not captions:
            return torch.empty(0, device=self.device)
        lengths, probability = self._prepare(ImageBatch.from_images(images), captions)
        order = sorted(range(len(lengths)), key=lambda pair: lengths[pair])
        found = self.in_batches(lambda start, stop: probability(order[start:stop]), len(order))
        scores = torch.empty_like(found)
        scores[torch.tensor(order, device=found.device)] = found
        return scores

    def _prepare(
        self, images: ImageBatch, captions: Sequence[str]
    ) -> tuple[list[int], Callable[[list[int]], Tensor]]:
        """The length of each question, and a function from indices of pairs to their scores."""
        raise NotImplementedError


class ClipT5Score(_VQAScore):
    """The published score: the geometric mean of the probabilities of the answer's tokens.

    These are "Yes" and the end of the text, so the score is √(P(Yes)·P(end | Yes)), computed as in
    t2v_metrics: exp of minus the mean cross-entropy.
    """

    transform: ImageTransform

    def __init__(
        self, weights: str, network: ClipT5, tokenizer: Any, options: RewardOptions
    ) -> None:
        super().__init__(network, options)
        self.model = f"VQAScore, {display_name(weights)}"
        self.transform = ImageTransform(network.image_size, "pad")
        self._encode_image = self.maybe_compile(network.encode_image)
        self._tokenizer = tokenizer
        # Both parts of a question are separate texts to T5, so the first has an end token too.
        self._before = self._tokenize(f"{SYSTEM} USER: ")
        self._answer = self._tokenize(ANSWER)

    def _prepare(
        self, images: ImageBatch, captions: Sequence[str]
    ) -> tuple[list[int], Callable[[list[int]], Tensor]]:
        preprocessed = images.preprocessed(self.transform)

        def encode(start: int, stop: int) -> Tensor:
            batch = preprocessed[start:stop].to(self.device)
            return self._encode_image(normalize(batch, self.options.dtype))

        image_tokens = self.in_batches(encode, len(preprocessed))
        texts = [truncate_text(self._tokenizer, caption, self.model) for caption in captions]
        questions = [self._tokenize(f"\n{question(text)} ASSISTANT: ") for text in texts]
        rows = torch.tensor(images.rows, device=self.device)

        def probability(pairs: list[int]) -> Tensor:
            log_probs = self.network.log_likelihood(
                self._before,
                image_tokens[rows[pairs]],
                [questions[pair] for pair in pairs],
                self._answer,
                len(self._tokenizer),
            )
            return log_probs.mean(1).exp()

        return [len(tokens) for tokens in questions], probability

    def _tokenize(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"])


class VisionLanguageScore(_VQAScore):
    """The probability that a model's answer begins with the token "Yes".

    With or without a leading space, depending on the model's tokenizer and chat template. A
    lower-case "yes" does not count, and the probability of "No" is not used.
    """

    def __init__(self, model: VisionLanguage, options: RewardOptions) -> None:
        super().__init__(model.model, options)
        self.model = f"VQAScore, {display_name(model.name)}"
        self._language_model = model
        self._yes = model.word_token_ids(ANSWER)

    def _prepare(
        self, images: ImageBatch, captions: Sequence[str]
    ) -> tuple[list[int], Callable[[list[int]], Tensor]]:
        questions = [question(self._language_model.plain(caption)) for caption in captions]

        def probability(pairs: list[int]) -> Tensor:
            log_probs = self._language_model.first_token_log_probs(
                [images[pair] for pair in pairs], [questions[pair] for pair in pairs]
            )
            return log_probs[:, self._yes].exp().sum(1)

        return [len(text) for text in questions], probability
