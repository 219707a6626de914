"""Bad input of `miro annotate`: an error before work starts, or rejected samples."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.corrupt import NOISE_PNG, encoded, noise
from helpers.full_disk import mounted
from PIL import Image
from torch import Tensor

from miro.data.shards import Manifest, read_scores, verify
from miro.prepare.annotate import AnnotateConfig, annotate

SMALL = AnnotateConfig(batch_size=4, samples_per_shard=5, workers=1)


def write_pair(folder: Path, name: str, image: bytes, caption: bytes | None = b"a caption") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(image)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_bytes(caption)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reasons(dest: Path) -> dict[str, tuple[str, str]]:
    """{source: (field, reason)} of rejected.jsonl; fails if a source is rejected twice."""
    lines = [json.loads(line) for line in (dest / "rejected.jsonl").read_text().splitlines()]
    assert len({(line["source"], line["field"]) for line in lines}) == len(lines)
    return {line["source"]: (line["field"], line["reason"]) for line in lines}


class Scores:
    """A reward of the image alone with a given function."""

    model = "a test"
    reads_caption = False
    range = (0.0, 1.0)

    def __init__(self, name: str, give: Callable[[Tensor], float]):
        self.name, self._give = name, give

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return torch.tensor([self._give(image) for image in images])


# --- sources that cannot be read at all --------------------------------------------------------


def test_an_unusable_source_raises_and_writes_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no images here")
    (empty / ".hidden.png").write_bytes(NOISE_PNG)
    write_pair(tmp_path / "in", "a.png", NOISE_PNG)
    encoded_set = tmp_path / "encoded"
    encoded_set.mkdir()
    Manifest("encoded", ("original",), ()).write(encoded_set)
    both = tmp_path / "both"
    write_pair(both, "a.png", NOISE_PNG)
    write_tar(both / "a.tar", [])
    cases = [
        (tmp_path / "absent", ["sharpness"], "absent: no such file or folder"),
        (empty, ["sharpness"], r"no images found.*1 other files.*\.jpg"),
        (empty / "notes.txt", ["sharpness"], r"neither a folder nor a \.tar"),
        (both, ["sharpness"], "both tars and images"),
        (encoded_set, ["sharpness"], "encoded already"),
        (tmp_path / "in", ["colorfulness"], "did you mean 'colourfulness'"),
        (tmp_path / "in", ["sharpness", "sharpness"], "twice"),
    ]
    for source, rewards, message in cases:
        with pytest.raises(ValueError, match=message):
            annotate(source, tmp_path / "out", rewards=rewards)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must not be SOURCE"):
        annotate(tmp_path / "in", tmp_path / "in", rewards=["sharpness"])
    with pytest.raises(ValueError, match="is a file"):
        annotate(tmp_path / "in", tmp_path / "in" / "a.png", rewards=["sharpness"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"samples_per_shard": 0},
        {"max_rejected_after": 0},
        {"max_rejected": 1.5},
        {"workers": -1},
    ],
)
def test_an_invalid_configuration_raises(wrong: dict[str, Any]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{field} must be.*{value}"):
        AnnotateConfig(**wrong)


def test_shards_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a.png", NOISE_PNG)
    precious = tmp_path / "out" / "shards" / "00000.tar"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(ValueError, match="has shards but no manifest"):
        annotate(tmp_path / "in", tmp_path / "out", rewards=["sharpness"])
    assert precious.read_bytes() == b"precious"


# --- bad samples among good ones ---------------------------------------------------------------


def test_bad_samples_of_a_folder_are_rejected_and_the_others_annotated(tmp_path: Path) -> None:
    source, dest = tmp_path / "in", tmp_path / "out"
    for number in range(8):
        write_pair(source, f"good {number}.png", NOISE_PNG, b"\xef\xbb\xbf a good one \n")
    write_pair(source, "cut.png", NOISE_PNG[:50])
    write_pair(source, "html.jpg", b"<html>not found</html>")
    write_pair(source, "zero.webp", b"")
    write_pair(source, "no caption.png", NOISE_PNG, None)
    write_pair(source, "empty caption.png", NOISE_PNG, b" \n\t ")
    write_pair(source, "latin1 caption.png", NOISE_PNG, "gr\xfcn".encode("latin-1"))
    write_pair(source, "long caption.png", NOISE_PNG, b"x" * (2**20 + 1))
    (source / "folder.png").mkdir()
    (source / "loop.png").symlink_to("loop.png")
    os.mkfifo(source / "pipe.png")
    summary = annotate(source, dest, rewards=["sharpness"], config=SMALL)
    verify(dest)
    assert (summary.samples, summary.rejected, summary.processed) == (8, 9, 17)
    found = reasons(dest)
    for name, field, message in [
        ("cut.png", "image", "cut short"),
        ("html.jpg", "image", "HTML"),
        ("zero.webp", "image", "empty"),
        ("no caption.png", "caption", "no caption.txt is missing"),
        ("empty caption.png", "caption", "empty"),
        ("latin1 caption.png", "caption", "not UTF-8 (byte 0xfc at 2)"),
        ("long caption.png", "caption", "too large"),
        ("loop.png", "image", "link to itself"),
        ("pipe.png", "image", "not a regular file"),
    ]:
        assert found[name][0] == field and message in found[name][1], found[name]
    before = (dest / "rejected.jsonl").read_bytes()
    assert annotate(source, dest, rewards=["sharpness"], config=SMALL).rejected == 9
    assert (dest / "rejected.jsonl").read_bytes() == before


def test_bad_samples_of_a_tar_are_rejected_and_the_others_annotated(tmp_path: Path) -> None:
    some = {"original": "good", "long": "", "other": 7, "half": "\ud800"}
    tar = write_tar(
        tmp_path / "in.tar",
        [
            ("a.png", NOISE_PNG),
            ("a.txt", b"good"),
            ("b.png", NOISE_PNG),
            ("c.txt", b"no image"),
            ("d.png", NOISE_PNG),
            ("d.json", b'{"captions": '),
            ("e.png", NOISE_PNG),
            ("e.json", b"[" * 100_000),
            ("f.png", NOISE_PNG),
            ("f.json", json.dumps({"captions": some}).encode()),
            ("g.png", NOISE_PNG),
            ("g.json", b'{"captions": {"original": ""}}'),
            ("h.png", NOISE_PNG),
            ("h.txt", b"good"),
            ("h.png", NOISE_PNG),
            ("h.txt", b"the same name again"),
            ("i.png", b"<html>"),
            ("i.txt", b"good"),
        ],
    )
    annotate(tar, tmp_path / "out", rewards=["sharpness"], config=SMALL)
    table = read_scores(tmp_path / "out")
    assert table.keys == ["a", "f", "h", "h-2"]
    assert table.captions == ["original"] * 4
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    found = {(json.loads(line)["source"], json.loads(line)["field"]): line for line in lines}
    assert len(found) == len(lines) == 9
    for key, field, message in [
        ("b", "caption", "no .txt"),
        ("c", "image", "no image"),
        ("d", "caption", "is not JSON"),
        ("e", "caption", "nested too deeply"),
        ("f", "captions.long", "empty"),
        ("f", "captions.other", "must be text, got int"),
        ("f", "captions.half", "surrogate"),
        ("g", "caption", "empty"),
        ("i", "image", "HTML"),
    ]:
        assert message in found[f"in.tar:{key}", field]


def test_complete_samples_of_a_truncated_tar_and_the_next_tar_are_annotated(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    members = [(f"{i}.{e}", d) for i in range(7) for e, d in [("png", NOISE_PNG), ("txt", b"x")]]
    for number in range(2):
        write_tar(source / f"{number}.tar", members)
    (source / "2.tar").write_bytes(b"")
    data = (source / "0.tar").read_bytes()
    (source / "0.tar").write_bytes(data[: data.index(b"6.png") + 700])
    summary = annotate(source, tmp_path / "out", rewards=["sharpness"], config=SMALL)
    assert summary.samples == 5 + 7
    assert "the last complete sample is '4'" in reasons(tmp_path / "out")["0.tar"][1]
    assert reasons(tmp_path / "out")["2.tar"] == ("shard", "the file is empty")
    verify(tmp_path / "out")


def test_unsafe_tar_members_are_rejected_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(NOISE_PNG)
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name in ["a.png", "../b.png", "/c.png"]:
            for member, data in [(name, NOISE_PNG), (name.replace(".png", ".txt"), b"x")]:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        tar.addfile(link)
        text = tarfile.TarInfo("d.txt")
        tar.addfile(text)
    config = AnnotateConfig(workers=1)
    annotate(tmp_path / "in.tar", tmp_path / "out", rewards=["sharpness"], config=config)
    assert read_scores(tmp_path / "out").keys == ["a"]
    found = reasons(tmp_path / "out")
    assert "outside" in found["in.tar:../b.png"][1] and "outside" in found["in.tar:/c.png"][1]
    assert "regular file" in found["in.tar:d.png"][1]
    assert not (tmp_path / "b.png").exists()


def test_a_missing_score_is_stored_as_nan_and_a_sample_without_scores_is_rejected(
    tmp_path: Path,
) -> None:
    for number, colour in enumerate(["black", "white", "red"]):
        write_pair(tmp_path / "in", f"{number}.png", encoded(Image.new("RGB", (4, 4), colour)))
    rewards = [
        Scores("first", lambda image: 0.5 if image.sum() else math.nan),
        Scores("second", lambda image: 0.5 if image.min() == 255 else math.inf),
    ]
    annotate(tmp_path / "in", tmp_path / "out", rewards=rewards, config=SMALL)
    table = read_scores(tmp_path / "out")
    assert table.keys == ["1", "2"]
    np.testing.assert_array_equal(table.values, np.array([[0.5, 0.5], [0.5, np.nan]], np.float32))
    assert reasons(tmp_path / "out") == {"0.png": ("scores", "every reward gave NaN")}


def test_a_reward_with_a_wrong_number_of_scores_raises(tmp_path: Path) -> None:
    class Wrong(Scores):
        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            return torch.zeros(len(images) + 1)

    write_pair(tmp_path / "in", "a.png", NOISE_PNG)
    with pytest.raises(ValueError, match=r"'wrong' returned scores of shape \(2,\) for 1 pairs"):
        annotate(tmp_path / "in", tmp_path / "out", rewards=[Wrong("wrong", lambda _: 0.0)])


def test_a_bad_image_in_a_dataset_folder_has_nan_scores(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a.png", NOISE_PNG)
    write_pair(tmp_path / "in", "b.png", encoded(Image.new("RGB", (4, 4), "red")))
    annotate(tmp_path / "in", tmp_path / "a", rewards=[], config=SMALL)
    tar = tmp_path / "a" / "shards" / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX", 1))
    for _ in range(2):
        annotate(tmp_path / "a", tmp_path / "b", rewards=["sharpness"], config=SMALL)
        assert np.isnan(read_scores(tmp_path / "b").values[:, 0]).tolist() == [True, False]
        assert list(reasons(tmp_path / "b")) == ["00000.tar:a"]
    tar.unlink()
    with pytest.raises(ValueError, match=r"00000.tar: no such file"):
        annotate(tmp_path / "a", tmp_path / "c", rewards=["sharpness"], config=SMALL)


def test_annotate_stops_above_the_allowed_share_of_rejected_samples(tmp_path: Path) -> None:
    for number in range(20):
        write_pair(tmp_path / "in", f"{number:02d}.png", NOISE_PNG if number < 12 else b"")
    for share, after, stops in [(0.3, 10, True), (0.3, 100, False), (0.5, 10, False)]:
        dest = tmp_path / f"{share} {after}"
        config = AnnotateConfig(4, 5, max_rejected=share, max_rejected_after=after, workers=1)
        if stops:
            with pytest.raises(ValueError, match=r"7 of the first 19.*max_rejected=0\.3.*empty"):
                annotate(tmp_path / "in", dest, rewards=["sharpness"], config=config)
            assert Manifest.read(dest).samples == 12
            assert len(reasons(dest)) == 7
        else:
            summary = annotate(tmp_path / "in", dest, rewards=["sharpness"], config=config)
            assert (summary.samples, summary.rejected) == (12, 8)


def test_a_source_without_a_usable_sample_raises(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a.png", b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of its samples.*rejected.jsonl.*new folder"):
            annotate(tmp_path / "in", tmp_path / "out", rewards=["sharpness"], config=SMALL)
    assert len(reasons(tmp_path / "out")) == 1


def test_an_incomplete_last_line_of_the_log_is_written_again(tmp_path: Path) -> None:
    write_pair(tmp_path / "in", "a.png", b"")
    write_pair(tmp_path / "in", "b.png", NOISE_PNG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rejected.jsonl").write_text('{"source": "a.pn')
    annotate(tmp_path / "in", tmp_path / "out", rewards=["sharpness"], config=SMALL)
    assert reasons(tmp_path / "out") == {"a.png": ("image", "the file is empty")}


# --- the disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_keeps_complete_shards_and_annotate_resumes_with_more_space(
    tmp_path: Path, small_disk: Path
) -> None:
    for number in range(20):
        image = encoded(noise(200, 150 + number), "BMP") if number % 5 else b"broken"
        write_pair(tmp_path / "in", f"{number:02d}.bmp", image)
    dest = small_disk / "out"
    with pytest.raises(OSError, match=r"no space left.*bytes are needed.*are free") as error:
        annotate(tmp_path / "in", dest, rewards=["sharpness"], config=SMALL)
    assert error.value.errno == errno.ENOSPC
    assert not list(dest.rglob("*.partial"))
    verify(dest)
    complete = Manifest.read(dest).samples
    assert 0 < complete < 16
    assert len(read_scores(dest).keys) == complete
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    annotate(tmp_path / "in", dest, rewards=["sharpness"], config=SMALL)
    annotate(tmp_path / "in", tmp_path / "uninterrupted", rewards=["sharpness"], config=SMALL)
    for path in (tmp_path / "uninterrupted").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "uninterrupted")
            assert (dest / name).read_bytes() == path.read_bytes()
