"""Ten thousand images as the web has them: one in a hundred is odd or broken, in twelve ways."""

import hashlib
import io
import json
import os
import random
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.corrupt import bomb, encoded
from helpers.kill import PROCESSES
from PIL import Image
from torch import Tensor

from miro.data.shards import Manifest, read_scores, shard_path, verify
from miro.images.pillow import decode
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.rewards.pixels import Colourfulness
from miro.sources.tar import iterate_shard

TARS, EACH = 40, 250
CONFIG = AnnotateConfig(samples_per_shard=EACH, workers=1)


def photograph(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def jpeg(number: int, **options: object) -> bytes:
    return encoded(photograph(number), "JPEG", **options)


def _cmyk(number: int) -> bytes:
    return encoded(photograph(number).convert("CMYK"), "JPEG")


def _deep(number: int) -> bytes:
    grey = np.asarray(photograph(number).convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def _animated(number: int) -> bytes:
    more = [photograph(number + 1), photograph(number + 2)]
    return encoded(photograph(number), "GIF", save_all=True, append_images=more)


def _rotated(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(number, exif=exif.tobytes())


def _alpha(number: int) -> bytes:
    image = photograph(number)
    image.putalpha(128)
    return encoded(image, "PNG")


CAPTION = b"an image"
# (extension, image, caption, what rejected.jsonl says, None where the image is good)
Odd = tuple[str, Callable[[int], bytes], bytes, str | None]
ODD: dict[str, Odd] = {
    "truncated": ("jpg", lambda n: jpeg(n)[:-200], CAPTION, "cut short"),
    "zero bytes": ("jpg", lambda n: bytes(3000), CAPTION, "zero bytes"),
    "a web page": ("jpg", lambda n: b"<!DOCTYPE html><p>404", CAPTION, "HTML page"),
    "huge": ("png", lambda n: bomb(100_000), CAPTION, "more than 64,000,000 pixels"),
    "empty caption": ("jpg", jpeg, b"  \n", "caption is empty"),
    "not UTF-8": ("jpg", jpeg, b"caf\xe9", "not UTF-8"),
    "CMYK": ("jpg", _cmyk, CAPTION, None),
    "16 bits": ("png", _deep, CAPTION, None),
    "animated": ("gif", _animated, CAPTION, None),
    "rotated": ("jpg", _rotated, CAPTION, None),
    "grey": ("jpg", lambda n: encoded(photograph(n).convert("L"), "JPEG"), CAPTION, None),
    "alpha": ("png", _alpha, CAPTION, None),
}


def odd(number: int) -> str | None:
    """Every hundredth image is odd, the ways in turn."""
    return None if number % 100 else list(ODD)[number // 100 % len(ODD)]


def write_tars(folder: Path) -> None:
    folder.mkdir()
    for tar_number in range(TARS):
        with tarfile.open(folder / f"{tar_number:02d}.tar", "w") as tar:
            for number in range(tar_number * EACH, (tar_number + 1) * EACH):
                way = odd(number)
                extension, make, caption, _ = ODD[way] if way else ("jpg", jpeg, CAPTION, None)
                for ending, data in ((extension, make(number)), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Recording(Colourfulness):
    """Notes every image it scores, in a file that outlives its process."""

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


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.long
def test_every_good_image_is_scored_once_and_every_bad_one_listed_however_often_killed(
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
        assert run.is_alive(), f"done after {kills} kills: make the moments earlier"
        os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
        kills += 1
    annotate_recorded(source, dest, tmp_path / "killed.txt")

    assert contents(dest) == contents(whole)
    verify(dest)
    bad = {n: says for n in range(TARS * EACH) if (w := odd(n)) and (says := ODD[w][3])}
    listed = [json.loads(line) for line in (dest / "rejected.jsonl").read_text().splitlines()]
    assert {int(line["source"].split(":")[1]) for line in listed} == bad.keys()
    assert len(listed) == len(bad) == 52
    for line in listed:
        assert bad[int(line["source"].split(":")[1])] in line["reason"], line
    table = read_scores(dest)
    assert len(set(table.keys)) == len(table.keys) == TARS * EACH - len(bad)
    assert np.isfinite(table.values).all()
    # What a kill costs is the unit under way: no finished one is scored again.
    counted = Counter((tmp_path / "killed.txt").read_text().split())
    assert sum(counted.values()) <= len(table.keys) + kills * EACH
    assert set(counted) == set((tmp_path / "whole.txt").read_text().split())


@pytest.mark.long
def test_odd_images_are_scored_as_what_a_person_sees(tmp_path: Path) -> None:
    write_tars(tmp_path / "in")
    dest = tmp_path / "out"

    annotate(tmp_path / "in", dest, rewards=["colourfulness"], config=CONFIG)

    shapes = {}
    for shard in Manifest.read(dest).shards:
        for key, members in iterate_shard(shard_path(dest, shard)):
            number = int(key.split("_")[-1])
            if way := odd(number):
                image = next(data for name, data in members.items() if name != "json")
                shapes[way] = tuple(decode(image).shape)
    good = {way for way, (_, _, _, says) in ODD.items() if says is None}
    assert shapes.keys() == good
    assert shapes.pop("rotated") == (3, 64, 48)
    assert set(shapes.values()) == {(3, 48, 64)}
