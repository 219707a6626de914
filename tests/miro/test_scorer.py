"""Several rewards over batches: together or in turns, the same scores, each picture once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform
from miro.rewards.base import RewardOptions
from miro.rewards.network import DualEncoderReward, NetworkReward
from miro.rewards.pixels import Colourfulness
from miro.rewards.scorer import ScoreBatch, Scorer

CPU = torch.device("cpu")


class Towers(DualEncoderReward):
    """Two linear towers that count what they embed."""

    reads_caption = True
    range = (-1.0, 1.0)
    view = ImageTransform(8)

    def __init__(self, name: str, options: RewardOptions | None = None) -> None:
        torch.manual_seed(len(name))
        super().__init__(nn.Linear(3 * 64, 16), options or RewardOptions(batch_size=2))
        self.name = self.model = name
        self.seen = self.read = self.left = 0

    def embed_pictures(self, squares: Tensor) -> Tensor:
        self.seen += len(squares)
        return nn.functional.normalize(self.network(squares.flatten(1).float() / 255), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        self.read += len(captions)
        rows = [[float(ord(c)) for c in caption.ljust(16)[:16]] for caption in captions]
        return nn.functional.normalize(torch.tensor(rows), dim=1)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return self.similarity(images, captions)

    def offload_to_cpu(self) -> None:
        self.left += 1
        super().offload_to_cpu()


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    sizes = [(9 + i, 12) for i in range(count)]
    return [torch.randint(256, (3, *s), generator=generator).byte() for s in sizes]


def batch(count: int) -> ScoreBatch:
    captions = [{"original": f"a {i}", "short": f"the {i % 2}"} for i in range(count)]
    return ScoreBatch(images(count), captions)


def test_in_turns_the_scores_are_those_of_networks_that_are_there_together() -> None:
    batches = {turns: [batch(3), batch(2)] for turns in ("always", "never")}
    rewards = {turns: [Towers("first"), Colourfulness(), Towers("second")] for turns in batches}

    for turns, pairs in batches.items():
        scorer = Scorer(rewards[turns], CPU, turns)  # pyright: ignore[reportArgumentType]
        for one in pairs:
            scorer.begin(one)
        scorer.finish(pairs)

    for taken, together in zip(batches["always"], batches["never"], strict=True):
        assert np.isfinite(taken.scores).all()
        np.testing.assert_array_equal(taken.scores, together.scores)
    assert [reward.left for reward in rewards["always"] if isinstance(reward, Towers)] == [1, 1]
    assert [reward.left for reward in rewards["never"] if isinstance(reward, Towers)] == [0, 0]


def test_while_networks_wait_for_their_turn_no_picture_is_held_but_its_squares() -> None:
    pairs = batch(3)

    Scorer([Towers("first")], CPU, "always").begin(pairs)

    assert all(image.numel() == 0 for image in pairs.pictures.distinct)
    assert pairs.pictures.preprocessed(ImageTransform(8)).shape == (3, 3, 8, 8)


def test_a_network_that_looks_at_whole_pictures_gets_them_when_its_turn_comes() -> None:
    class Whole(NetworkReward):
        name, model, reads_caption, range = "whole", "none", True, (0.0, 1.0)

        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            return torch.stack([image.float().mean() for image in images])

    pairs = batch(3)
    scorer = Scorer([Towers("first"), Whole(nn.Linear(1, 1), RewardOptions())], CPU, "always")

    scorer.begin(pairs)
    scorer.finish([pairs])

    expected = [image.float().mean().item() for image in images(3) for _ in range(2)]
    assert pairs.scores[:, 1].tolist() == pytest.approx(expected)


def test_each_picture_and_each_caption_goes_through_its_tower_once() -> None:
    towers, pairs = Towers("first"), batch(4)

    Scorer([towers], CPU).begin(pairs)

    assert len(pairs.texts) == 8
    assert towers.seen == 4
    assert towers.read == 4 + 2  # four distinct originals, and two short ones


def test_captions_that_come_again_are_not_read_again() -> None:
    towers = Towers("first")
    scorer = Scorer([towers], CPU)

    for _ in range(3):
        scorer.begin(batch(4))

    assert towers.read == 6


def test_scores_come_back_by_image_and_caption() -> None:
    pairs = ScoreBatch(images(2), [{"a": "x"}, {"a": "y", "b": "z", "c": "y"}])

    Scorer([Towers("first"), Colourfulness()], CPU).begin(pairs)

    first, second = pairs.by_image()
    assert first.shape == (1, 2) and second.shape == (3, 2)
    assert second[0, 0] == second[2, 0] != second[1, 0]
    assert len(set(second[:, 1].tolist())) == 1


def test_a_batch_of_which_nothing_is_left_has_no_scores() -> None:
    pairs = ScoreBatch([], [])

    Scorer([Towers("first"), Colourfulness()], CPU, "always").begin(pairs)

    assert pairs.by_image() == [] and pairs.scores.shape == (0, 2)


def test_where_memory_ends_batches_are_halved_for_good_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Narrow(Towers):
        sizes: list[int] = []

        def embed_pictures(self, squares: Tensor) -> Tensor:
            self.sizes.append(len(squares))
            if len(squares) > 2:
                raise torch.OutOfMemoryError("no")
            return super().embed_pictures(squares)

    narrow, wide = Narrow("first", RewardOptions(batch_size=8)), Towers("first")
    pairs, others = batch(5), batch(5)

    Scorer([narrow], CPU).begin(pairs)
    Scorer([wide], CPU).begin(others)

    assert Narrow.sizes == [5, 4, 2, 2, 1]
    np.testing.assert_array_equal(pairs.scores, others.scores)
    assert "batches of 2 now" in caplog.text


def test_a_single_picture_that_does_not_fit_is_an_error() -> None:
    class Never(Towers):
        def embed_pictures(self, squares: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        Scorer([Never("first")], CPU).begin(batch(2))


def test_a_reward_that_gives_the_wrong_number_of_scores_is_refused() -> None:
    class Short(NetworkReward):
        name, model, reads_caption, range, view = (
            "short",
            "none",
            True,
            (0.0, 1.0),
            ImageTransform(8),
        )

        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(ValueError, match="'short' gave \\(1,\\) for 4 pairs"):
        Scorer([Short(nn.Linear(1, 1), RewardOptions())], CPU).begin(batch(2))
