"""Aspect buckets and several sizes: encoding, training and sampling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoded import write_images
from helpers.image_folders import file_contents
from helpers.multirank import train_multirank
from PIL import Image

import miro.images.pillow
import miro.prepare.encode
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, ShardIndex
from miro.encoders.encoder import EncodingConfig
from miro.images.buckets import nearest_bucket
from miro.images.pillow import decode
from miro.images.transforms import center_crop_resize
from miro.model.embeddings import pos_embed_2d_sincos, rope_angles
from miro.model.packed_text import pack
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.prepare.encode import EncodeConfig, encode
from miro.sampling.command import sample_images
from miro.training import checkpoint
from miro.training.batch_plan import ShardingConfig
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics_log import read_metrics

# (width, height): square, wide, tall, and one wider than any bucket.
SIDES = [(40, 40), (60, 40), (33, 50), (64, 64), (120, 30), (48, 32)] * 4
CONFIG = EncodeConfig(size=32, buckets=("1:1", "3:2", "2:3"), multiple=8, workers=1)
SQUARE, WIDE, TALL = (3, 32, 32), (3, 24, 40), (3, 40, 24)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), SIDES)


@pytest.fixture(scope="module")
def bucketed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucketed") / "data"
    encode(images, folder, config=CONFIG)
    return folder


@pytest.mark.parametrize(
    ("buckets", "multiple", "expected"),
    [
        ((), 16, [(256, 256)]),
        (("1:1", "4:3", "3:4"), 64, [(256, 256), (192, 320), (320, 192)]),
        (("16:9", "9:16"), 16, [(192, 336), (336, 192)]),
        (("100:1",), 64, [(64, 2560)]),
    ],
)
def test_a_bucket_has_about_the_area_of_the_size(
    buckets: tuple[str, ...], multiple: int, expected: list[tuple[int, int]]
) -> None:
    assert EncodingConfig(size=256, buckets=buckets, multiple=multiple).bucket_sizes() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 64, "buckets": ("4x3",)}, "an aspect ratio is WIDTH:HEIGHT, as 4:3, got '4x3'"),
        ({"size": 64, "buckets": ("0:3",)}, "got '0:3'"),
        ({"size": 32, "buckets": ("1:1", "4:3")}, "'1:1' and '4:3' are both 32 x 32 pixels"),
        ({"buckets": ("1:1",)}, "buckets 1:1 need a size"),
        ({"size": 32, "sizes": (32, 64)}, "size=32 or sizes=.32, 64., not both"),
        ({"sizes": (32, 32)}, "must be distinct"),
        ({"multiple": 0}, "multiple must be at least 1"),
    ],
)
def test_invalid_buckets_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**settings)


def test_the_nearest_bucket_is_nearest_by_ratio() -> None:
    sides = [(32, 32), (24, 40), (40, 24)]

    assert nearest_bucket(sides, 1.29) == (32, 32) and nearest_bucket(sides, 1.30) == (24, 40)
    assert nearest_bucket(sides, 1 / 1.29) == (32, 32)
    assert nearest_bucket(sides, 1 / 1.30) == (40, 24)


def test_an_image_is_resized_to_cover_its_bucket_and_center_cropped() -> None:
    image = torch.zeros(3, 30, 120, dtype=torch.uint8)
    image[:, :, 35:85] = 200  # a 24 x 40 crop covers the middle 50 columns

    assert torch.equal(
        center_crop_resize(image, 24, 40), torch.full((3, 24, 40), 200, dtype=torch.uint8)
    )
    noise = torch.randint(256, (3, 37, 53), dtype=torch.uint8)
    assert torch.equal(center_crop_resize(noise, 37, 37), noise[:, :, 8:45])
    assert center_crop_resize(noise, 64, 64).shape == (3, 64, 64)


def test_each_image_is_encoded_in_its_bucket(images: Path, bucketed: Path) -> None:
    data = EncodedDataset(bucketed)

    assert data.shapes == (SQUARE, WIDE, TALL) and data.latent_shape == SQUARE
    assert data.shape_index.tolist() == [0, 1, 2, 0, 1, 1] * 4
    for i in (1, 2, 3, 4):
        pixels = decode(bytes(ShardIndex(images).member(i, "png")))
        fitted = center_crop_resize(pixels, *data.shapes[data.shape_index[i]][1:])
        restored = np.rint((data.latent(i).astype(np.float32) + 1) * 127.5)
        assert np.array_equal(restored, fitted.numpy())
    record = Manifest.read(bucketed).encoding
    assert record is not None
    assert record["latent_shape"] == [3, 32, 32] and record["buckets"] == ["1:1", "3:2", "2:3"]


def test_a_bucket_without_images_is_not_among_the_shapes(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path, config=replace(CONFIG, buckets=(*CONFIG.buckets, "9:1")))

    data = EncodedDataset(tmp_path)

    assert len(Manifest.read(tmp_path).encoding["latent_shapes"]) == 4  # type: ignore[index]
    assert data.shapes == (SQUARE, WIDE, TALL)
    assert data.encoding["latent_shapes"] == [list(shape) for shape in data.shapes]


def test_other_buckets_are_another_encoding(images: Path, bucketed: Path) -> None:
    for config in (replace(CONFIG, buckets=("1:1",)), replace(CONFIG, buckets=())):
        with pytest.raises(ValueError, match="encoded with other settings .buckets"):
            encode(images, bucketed, config=config)


def test_several_sizes_give_complete_folders_with_one_decoding_per_image(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    for module in (miro.prepare.encode, miro.images.pillow):
        monkeypatch.setattr(module, "decode", lambda data: (decoded.append(1), decode(data))[1])
    both = replace(CONFIG, size=None, sizes=(32, 64), decoder="pillow")

    summary = encode(images, tmp_path / "both", config=both)

    assert (
        len(decoded) == len(SIDES) + 1
    )  # the first image is decoded once more, to find the latent shapes
    assert (summary.samples, summary.encoded) == (24, 24)
    for size in (32, 64):
        encode(images, tmp_path / str(size), config=replace(CONFIG, size=size))
        assert file_contents(tmp_path / "both" / str(size)) == file_contents(tmp_path / str(size))
    before = len(decoded)
    assert encode(images, tmp_path / "both", config=both).encoded == 0 and len(decoded) == before


def test_a_shard_missing_in_one_size_is_encoded_again(images: Path, tmp_path: Path) -> None:
    """As after a kill between the shards of two sizes."""
    both = replace(CONFIG, size=None, sizes=(32, 64))
    encode(images, tmp_path / "uninterrupted", config=both)
    encode(images, tmp_path / "cut", config=both)
    manifest = Manifest.read(tmp_path / "cut" / "64")
    first = {shard.name: shard.sha256 for shard in Manifest.read(images).shards[:1]}
    origin = {**manifest.source, "encoded_from": first}
    replace(manifest, shards=manifest.shards[:1], source=origin).write(tmp_path / "cut" / "64")
    for shard in manifest.shards[1:]:
        (tmp_path / "cut" / "64" / "completed" / shard.name).with_suffix(".json").unlink()

    assert encode(images, tmp_path / "cut", config=both).encoded == 16

    assert file_contents(tmp_path / "cut") == file_contents(tmp_path / "uninterrupted")


def test_position_embeddings_of_other_grids_share_centre_and_scale() -> None:
    for make in (pos_embed_2d_sincos, lambda *grid: rope_angles(*grid)[0]):
        base = make(6, 6, 16).view(6, 6, -1)
        wide, small = make(6, 10, 16, (6, 6)).view(6, 10, -1), make(2, 4, 16, (6, 6)).view(2, 4, -1)
        torch.testing.assert_close(wide[:, 2:8], base)
        torch.testing.assert_close(small, base[2:4, 1:5])

    embedding = pos_embed_2d_sincos(6, 10, 16, (6, 6))
    assert torch.cdist(embedding, embedding).fill_diagonal_(9).min() > 1


def network() -> FlowTransformer:
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(16, 2, 2, 24, 2), (2, 4, 4), 6, rewards=2)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape)
    return model


def predict(model: Any, network: FlowTransformer, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    bins = torch.ones(3, 2, dtype=torch.long)
    rewards = RewardCond(torch.linspace(0, 1, 3), bins, bins > 0)
    text = pack([torch.randn(n, 6, generator=generator) for n in (2, 1, 3)])
    x, t = torch.randn(3, 2, *shape, generator=generator), torch.rand(3, generator=generator)
    return model(x, t, rewards, network.encode_context(text))


def test_the_network_trains_on_any_grid() -> None:
    model = network()

    out = predict(model, model, (4, 8))
    out.square().mean().backward()

    assert out.shape == (3, 2, 4, 8)
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters()
               if param.numel() > 1)  # fmt: skip
    with pytest.raises(ValueError, match="patch=2 does not divide latents of 4x5"):
        predict(model, model, (4, 5))


def test_a_compiled_network_runs_on_several_grids() -> None:
    model, graphs = network(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=True)
    shapes = [(4, 4), (4, 8), (8, 4), (6, 6), (4, 12), (12, 4), (8, 8), (6, 10), (10, 6), (4, 4)]

    for shape in shapes:
        torch.testing.assert_close(
            predict(compiled, model, shape), predict(model, model, shape), rtol=1e-5, atol=1e-5
        )

    # One graph for the reference grid, few for the others; torch falls back to eager after 8.
    assert len(graphs) <= 4


@pytest.fixture(scope="module")
def config(training: TrainConfig, bucketed: Path) -> TrainConfig:
    return replace(training, data=bucketed, images=64, ema_weights_at=())


@pytest.fixture(scope="module")
def uninterrupted(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config, folder)
    return RunFolder(folder)


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in read_metrics(run.metrics)]


def test_a_run_in_buckets_resumes_bit_for_bit(
    config: TrainConfig, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    def stop(progress: Any) -> None:
        if progress.images == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=stop)
    train(config, tmp_path)

    run = RunFolder(tmp_path)
    ours, theirs = (checkpoint.load(r.checkpoint(64))[0] for r in (run, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(uninterrupted)


def test_two_ranks_equal_one_in_buckets(
    config: TrainConfig, uninterrupted: RunFolder, tmp_path: Path
) -> None:
    sharding = ShardingConfig(stage="2", micro_batch=2)

    train_multirank(2, replace(config, sharding=sharding), tmp_path / "run")

    found = losses(RunFolder(tmp_path / "run"))
    torch.testing.assert_close(found, losses(uninterrupted), rtol=1e-5, atol=0)


def test_images_are_sampled_in_the_nearest_trained_aspect(
    uninterrupted: RunFolder, tmp_path: Path
) -> None:
    sizes = {None: (32, 32), "16:9": (40, 24), "1:1": (32, 32), "1:4": (24, 40)}

    for number, (aspect, size) in enumerate(sizes.items()):
        (path,) = sample_images(
            uninterrupted.root,
            ["apples"],
            positive={},
            steps=1,
            aspect=aspect,
            out=tmp_path / str(number),
        )
        assert Image.open(path).size == size
    with pytest.raises(ValueError, match="an aspect ratio is WIDTH:HEIGHT"):
        sample_images(uninterrupted.root, ["apples"], positive={}, aspect="wide")


def test_a_patch_that_does_not_divide_every_bucket_raises(
    config: TrainConfig, tmp_path: Path
) -> None:
    model = replace(config.model, patch=16)

    with pytest.raises(ValueError, match="patch=16 does not divide latents of 24x40"):
        train(replace(config, model=model), tmp_path)
