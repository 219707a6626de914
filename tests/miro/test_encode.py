"""`encode`: its files, resume after a kill, and errors."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folders import file_contents
from PIL import Image

from miro.data.npy import npy_bytes, npy_view
from miro.data.reader import EncodedDataset
from miro.data.shards import (
    Manifest,
    ShardIndex,
    read_scores,
    scores_path,
    shard_path,
    verify,
    write_scores,
    write_shard,
)
from miro.prepare.encode import EncodeConfig, encode
from miro.sources.tar import iterate_shard

TYPES = ("original", "short")
CONFIG = EncodeConfig(workers=1, max_rejected=0.5)


def image(number: int, width: int = 8, height: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def captions(number: int) -> dict[str, str]:
    """Long captions are distinct, short ones are repeated in every shard."""
    return {"original": f"a photo of {number} red apples", "short": f"{number % 3} apples"}


def make_images(folder: Path, shards: int = 3, each: int = 4, **changed: bytes) -> Path:
    """Write a folder as `annotate` does; `changed` are other image files by key."""
    manifest = Manifest("images", TYPES, (), ("colourfulness", "alignment"))
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        samples = [
            (
                f"k{n}",
                {
                    "png": changed.get(f"k{n}", image(n)),
                    "json": json.dumps({"captions": captions(n), "number": n}).encode(),
                },
            )
            for n in numbers
        ]
        made = write_shard(folder / "shards" / f"{shard:05d}.tar", samples)
        rows = [(f"k{n}", name) for n in numbers for name in TYPES]
        values = np.arange(len(rows), dtype=np.float32) + 100 * shard
        scores = {"colourfulness": values, "alignment": -values}
        keys, types = zip(*rows, strict=True)
        write_scores(scores_path(folder, made), keys, types, scores)
        manifest = replace(manifest, shards=(*manifest.shards, made))
    manifest.write(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "run"
    encode(images, folder, config=CONFIG)
    return folder


def test_every_sample_has_its_latent_its_texts_and_its_json(images, encoded):
    data = EncodedDataset(encoded)
    assert len(data) == 12
    assert (data.latent_shape, data.has_std, data.text_dim) == ((3, 8, 8), False, 384)
    assert data.caption_types == TYPES
    source = ShardIndex(images)
    for i, key in enumerate(source.keys):
        assert data.keys[i] == key
        png = Image.open(io.BytesIO(source.member(i, "png")))
        pixels = np.asarray(png).transpose(2, 0, 1)
        restored = np.rint((data.latent(i).astype(np.float32) + 1) * 127.5)
        np.testing.assert_array_equal(restored, pixels)
        assert data.metadata(i) == {"captions": captions(i), "number": i}
        assert data.index.extensions(i) == [
            "json",
            "latent.npy",
            "text.original.npy",
            "text.short.npy",
        ]
    verify(encoded)


def test_texts_are_the_encoders_states(encoded):
    from miro.encoders.text import build_text_encoder

    data = EncodedDataset(encoded)
    for caption, name in enumerate(TYPES):
        states = build_text_encoder("minilm").encode([captions(i)[name] for i in range(len(data))])
        for i, expected in enumerate(states):
            assert data.text(i, caption).dtype == np.float16
            np.testing.assert_allclose(data.text(i, caption), expected.numpy(), atol=5e-3)


def test_the_manifest_records_the_encoding(encoded):
    assert Manifest.read(encoded).encoding == {
        "latents": "pixels",
        "latent_shape": [3, 8, 8],
        "has_std": False,
        "text_encoder": "minilm",
        "text_dim": 384,
        "max_tokens": 256,
        "size": None,
        "precision": "fp32",
        "cut": 0,
    }


def test_scores_are_copied_as_they_are(images, encoded):
    for shard in Manifest.read(images).shards:
        copy = scores_path(encoded, shard).read_bytes()
        assert copy == scores_path(images, shard).read_bytes()


def test_a_completed_folder_is_unchanged(images, encoded):
    before = file_contents(encoded)
    summary = encode(images, encoded, config=CONFIG)
    assert (summary.samples, summary.encoded) == (12, 0)
    assert file_contents(encoded) == before


KILLED_IN_THE_SECOND_SHARD = """
import os, signal, sys
from pathlib import Path
from miro.prepare.encode import EncodeConfig, encode
def stop(done, total):
    if done > 4:
        os.kill(os.getpid(), signal.SIGKILL)
config = EncodeConfig(workers=1, max_rejected=0.5)
encode(Path(sys.argv[1]), Path(sys.argv[2]), config=config, progress=stop)
"""


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    source = make_images(tmp_path / "images", k1=b"broken", k5=b"broken", k9=b"broken")
    encode(source, tmp_path / "undisturbed", config=CONFIG)
    command = [sys.executable, "-c", KILLED_IN_THE_SECOND_SHARD]
    dest = tmp_path / "killed"
    run = subprocess.run([*command, source, dest], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL
    assert [shard.name for shard in Manifest.read(dest).shards] == ["00000.tar"]
    summary = encode(source, dest, config=CONFIG)
    assert (summary.samples, summary.encoded, summary.rejected) == (9, 6, 3)
    assert file_contents(dest) == file_contents(tmp_path / "undisturbed")


def test_captions_of_completed_shards_are_not_encoded_again(images, tmp_path):
    """A resumed run reads their states from the shards, here zeros."""
    dest = tmp_path / "dest"
    whole = Manifest.read(images)
    half = make_images(tmp_path / "half")
    replace(whole, shards=whole.shards[:1]).write(half)
    encode(half, dest, config=CONFIG)
    manifest = Manifest.read(dest)
    path = shard_path(dest, manifest.shards[0])
    zeros = {"text.short.npy": npy_bytes(np.zeros((2, 384), np.float16))}
    marked = write_shard(path, [(key, members | zeros) for key, members in iterate_shard(path)])
    replace(manifest, shards=(marked,)).write(dest)
    encode(images, dest, config=CONFIG)
    data = EncodedDataset(dest)
    assert all(data.text(i, 1).any() == 0 for i in range(12))
    assert all(data.text(i, 0).any() for i in range(12))


def test_a_small_cache_encodes_the_same(images, encoded, tmp_path):
    encode(images, tmp_path, config=replace(CONFIG, cache_bytes=0))
    ours, theirs = EncodedDataset(tmp_path), EncodedDataset(encoded)
    for i in range(len(ours)):
        np.testing.assert_allclose(ours.text(i, 1), theirs.text(i, 1), atol=2e-3)


def test_a_broken_image_is_skipped_with_its_scores(tmp_path):
    source = make_images(tmp_path / "images", k5=b"<html>not found</html>")
    summary = encode(source, tmp_path / "dest", config=CONFIG)
    assert (summary.samples, summary.rejected) == (11, 1)
    (line,) = (tmp_path / "dest" / "rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["source"], rejected["field"]) == ("00001.tar:k5", "image")
    assert "HTML" in rejected["reason"]
    table = read_scores(tmp_path / "dest")
    assert len(table.keys) == 22
    assert "k5" not in table.keys
    row = table.keys.index("k6")
    assert table.values[row].tolist() == [104, -104]


def test_too_many_broken_images_are_an_error_after_the_completed_shards(tmp_path):
    source = make_images(tmp_path / "images", k5=b"x", k6=b"x")
    with pytest.raises(ValueError, match=r"2 of 12 samples.*max_rejected.*rejected\.jsonl"):
        encode(source, tmp_path / "dest", config=EncodeConfig(max_rejected=0.1))
    assert Manifest.read(tmp_path / "dest").samples == 4


def test_images_of_several_sizes_need_a_size(tmp_path):
    source = make_images(tmp_path / "images", k6=image(6, 12, 10))
    with pytest.raises(ValueError, match="00001.tar:k6: the image is 12 x 10.*give a size"):
        encode(source, tmp_path / "dest", config=CONFIG)
    summary = encode(source, tmp_path / "sized", config=replace(CONFIG, size=6))
    assert summary.samples == 12
    assert EncodedDataset(tmp_path / "sized").latent_shape == (3, 6, 6)


def test_another_configuration_is_an_error_with_the_difference(images, encoded):
    with pytest.raises(
        ValueError, match=r"encoded with other settings \(size: 4 here, None there\)"
    ):
        encode(images, encoded, config=replace(CONFIG, size=4))
    with pytest.raises(ValueError, match="text_encoder: 'other/encoder' here, 'minilm' there"):
        encode(images, encoded, config=replace(CONFIG, text="other/encoder"))


def test_another_source_is_an_error(encoded, tmp_path):
    other = make_images(tmp_path, k0=image(99))
    with pytest.raises(ValueError, match=r"00000\.tar was made from other images"):
        encode(other, encoded, config=CONFIG)


def test_a_source_or_destination_of_the_wrong_kind_is_an_error(images, encoded, tmp_path):
    with pytest.raises(ValueError, match="is encoded already"):
        encode(encoded, tmp_path, config=CONFIG)
    with pytest.raises(ValueError, match="holds images, not latents"):
        encode(images, images, config=CONFIG)
    with pytest.raises(ValueError, match="manifest.json: no such file.*miro annotate"):
        encode(tmp_path, tmp_path / "dest", config=CONFIG)


def test_a_reward_added_later_reaches_the_encoded_folder(tmp_path):
    source, dest = make_images(tmp_path / "images", k5=b"x"), tmp_path / "dest"
    encode(source, dest, config=CONFIG)
    tars = {s.name: shard_path(dest, s).stat().st_mtime_ns for s in Manifest.read(dest).shards}
    manifest = Manifest.read(source)
    for shard in manifest.shards:
        table = read_scores(source, replace(manifest, shards=(shard,)))
        scores = dict(zip(manifest.rewards, table.values.T, strict=True))
        scores["sharpness"] = np.full(len(table.keys), 7, np.float32)
        write_scores(scores_path(source, shard), table.keys, table.captions, scores)
    replace(manifest, rewards=(*manifest.rewards, "sharpness")).write(source)
    assert encode(source, dest, config=CONFIG).encoded == 0
    data = EncodedDataset(dest)
    assert data.rewards == ("colourfulness", "alignment", "sharpness")
    assert np.all(data.scores[:, :, 2] == 7)
    after = {s.name: shard_path(dest, s).stat().st_mtime_ns for s in Manifest.read(dest).shards}
    assert after == tars


def test_long_captions_are_truncated_and_counted(images, tmp_path):
    summary = encode(images, tmp_path, config=replace(CONFIG, max_tokens=6))
    data = EncodedDataset(tmp_path)
    assert summary.cut == 12  # [CLS] a photo of 3 red | apples [SEP]: the long ones, not the short
    assert {len(data.text(i, 0)) for i in range(12)} == {6}
    assert {len(data.text(i, 1)) for i in range(12)} == {4}


def test_latents_of_an_autoencoder_have_a_standard_deviation(images, tmp_path):
    autoencoder = pytest.importorskip(
        "diffusers.models.autoencoders.autoencoder_kl", reason="the extra 'vae' is not installed"
    )
    autoencoder.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).save_pretrained(tmp_path / "vae")
    config = replace(CONFIG, latents=str(tmp_path / "vae"), batch_size=3)
    encode(images, tmp_path / "dest", config=config)
    data = EncodedDataset(tmp_path / "dest")
    assert (data.latent_shape, data.has_std) == ((4, 4, 4), True)
    assert data.latent(11).shape == (2, 4, 4, 4)
    assert (data.latent(11)[1] > 0).all()


def test_progress_counts_the_samples_of_this_call(images, tmp_path):
    reports: list[tuple[int, int | None]] = []
    encode(
        images, tmp_path, config=CONFIG, progress=lambda done, total: reports.append((done, total))
    )
    assert reports == [(4, 12), (8, 12), (12, 12)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 0), ("batch_size", 0), ("max_rejected", 1.5), ("precision", "fp8"), ("workers", -1)],
)
def test_invalid_options_are_errors(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        EncodeConfig(**{field: value})


def test_a_member_that_is_not_an_array_is_an_error():
    with pytest.raises(ValueError, match="not a .npy file"):
        npy_view(b"no array, but long enough")
