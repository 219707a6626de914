"""Sample order with several sources and several latent shapes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoded import SQUARE, WIDE, text_at, write_encoded

from miro.data.index_sampler import IndexSampler, SourceRange, apportion, build_buckets
from miro.data.loader import Loader
from miro.data.mixture import Mixture, open_data
from miro.data.reader import EncodedDataset
from miro.training.checkpoint import RunFolder, load
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics_log import read_metrics

# Two sources in three shapes; the second source lacks the last shape.
SHAPE_INDEX = np.array([0] * 50 + [1] * 23 + [2] * 4 + [0] * 30 + [1] * 14)
RANGES = (SourceRange(0, 77, 3.0), SourceRange(77, 121, 1.0))
BATCH = 8


def sampler(
    seed: int = 0, shape_index: np.ndarray = SHAPE_INDEX, ranges: tuple = RANGES
) -> IndexSampler:
    return IndexSampler(build_buckets(shape_index, ranges), seed, BATCH)


def mixture(folder: Path, *sources: tuple[str, float]) -> Path:
    path = folder / "mixture.json"
    listed = [{"folder": name, "weight": weight} for name, weight in sources]
    path.write_text(json.dumps({"sources": listed}))
    return path


def test_the_order_of_a_single_bucket_is_unchanged(tmp_path: Path) -> None:
    """Values of the first version: a change would alter the resumption of existing runs."""
    folder = write_encoded(tmp_path, [SQUARE] * 21, caption_types=("original", "short", "long"))

    samples, captions = Loader(EncodedDataset(folder), seed=1).sample_draws(17, 9)

    assert samples.tolist() == [1, 3, 7, 12, 14, 15, 19, 5, 12]
    assert captions.tolist() == [2, 1, 0, 1, 2, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (30, [2.0, 1.0], [20, 10]),
        (10, [0.1, 0.2], [3, 7]),
        (7, [1, 1, 1], [3, 2, 2]),
        (121, [77, 44], [77, 44]),
        (1000, [1e6, 1e-6, 1e-6], [998, 1, 1]),
        (3, [5, 1, 1], [1, 1, 1]),
    ],
)
def test_apportion_gives_integers_that_add_up_to_the_total(
    total: int, weights: list[float], expected: list[int]
) -> None:
    assert apportion(total, weights) == expected


def test_source_weights_hold_exactly_in_each_epoch(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 60)):
        write_encoded(tmp_path / name, [SQUARE] * count)
    data = Mixture(mixture(tmp_path, ("a", 2.0), ("b", 1.0)))
    loader = Loader(data, seed=0)

    for epoch in range(4):
        samples, _ = loader.sample_draws(epoch * 90, 90)
        assert ((samples < 30).sum(), (samples >= 30).sum()) == (60, 30)
        # Each third of an epoch contains both sources.
        assert all(0 < (samples[at : at + 30] < 30).sum() < 30 for at in (0, 30, 60))


def test_every_sample_of_a_bucket_is_drawn_equally_often() -> None:
    one = sampler()
    counts = Counter(np.concatenate([one.draw(8 * k, 8)[0] for k in range(1500)]).tolist())

    for samples in (
        s for shape in build_buckets(SHAPE_INDEX, RANGES) for s in [st.samples for st in shape]
    ):
        seen = [counts[int(n)] for n in samples]
        # Counts differ by one within a permutation, and by one more where an epoch of another
        # source is mixed in.
        assert max(seen) - min(seen) <= 2, seen


def test_source_weights_hold_within_a_batch_per_shape_at_any_time() -> None:
    one = sampler()
    samples = np.concatenate([one.draw(8 * k, 8)[0] for k in range(1500)])

    first = np.cumsum(samples < 77)
    expected = 91 / 121 * np.arange(1, len(samples) + 1)
    # Of 121 draws per epoch, 91 (3/4); within an epoch the order is random.
    assert np.abs(first - expected).max() < 3 * BATCH + 30
    assert abs(first[-1] - expected[-1]) < 3 * BATCH + 30


def test_a_batch_has_one_shape_and_equals_its_parts() -> None:
    first, second = sampler(), sampler()
    seen = set()
    for number in (*range(40), 10_000, 123_456):
        samples, draws = first.draw(8 * number, 8)
        (shape,) = set(SHAPE_INDEX[samples].tolist())
        seen.add(shape)
        for size in (1, 2, 4):
            parts = [second.draw(8 * number + at, size) for at in range(0, 8, size)]
            assert np.array_equal(np.concatenate([s for s, _ in parts]), samples)
            assert np.array_equal(np.concatenate([d for _, d in parts]), draws)
    assert seen == {0, 1, 2}


def test_a_range_across_two_batches_raises() -> None:
    with pytest.raises(ValueError, match="cross a batch of 8"):
        sampler().draw(4, 8)


def test_shapes_are_shuffled_and_each_seed_gives_another_order() -> None:
    samplers = [sampler(seed) for seed in range(4)]
    orders = {
        tuple(int(SHAPE_INDEX[one.draw(8 * k, 1)[0][0]]) for k in range(60)) for one in samplers
    }

    assert len(orders) == 4
    assert all(order != tuple(sorted(order)) for order in orders)


def test_a_shape_rarer_than_a_batch_is_carried_over_epochs_without_repeats() -> None:
    shape_index = np.array([0] * 60 + [1] * 3)
    one = IndexSampler(build_buckets(shape_index, (SourceRange(0, 63),)), 0, BATCH)

    samples = np.concatenate([one.draw(8 * k, 8)[0] for k in range(630)])

    seen = Counter(samples.tolist())
    assert max(seen.values()) - min(seen.values()) <= 3
    rare = [k for k in range(630) if samples[8 * k] >= 60]
    assert len(rare) == 630 * 3 // 63


def test_a_source_with_fewer_draws_than_shapes_raises() -> None:
    with pytest.raises(ValueError, match="a source of weight 1e-06 gets 1 of the 121 draws"):
        build_buckets(SHAPE_INDEX, (SourceRange(0, 77, 1.0), SourceRange(77, 121, 1e-6)))


def test_samples_of_equal_keys_in_two_sources_stay_distinct(tmp_path: Path) -> None:
    write_encoded(tmp_path / "a", [SQUARE] * 5, caption_types=("short", "original"))
    write_encoded(tmp_path / "b", [WIDE, SQUARE, WIDE], rewards=("sharpness", "colourfulness"))
    data = Mixture(mixture(tmp_path, ("a", 1.0), ("b", 1.0)))
    own = [EncodedDataset(tmp_path / name) for name in "ab"]

    batch = Loader(data, seed=3, batch=2).batch_at(0, 2)

    assert data.keys == [f"a/k{n}" for n in range(5)] + [f"b/k{n}" for n in range(3)]
    assert data.rewards == ("colourfulness",) and data.caption_types == ("short", "original")
    assert data.shapes == (SQUARE, WIDE) and data.shape_index.tolist() == [0] * 5 + [1, 0, 1]
    assert data.scores[:, 1, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert np.isnan(data.scores[5:, 0]).all() and not np.isnan(data.scores[:5]).any()
    for key, latent, text, caption in zip(
        batch.keys, batch.latents, range(2), batch.caption_index.tolist(), strict=True
    ):
        name, _, number = key.partition("/k")
        source, n = own["ab".index(name)], int(number)
        assert np.array_equal(latent, source.latent(n).astype(np.float32))
        own_caption = source.caption_types.index(data.caption_types[caption])
        assert np.array_equal(text_at(batch.text, text), source.text(n, own_caption))


def test_a_mixture_of_one_source_has_the_order_of_that_source(tmp_path: Path) -> None:
    write_encoded(tmp_path / "a", [SQUARE] * 9)
    data = Mixture(mixture(tmp_path, ("a", 0.3)))

    alone = Loader(EncodedDataset(tmp_path / "a"), seed=1).sample_draws(0, 30)

    assert np.array_equal(Loader(data, seed=1).sample_draws(0, 30), alone)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "lists no sources; a mixture is"),
        ('{"sources": []}', "lists no sources"),
        ('{"sources": [{"weight": 1}]}', "names no folder"),
        ('{"sources": [{"folder": "a", "wieght": 1}]}', "did you mean 'weight'"),
        ('{"sources": [{"folder": "a", "weight": 0}]}', "'a' must be above 0, got 0"),
        ('{"sources": [{"folder": "a", "weight": "2"}]}', "must be above 0, got '2'"),
        ('{"sources": [{"folder": "a"}, {"folder": "a"}]}', "'a' is listed twice"),
        ('{"sources": [{"folder": "none"}]}', "none/manifest.json: no such file"),
    ],
)
def test_an_invalid_mixture_file_raises(tmp_path: Path, content: str, message: str) -> None:
    write_encoded(tmp_path / "a", [SQUARE])
    (tmp_path / "mixture.json").write_text(content)

    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "mixture.json")


@pytest.mark.parametrize(
    "other",
    [{"latents": "pixels"}, {"size": 256}, {"text_dim": 8}, {"has_std": True}],
    ids=lambda other: next(iter(other)),
)
def test_mixing_different_encodings_raises(tmp_path: Path, other: dict[str, Any]) -> None:
    write_encoded(tmp_path / "a", [SQUARE])
    write_encoded(tmp_path / "b", [SQUARE], **other)

    with pytest.raises(ValueError, match=f"different ways .{next(iter(other))}: .*encode them w"):
        open_data(mixture(tmp_path, ("a", 1), ("b", 1)))


def test_a_run_on_a_mixture_resumes_bit_for_bit(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").symlink_to(encoded)
    path = mixture(tmp_path, (str(encoded), 2.0), ("b", 1.0))
    config = replace(training, data=path, ema_weights_at=(), images=64)
    train(config, tmp_path / "uninterrupted")

    def stop(progress: Any) -> None:
        if progress.images == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", report=stop)
    train(config, tmp_path / "run")

    ours, theirs = (RunFolder(tmp_path / name) for name in ("run", "uninterrupted"))
    expected = load(theirs.weights_at(64))
    found = load(ours.weights_at(64))
    assert found[1] == expected[1] and found[1]["encoding"] == EncodedDataset(encoded).encoding
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    both = [[line["loss"] for line in read_metrics(run.metrics)] for run in (ours, theirs)]
    assert both[0] == both[1]
