"""Loader batches: a function of (seed, position), equal in any order of access."""

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoded import text_at

from miro.data.loader import Batch, Loader, prefetch
from miro.data.npy import npy_bytes
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, scores_path, write_scores, write_shard
from miro.utils.rng import seed_from

CAPTION_TYPES = ("original", "short", "long")
SAMPLES, DIM, SHAPE = 21, 6, (2, 4, 3)


def latent(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal(SHAPE).astype(np.float16)


def text(n: int, caption: int) -> np.ndarray:
    """Text states of lengths from 0 to 6, all different."""
    length = (n + 2 * caption) % 7
    return np.random.default_rng([n, caption]).standard_normal((length, DIM)).astype(np.float16)


def make_encoded(
    folder: Path, *, samples: int = SAMPLES, has_std: bool = False, missing: tuple = ()
) -> Path:
    """Write two shards; `missing` lists (sample, caption) pairs without a caption."""
    shards = []
    for name, numbers in [("00000", range(9)), ("00001", range(9, samples))]:
        made = write_shard(
            folder / "shards" / f"{name}.tar", (sample(n, has_std, missing) for n in numbers)
        )
        rows = [
            (n, caption)
            for n in reversed(numbers)
            for caption in range(3)
            if (n, caption) != (4, 1)
        ]
        write_scores(
            scores_path(folder, made),
            [f"k{n}" for n, _ in rows],
            [CAPTION_TYPES[caption] for _, caption in rows],
            {
                "colourfulness": [n for n, _ in rows],
                "alignment": [n + caption / 10 for n, caption in rows],
            },
        )
        shards.append(made)
    encoding = {"latent_shape": list(SHAPE), "has_std": has_std, "text_dim": DIM}
    rewards = ("colourfulness", "alignment")
    Manifest("encoded", CAPTION_TYPES, tuple(shards), rewards, encoding).write(folder)
    return folder


def sample(n: int, has_std: bool, missing: tuple) -> tuple[str, dict[str, bytes]]:
    array = np.stack([latent(n), np.abs(latent(n + 1000))]) if has_std else latent(n)
    texts = {
        f"text.{name}.npy": npy_bytes(text(n, caption))
        for caption, name in enumerate(CAPTION_TYPES)
        if (n, caption) not in missing
    }
    record = json.dumps({"captions": {}, "number": n}).encode()
    return f"k{n}", {"latent.npy": npy_bytes(array), **texts, "json": record}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> EncodedDataset:
    return EncodedDataset(make_encoded(tmp_path_factory.mktemp("encoded")))


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.text.states, b.text.states)
    assert torch.equal(a.text.offsets, b.text.offsets)
    assert torch.equal(a.scores_index, b.scores_index)
    assert torch.equal(a.caption_index, b.caption_index)


def test_a_batch_equals_the_arrays_in_the_shards(dataset):
    batch = Loader(dataset, seed=1).batch_at(0, 8)
    assert batch.latents.dtype == torch.float32
    assert batch.std is None
    assert batch.text.states.dtype == torch.float16
    assert batch.text.offsets.dtype == torch.int32
    assert len(batch) == len(batch.text) == 8
    lengths = []
    for row, (n, caption) in enumerate(zip(batch.scores_index, batch.caption_index, strict=True)):
        n, caption = int(n), int(caption)
        assert batch.keys[row] == f"k{n}"
        np.testing.assert_array_equal(batch.latents[row], latent(n).astype(np.float32))
        np.testing.assert_array_equal(text_at(batch.text, row), text(n, caption))
        lengths.append(len(text(n, caption)))
    assert batch.text.longest == max(lengths)
    assert batch.text.offsets.tolist() == [0, *np.cumsum(lengths)]


def test_scores_are_matched_by_key_and_caption_not_by_row_order(dataset):
    assert dataset.scores.shape == (SAMPLES, 3, 2)
    batch = Loader(dataset, seed=2).batch_at(0, SAMPLES)
    scores = dataset.scores[batch.scores_index, batch.caption_index]
    expected = [
        [n, n + k / 10] if (n, k) != (4, 1) else [np.nan, np.nan]
        for n, k in zip(batch.scores_index.tolist(), batch.caption_index.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))


def test_a_pair_without_a_table_row_has_nan_scores(dataset):
    assert np.isnan(dataset.scores[4, 1]).all()
    assert np.isnan(dataset.scores).sum() == 2


def test_random_access_equals_sequential_reading(dataset):
    sequential, random = Loader(dataset, seed=3), Loader(dataset, seed=3)
    expected = [sequential.batch_at(images, 8) for images in range(0, 80, 8)]
    for index in (7, 0, 9, 7):
        assert_equal(random.batch_at(8 * index, 8), expected[index])


def test_each_epoch_is_another_permutation_of_all_samples(dataset):
    loader = Loader(dataset, seed=4)
    epochs = [
        [
            key
            for images in range(e * SAMPLES, (e + 1) * SAMPLES, 7)
            for key in keys(loader, images, 7)
        ]
        for e in range(3)
    ]
    assert all(Counter(epoch) == Counter(dataset.keys) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != dataset.keys


def keys(loader: Loader, position: int, size: int) -> list[str]:
    return loader.batch_at(position, size).keys


def test_a_batch_across_an_epoch_boundary_is_full(dataset):
    loader = Loader(dataset, seed=5)
    order = [key for images in range(0, 168, 8) for key in keys(loader, images, 8)]
    for start in range(0, 168, SAMPLES):
        assert Counter(order[start : start + SAMPLES]) == Counter(dataset.keys)


def test_a_batch_may_be_larger_than_the_dataset(dataset):
    counts = Counter(keys(Loader(dataset, seed=6), 0, 3 * SAMPLES))
    assert set(counts.values()) == {3}


@pytest.mark.parametrize("images", [0, 12, 18, 600])
def test_a_batch_equals_the_concatenation_of_its_micro_batches(dataset, images):
    loader = Loader(dataset, seed=7)
    batch = loader.batch_at(images, 12)
    parts = [loader.batch_at(images + 4 * k, 4) for k in range(3)]
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert torch.equal(torch.cat([part.text.states for part in parts]), batch.text.states)


def test_each_seed_gives_another_order(dataset):
    orders = {tuple(keys(Loader(dataset, seed=seed), 0, SAMPLES)) for seed in range(4)}
    assert len(orders) == 4


def test_caption_types_are_drawn_uniformly_and_again_in_each_epoch(dataset):
    loader = Loader(dataset, seed=8)
    drawn: dict[int, list[int]] = {n: [] for n in range(SAMPLES)}
    for epoch in range(60):
        batch = loader.batch_at(epoch * SAMPLES, SAMPLES)
        pairs = zip(batch.scores_index.tolist(), batch.caption_index.tolist(), strict=True)
        for n, caption in pairs:
            drawn[n].append(caption)
    assert all(set(types) == {0, 1, 2} for types in drawn.values())
    shares = np.bincount(sum(drawn.values(), [])) / (60 * SAMPLES)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)  # 3 standard deviations


def test_a_missing_caption_is_never_drawn(tmp_path):
    missing = tuple((n, 0) for n in range(SAMPLES)) + ((3, 1),)
    loader = Loader(EncodedDataset(make_encoded(tmp_path, missing=missing)), seed=9)
    for epoch in range(20):
        batch = loader.batch_at(epoch * SAMPLES, SAMPLES)
        types = dict(zip(batch.keys, batch.caption_index.tolist(), strict=True))
        assert set(types.values()) == {1, 2}
        assert types["k3"] == 2


def test_a_sample_without_captions_raises_with_its_key(tmp_path):
    missing = tuple((5, caption) for caption in range(3))
    with pytest.raises(ValueError, match="sample 'k5' has no encoded caption"):
        EncodedDataset(make_encoded(tmp_path, missing=missing))


def test_posteriors_are_returned_as_mean_and_std(tmp_path):
    batch = Loader(EncodedDataset(make_encoded(tmp_path, has_std=True)), seed=10).batch_at(0, 5)
    assert batch.std is not None
    assert batch.latents.is_contiguous()
    assert batch.std.is_contiguous()
    for row, n in enumerate(batch.scores_index.tolist()):
        np.testing.assert_array_equal(batch.latents[row], latent(n).astype(np.float32))
        np.testing.assert_array_equal(batch.std[row], np.abs(latent(n + 1000)).astype(np.float32))


def test_samples_are_views_of_the_file_and_batches_are_copies(dataset):
    assert not dataset.text(0, 0).flags.owndata
    assert not dataset.latent(0).flags.writeable
    batch = Loader(dataset, seed=11).batch_at(0, 4)
    batch.latents.zero_()
    batch.text.states.zero_()
    assert Loader(dataset, seed=11).batch_at(0, 4).latents.abs().sum() > 0


def test_metadata_returns_the_json_of_a_sample(dataset):
    assert dataset.metadata(12)["number"] == 12


def test_prefetch_yields_the_same_batches_and_ends_its_thread(dataset):
    loader = Loader(dataset, seed=12)
    batches = prefetch(lambda at: loader.batch_at(at, 4), itertools.count(8, 4))
    for images in range(8, 60, 4):
        assert_equal(next(batches), loader.batch_at(images, 4))
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("miro-loader")]


def test_an_exception_in_the_prefetch_thread_is_raised_in_the_caller(tmp_path):
    folder = make_encoded(tmp_path)
    dataset = EncodedDataset(folder)
    tar = folder / "shards" / "00001.tar"
    data = bytearray(tar.read_bytes())
    while (at := data.find(b"NUMPY")) >= 0:  # every array of the second shard, in place
        data[at : at + 5] = b"SPOIL"
    with open(tar, "r+b") as file:
        file.write(data)
    loader = Loader(dataset, seed=13)
    batches = prefetch(lambda at: loader.batch_at(at, SAMPLES), [0])
    with pytest.raises(ValueError, match=r"not a \.npy file"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("miro-loader")]


def test_the_global_rng_state_is_unchanged(dataset):
    before = torch.get_rng_state()
    Loader(dataset, seed=14).batch_at(40, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_latents_raises_with_the_command_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
        EncodedDataset(tmp_path)
    shard = write_shard(tmp_path / "shards" / "00000.tar", [("k", {"png": b"x"})])
    Manifest("images", ("original",), (shard,)).write(tmp_path)
    with pytest.raises(ValueError, match="holds images, not latents; run `miro encode"):
        EncodedDataset(tmp_path)
    Manifest("encoded", ("original",), (), encoding={}).write(tmp_path)
    with pytest.raises(ValueError, match="holds no samples yet"):
        EncodedDataset(tmp_path)


def test_scores_of_unknown_samples_raise(tmp_path):
    folder = make_encoded(tmp_path)
    manifest = Manifest.read(folder)
    Manifest(
        "encoded", CAPTION_TYPES, manifest.shards[:1], manifest.rewards, manifest.encoding
    ).write(folder)
    scores_path(folder, manifest.shards[0]).write_bytes(
        scores_path(folder, manifest.shards[1]).read_bytes()
    )
    with pytest.raises(ValueError, match="the scores name 'k20', which is in no shard"):
        EncodedDataset(folder)


@pytest.mark.parametrize(("position", "size"), [(-4, 4), (0, 0)])
def test_an_invalid_position_or_size_raises(dataset, position, size):
    with pytest.raises(ValueError, match=f"{position}, {size}"):
        Loader(dataset, seed=0).batch_at(position, size)


def test_seed_from_is_stable_and_depends_on_the_order_and_type_of_its_parts():
    assert seed_from(1, "order", 2) == 4950414120014217994
    parts = [(1, 2), (2, 1), (12,), ("1", 2), ("12",), (1, "2"), (1, 2, 0), (-1, 2), ()]
    seeds = {seed_from(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(np.int64(1), np.int32(2)) == seed_from(1, 2)
