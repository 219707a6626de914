"""Annotate ten thousand images, one in a hundred of an unusual or invalid format."""

import hashlib
import io
import os
import random
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folders import file_contents, rejected_lines
from helpers.images import CAPTION, ODD_SAMPLES, jpeg
from helpers.kill import PROCESSES
from torch import Tensor

from miro.data.shards import Manifest, read_scores, shard_path, verify
from miro.images.pillow import decode
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.rewards.pixels import Colourfulness
from miro.sources.tar import iterate_shard

TARS, EACH = 40, 250
CONFIG = AnnotateConfig(samples_per_shard=EACH, workers=1)


def odd_format(number: int) -> str | None:
    """The format of every hundredth image, a key of ODD_SAMPLES; None for a plain JPEG."""
    return None if number % 100 else list(ODD_SAMPLES)[number // 100 % len(ODD_SAMPLES)]


def write_tars(folder: Path) -> None:
    folder.mkdir()
    for tar_number in range(TARS):
        with tarfile.open(folder / f"{tar_number:02d}.tar", "w") as tar:
            for number in range(tar_number * EACH, (tar_number + 1) * EACH):
                name = odd_format(number)
                odd = ODD_SAMPLES[name] if name else None
                extension, make, caption, _ = odd or ("jpg", jpeg, CAPTION, None)
                for ending, data in ((extension, make(number)), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Recording(Colourfulness):
    """Appends the hash of every image it scores to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        names = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in images]
        with open(self.path, "a") as file:
            file.write("".join(f"{name}\n" for name in names))
        return super().score(images, captions)


def annotate_recorded(source: Path, dest: Path, record: Path) -> None:
    annotate(source, dest, rewards=[Recording(record), "sharpness"], config=CONFIG)


@pytest.mark.long
def test_valid_images_are_scored_and_invalid_ones_listed_once_after_ten_kills(
    tmp_path: Path,
) -> None:
    source, dest, whole = tmp_path / "in", tmp_path / "killed", tmp_path / "whole"
    write_tars(source)
    started = time.monotonic()
    annotate_recorded(source, whole, tmp_path / "whole.txt")
    seconds = time.monotonic() - started
    generator = random.Random(1)

    kills = 0
    while kills < 10:
        run = PROCESSES.Process(
            target=partial(annotate_recorded, source, dest, tmp_path / "killed.txt")
        )
        run.start()
        run.join(generator.uniform(0.2, 0.5 + seconds / 10))
        assert run.is_alive(), f"done after {kills} kills: kill earlier"
        os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
        kills += 1
    annotate_recorded(source, dest, tmp_path / "killed.txt")

    assert file_contents(dest) == file_contents(whole)
    verify(dest)
    bad = {
        number: reason
        for number in range(TARS * EACH)
        if (name := odd_format(number)) and (reason := ODD_SAMPLES[name][3])
    }
    rejected = rejected_lines(dest)
    assert {int(line["source"].split(":")[1]) for line in rejected} == bad.keys()
    assert len(rejected) == len(bad) == 52
    for line in rejected:
        assert bad[int(line["source"].split(":")[1])] in line["reason"], line
    table = read_scores(dest)
    assert len(set(table.keys)) == len(table.keys) == TARS * EACH - len(bad)
    assert np.isfinite(table.values).all()
    # A kill loses the shard in progress; no finished one is scored again.
    counted = Counter((tmp_path / "killed.txt").read_text().split())
    assert sum(counted.values()) <= len(table.keys) + kills * EACH
    assert set(counted) == set((tmp_path / "whole.txt").read_text().split())


@pytest.mark.long
def test_unusual_formats_are_decoded_upright(tmp_path: Path) -> None:
    write_tars(tmp_path / "in")
    dest = tmp_path / "out"

    annotate(tmp_path / "in", dest, rewards=["colourfulness"], config=CONFIG)

    shapes = {}
    for shard in Manifest.read(dest).shards:
        for key, members in iterate_shard(shard_path(dest, shard)):
            number = int(key.split("_")[-1])
            if name := odd_format(number):
                image = next(data for member, data in members.items() if member != "json")
                shapes[name] = tuple(decode(image).shape)
    valid = {name for name, (_, _, _, reason) in ODD_SAMPLES.items() if reason is None}
    assert shapes.keys() == valid
    assert shapes.pop("rotated") == (3, 64, 48)
    assert set(shapes.values()) == {(3, 48, 64)}
