"""Scoring by several rewards: offloading changes no score, each image is encoded once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform
from miro.rewards.base import RewardOptions
from miro.rewards.network import DualEncoderReward, NetworkReward
from miro.rewards.pixels import Colourfulness
from miro.rewards.scorer import Offload, ScoreBatch, Scorer

CPU = torch.device("cpu")


class LinearDualEncoder(DualEncoderReward):
    """Two linear encoders that count what they embed."""

    reads_caption = True
    transform = ImageTransform(8)

    def __init__(self, name: str, options: RewardOptions | None = None) -> None:
        torch.manual_seed(len(name))
        super().__init__(nn.Linear(3 * 64, 16), options or RewardOptions(batch_size=2))
        self.name = self.model = name
        self.images_encoded = self.captions_encoded = self.offloads = 0

    def embed_images(self, images: Tensor) -> Tensor:
        self.images_encoded += len(images)
        return nn.functional.normalize(self.network(images.flatten(1).float() / 255), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        self.captions_encoded += len(captions)
        rows = [[float(ord(c)) for c in caption.ljust(16)[:16]] for caption in captions]
        return nn.functional.normalize(torch.tensor(rows), dim=1)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return self.similarity(images, captions)

    def offload_to_cpu(self) -> None:
        self.offloads += 1
        super().offload_to_cpu()


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    sizes = [(9 + i, 12) for i in range(count)]
    return [torch.randint(256, (3, *s), generator=generator).byte() for s in sizes]


def batch(count: int) -> ScoreBatch:
    captions = [{"original": f"a {i}", "short": f"the {i % 2}"} for i in range(count)]
    return ScoreBatch(images(count), captions)


def test_offloading_does_not_change_the_scores() -> None:
    modes: tuple[Offload, Offload] = ("always", "never")
    batches = {mode: [batch(3), batch(2)] for mode in modes}
    encoders = {mode: [LinearDualEncoder("first"), LinearDualEncoder("second")] for mode in modes}

    for mode in modes:
        first, second = encoders[mode]
        scorer = Scorer([first, Colourfulness(), second], CPU, mode)
        for one in batches[mode]:
            scorer.begin(one)
        scorer.finish(batches[mode])

    for offloaded, resident in zip(batches["always"], batches["never"], strict=True):
        assert np.isfinite(offloaded.scores).all()
        np.testing.assert_array_equal(offloaded.scores, resident.scores)
    assert [encoder.offloads for encoder in encoders["always"]] == [1, 1]
    assert [encoder.offloads for encoder in encoders["never"]] == [0, 0]


def test_only_preprocessed_images_stay_in_memory_for_offloaded_networks() -> None:
    pairs = batch(3)

    Scorer([LinearDualEncoder("first")], CPU, "always").begin(pairs)

    assert all(image.numel() == 0 for image in pairs.images.distinct)
    assert pairs.images.preprocessed(ImageTransform(8)).shape == (3, 3, 8, 8)


def test_an_offloaded_network_without_preprocessing_gets_the_whole_images() -> None:
    class Whole(NetworkReward):
        name, model, reads_caption = "whole", "none", True

        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            return torch.stack([image.float().mean() for image in images])

    pairs = batch(3)
    scorer = Scorer(
        [LinearDualEncoder("first"), Whole(nn.Linear(1, 1), RewardOptions())], CPU, "always"
    )

    scorer.begin(pairs)
    scorer.finish([pairs])

    expected = [image.float().mean().item() for image in images(3) for _ in range(2)]
    assert pairs.scores[:, 1].tolist() == pytest.approx(expected)


def test_each_image_and_each_caption_is_encoded_once() -> None:
    encoder, pairs = LinearDualEncoder("first"), batch(4)

    Scorer([encoder], CPU).begin(pairs)

    assert len(pairs.texts) == 8
    assert encoder.images_encoded == 4
    assert encoder.captions_encoded == 4 + 2  # four distinct originals, and two short ones


def test_caption_embeddings_are_cached_across_batches() -> None:
    encoder = LinearDualEncoder("first")
    scorer = Scorer([encoder], CPU)

    for _ in range(3):
        scorer.begin(batch(4))

    assert encoder.captions_encoded == 6


def test_scores_are_grouped_by_image_and_caption() -> None:
    pairs = ScoreBatch(images(2), [{"a": "x"}, {"a": "y", "b": "z", "c": "y"}])

    Scorer([LinearDualEncoder("first"), Colourfulness()], CPU).begin(pairs)

    first, second = pairs.by_image()
    assert first.shape == (1, 2) and second.shape == (3, 2)
    assert second[0, 0] == second[2, 0] != second[1, 0]
    assert len(set(second[:, 1].tolist())) == 1


def test_an_empty_batch_has_no_scores() -> None:
    pairs = ScoreBatch([], [])

    Scorer([LinearDualEncoder("first"), Colourfulness()], CPU, "always").begin(pairs)

    assert pairs.by_image() == [] and pairs.scores.shape == (0, 2)


def test_out_of_memory_halves_the_batch_size_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Narrow(LinearDualEncoder):
        sizes: list[int] = []

        def embed_images(self, images: Tensor) -> Tensor:
            self.sizes.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("no")
            return super().embed_images(images)

    narrow, wide = Narrow("first", RewardOptions(batch_size=8)), LinearDualEncoder("first")
    pairs, others = batch(5), batch(5)

    Scorer([narrow], CPU).begin(pairs)
    Scorer([wide], CPU).begin(others)

    assert Narrow.sizes == [5, 4, 2, 2, 1]
    np.testing.assert_array_equal(pairs.scores, others.scores)
    assert "batch size is now 2" in caplog.text


def test_out_of_memory_with_a_single_image_is_an_error() -> None:
    class Never(LinearDualEncoder):
        def embed_images(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        Scorer([Never("first")], CPU).begin(batch(2))


def test_a_wrong_number_of_scores_is_refused() -> None:
    class Short(NetworkReward):
        name, model, reads_caption, transform = "short", "none", True, ImageTransform(8)

        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(ValueError, match="'short' returned scores of shape \\(1,\\) for 4"):
        Scorer([Short(nn.Linear(1, 1), RewardOptions())], CPU).begin(batch(2))
