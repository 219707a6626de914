"""On-the-fly encoding equals training on the encoded folder, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoded import write_images
from helpers.image_folders import write_image_folder
from helpers.kill import run_killed_when
from helpers.tiny_models import save_autoencoder

from miro.data.loader import Loader
from miro.data.mixture import open_data
from miro.data.on_the_fly import OnTheFlyDataset, OnTheFlyEncoders
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, shard_path
from miro.encoders.encoder import EncodingConfig
from miro.model.transformer import ModelConfig
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.prepare.encode import EncodeConfig, encode
from miro.sources.tar import iterate_shard
from miro.training.checkpoint import RunFolder, load
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.presets import preset

SQUARE = EncodingConfig(size=16)
SMALL = ModelConfig(channels=16, depth=2, heads=2, hidden=32, patch=4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("on the fly")
    config = AnnotateConfig(samples_per_shard=9, workers=1)
    annotate(
        write_image_folder(root / "in", 24), root / "scored", rewards=["sharpness"], config=config
    )
    return root / "scored"


def config_of(
    data: Path, encoding: EncodingConfig = SQUARE, on_the_fly: bool = True
) -> TrainConfig:
    return replace(
        preset("demo"),
        model=SMALL,
        data=data,
        on_the_fly=on_the_fly,
        encode=encoding,
        images=64,
        batch=8,
        report_every=16,
        checkpoint_every=16,
        precision="fp32",
        compile=False,
    )


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load(RunFolder(run).weights_written()[-1][1])[0]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def encoded(source: Path, dest: Path, encoding: EncodingConfig) -> Path:
    fields = {name: getattr(encoding, name) for name in EncodingConfig.__dataclass_fields__}
    encode(source, dest, config=EncodeConfig(**fields))
    return dest


@pytest.mark.parametrize("buckets", [(), ("1:1", "2:1")])
def test_training_on_images_equals_training_on_their_encoded_folder(
    scored: Path, tmp_path: Path, buckets: tuple[str, ...]
) -> None:
    encoding = replace(SQUARE, buckets=buckets, multiple=8)
    stored = encoded(scored, tmp_path / "encoded", encoding)

    train(config_of(stored, encoding, on_the_fly=False), tmp_path / "stored")
    train(config_of(scored, encoding), tmp_path / "on the fly")

    assert_same(weights_of(tmp_path / "on the fly"), weights_of(tmp_path / "stored"))


def test_latents_and_text_states_equal_the_stored_ones(scored: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae")
    encoding = EncodingConfig(latents=str(tmp_path / "vae"), size=16)
    stored = EncodedDataset(encoded(scored, tmp_path / "encoded", encoding))

    dataset = OnTheFlyDataset(scored, None, OnTheFlyEncoders(encoding, "cpu"))

    assert dataset.has_std and dataset.latent_shape == stored.latent_shape
    assert dataset.keys == stored.keys and dataset.rewards == stored.rewards
    np.testing.assert_array_equal(dataset.scores, stored.scores)
    assert {**dataset.encoding, "cut": 0} == {**stored.encoding, "cut": 0}
    everything, first = np.arange(len(dataset)), np.zeros(len(dataset), np.int64)
    np.testing.assert_allclose(
        dataset.latents(everything), stored.latents(everything), rtol=2e-3, atol=2e-3
    )
    for ours, theirs in zip(
        dataset.texts(everything, first), stored.texts(everything, first), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


def test_half_of_the_images_are_flipped_by_their_position(scored: Path) -> None:
    dataset = OnTheFlyDataset(scored, None, OnTheFlyEncoders(SQUARE, "cpu"))
    plain, mirror = Loader(dataset, 0), Loader(dataset, 0, horizontal_flip=True)

    original, flipped = plain.batch_at(0, 200).latents, mirror.batch_at(0, 200).latents
    again = mirror.batch_at(120, 30).latents

    is_flipped = torch.tensor(
        [bool((a != b).any()) for a, b in zip(original, flipped, strict=True)]
    )
    assert 70 < is_flipped.sum() < 130
    assert torch.equal(flipped[is_flipped], original[is_flipped].flip(-1))
    assert torch.equal(flipped[120:150], again)


def test_a_killed_run_on_flipped_images_resumes_bit_for_bit(scored: Path, tmp_path: Path) -> None:
    config = replace(config_of(scored), horizontal_flip=True)
    train(config, tmp_path / "uninterrupted")

    killed = tmp_path / "killed"
    run_killed_when(config, killed, lambda: any((killed / "checkpoints").glob("*/manifest.json")))
    train(config, killed)

    assert_same(weights_of(killed), weights_of(tmp_path / "uninterrupted"))


@pytest.mark.long
def test_a_killed_run_with_all_features_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A mixture, aspect buckets, on-the-fly encoding, flips, torch.compile and bf16."""
    square, wide, tall = (40, 40), (64, 30), (33, 60)
    folders = {"many": [square, wide, tall, wide] * 6, "few": [wide, tall] * 6}
    weights = [
        {"folder": str(write_images(tmp_path / name, sides)), "weight": 1 + len(sides) % 5}
        for name, sides in folders.items()
    ]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": weights}))
    encoding = replace(SQUARE, buckets=("1:1", "2:1", "1:2"), multiple=8)
    config = replace(
        config_of(tmp_path / "mixture.json", encoding),
        horizontal_flip=True, precision="bf16", compile=True,
    )  # fmt: skip
    assert config.data is not None
    assert len(open_data(config.data, None, OnTheFlyEncoders(encoding, "cpu")).shapes) == 3
    train(config, tmp_path / "uninterrupted")

    killed = tmp_path / "killed"
    run_killed_when(config, killed, lambda: any((killed / "checkpoints").glob("*/manifest.json")))
    assert not RunFolder(killed).weights_written()
    train(config, killed)

    assert_same(weights_of(killed), weights_of(tmp_path / "uninterrupted"))


def test_images_folders_may_be_mixed_by_weight(scored: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.json"
    mixture.write_text(f'{{"sources": [{{"folder": "{scored}", "weight": 2}}]}}')

    data = open_data(mixture, None, OnTheFlyEncoders(SQUARE, "cpu"))

    assert len(data) == len(OnTheFlyDataset(scored, None, OnTheFlyEncoders(SQUARE, "cpu")))
    assert data.latents(np.array([3, 1])).shape == (2, 3, 16, 16)


def test_an_image_damaged_during_a_run_raises_with_its_key_and_remedy(
    scored: Path, tmp_path: Path
) -> None:
    annotate(scored, tmp_path / "copy", rewards=[])
    shard = Manifest.read(tmp_path / "copy").shards[0]
    path = shard_path(tmp_path / "copy", shard)
    key, members = next(iter(iterate_shard(path)))
    data = path.read_bytes()
    image = next(value for name, value in members.items() if name != "json")
    path.unlink()  # it is a hard link to the shard of the source
    path.write_bytes(data.replace(image, bytes(len(image))))

    with pytest.raises(ValueError, match=f"sample '{key}': .*zero bytes; run `miro annotate`"):
        train(config_of(tmp_path / "copy"), tmp_path / "run")


def test_contradicting_settings_raise(scored: Path, tmp_path: Path) -> None:
    stored = encoded(scored, tmp_path / "encoded", SQUARE)

    with pytest.raises(ValueError, match="holds images, not latents.*--on-the-fly True"):
        train(config_of(scored, on_the_fly=False), tmp_path / "run")
    with pytest.raises(ValueError, match="is encoded already; train on it without --on"):
        train(config_of(stored), tmp_path / "run")
    with pytest.raises(ValueError, match=r"has another encoding .*\(size: 32 here, 16 there"):
        train(config_of(stored, EncodingConfig(size=32), on_the_fly=False), tmp_path / "run")
    with pytest.raises(ValueError, match="set encode.size"):
        unresized = replace(config_of(scored, EncodingConfig()), model=replace(SMALL, patch=2))
        train(unresized, tmp_path / "run")
    with pytest.raises(ValueError, match="horizontal_flip=True needs on_the_fly=True"):
        replace(config_of(stored, on_the_fly=False), horizontal_flip=True)
