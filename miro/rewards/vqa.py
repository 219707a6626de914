"""VQAScore: how likely "Yes" is as the answer to whether a picture shows its caption.

    P("Yes" | picture, 'Does this figure show "{caption}"? Please answer yes or no.')

Source: Lin et al. 2024, arXiv 2404.01291. The published CLIP-FlanT5 answers, or any vision-language
model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miro.images.transforms import ImageTransform, normalised
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.clip_t5 import SYSTEM, ClipT5, load_clip_t5, open_clip_t5
from miro.rewards.image_batch import ImageBatch
from miro.rewards.network import NetworkReward
from miro.rewards.vlm import VisionLanguage, cut, load_vision_language
from miro.rewards.weights import named

PUBLISHED = "zhiqiulin/clip-flant5-xxl"
ANSWER = "Yes"


def question(caption: str) -> str:
    """What is asked about a picture. The caption stands in it as it is, quotes included."""
    return f'Does this figure show "{caption}"? Please answer yes or no.'


def build_vqa(weights: str | None, options: RewardOptions) -> Reward:
    """The reward of a folder or hub id, the published clip-flant5-xxl if None.

    Raises:
        ValueError: the weights are not there, or are no model that answers questions.
    """
    weights = weights or PUBLISHED
    folder = open_clip_t5(weights)
    if folder is not None:
        network, tokenizer = load_clip_t5(folder, options.dtype)
        return ClipT5Score(weights, network, tokenizer, options)
    model = load_vision_language(weights, dtype=options.dtype, allow_code=options.allow_code)
    return VisionLanguageScore(model, options)


class ClipT5Score(NetworkReward):
    """The published definition: the geometric mean of the probabilities of the answer's tokens.

    The answer has two, "Yes" and the end of the text, so the score is √(P(Yes)·P(end | Yes)), as
    t2v_metrics computes it: exp of minus the mean cross entropy.
    """

    name = "vqa"
    reads_caption = True
    range = (0.0, 1.0)
    view: ImageTransform

    def __init__(
        self, weights: str, network: ClipT5, tokenizer: Any, options: RewardOptions
    ) -> None:
        super().__init__(network, options)
        self.model = f"VQAScore, {named(weights)}"
        self.view = ImageTransform(network.image_size, "pad")
        self._see = self.compiled(network.see)
        self._tokenizer = tokenizer
        # Both parts of a question are texts to T5, so the first ends, too, with its end token.
        self._before = self._tokens(f"{SYSTEM} USER: ")
        self._answer = self._tokens(ANSWER)

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,). A caption longer than MAX_TEXT_TOKENS is cut."""
        pictures = _pictures(images, captions)
        if not captions:
            return torch.empty(0, device=self.device)
        squares = pictures.preprocessed(self.view)

        def see(start: int, stop: int) -> Tensor:
            batch = squares[start:stop].to(self.device)
            return self._see(normalised(batch, self.options.dtype))

        seen = self.in_batches(see, len(squares))
        cuts = [cut(self._tokenizer, caption, self.model) for caption in captions]
        asked = [self._tokens(f"\n{question(caption)} ASSISTANT: ") for caption in cuts]
        rows = torch.tensor(pictures.rows, device=self.device)

        def answered(pairs: list[int]) -> Tensor:
            found = self.network.log_likelihood(
                self._before,
                seen[rows[pairs]],
                [asked[pair] for pair in pairs],
                self._answer,
                len(self._tokenizer),
            )
            return found.mean(1).exp()

        return _by_length(self, answered, [len(tokens) for tokens in asked])

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"])


class VisionLanguageScore(NetworkReward):
    """The probability that a model's answer begins with the token "Yes".

    With a leading space or without, as the model's tokenizer and chat template have it; "yes" in
    small letters is another answer, and "No" does not enter.
    """

    name = "vqa"
    reads_caption = True
    range = (0.0, 1.0)

    def __init__(self, model: VisionLanguage, options: RewardOptions) -> None:
        super().__init__(model.model, options)
        self.model = f"VQAScore, {named(model.name)}"
        self._asked = model
        self._yes = model.token(ANSWER)

    @torch.inference_mode()
    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,). A caption longer than MAX_TEXT_TOKENS is cut."""
        pictures = _pictures(images, captions)
        if not captions:
            return torch.empty(0, device=self.device)
        asked = [question(self._asked.plain(caption)) for caption in captions]

        def answered(pairs: list[int]) -> Tensor:
            found = self._asked.first_token(
                [pictures[pair] for pair in pairs], [asked[pair] for pair in pairs]
            )
            return found[:, self._yes].exp().sum(1)

        return _by_length(self, answered, [len(text) for text in asked])


def _pictures(images: Sequence[Tensor], captions: Sequence[str]) -> ImageBatch:
    if len(images) != len(captions):
        raise ValueError(f"got {len(images)} images but {len(captions)} captions")
    return ImageBatch.of(images)


def _by_length(
    reward: NetworkReward, answered: Callable[[list[int]], Tensor], lengths: Sequence[int]
) -> Tensor:
    """answered(pairs) over all pairs, those of nearly one length together: little is padded."""
    order = sorted(range(len(lengths)), key=lambda pair: lengths[pair])
    found = reward.in_batches(lambda start, stop: answered(order[start:stop]), len(order))
    scores = torch.empty_like(found)
    scores[torch.tensor(order, device=found.device)] = found
    return scores
