"""`annotate` of folders, tars and datasets, and its resume after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.image_folders import encoded_image, file_contents, rejected_lines, write_image_folder
from helpers.sources import write_tar
from torch import Tensor

from miro.data.shards import Manifest, read_scores, verify
from miro.images.pillow import decode
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.rewards.pixels import Colourfulness, Sharpness
from miro.sources.tar import iterate_shard
from miro.utils.locks import exclusive_lock

SMALL = AnnotateConfig(batch_size=4, samples_per_shard=5, workers=1)


class CaptionLength:
    """A reward of the caption that counts the pairs it scored."""

    name = "caption_length"
    model = "a test"
    reads_caption = True
    range = (0.0, 100.0)

    def __init__(self) -> None:
        self.scored = 0

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        assert len(images) == len(captions)
        self.scored += len(images)
        return torch.tensor([float(len(caption)) for caption in captions])


class Brightness(CaptionLength):
    """A reward of the image alone that counts the images it scored."""

    name = "brightness"
    model = "a test"
    reads_caption = False

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        super().score(images, captions)
        return torch.stack([image.float().mean() for image in images])


def rows_of(folder: Path) -> dict[tuple[str, str], Any]:
    table = read_scores(folder)
    return {
        (key, caption_type): values.tolist()
        for key, caption_type, values in zip(table.keys, table.captions, table.values, strict=True)
    }


def test_shards_have_the_files_captions_and_scores_of_a_folder(tmp_path: Path) -> None:
    source, dest = write_image_folder(tmp_path / "in"), tmp_path / "out"
    summary = annotate(source, dest, rewards=["sharpness", "colourfulness"], config=SMALL)
    verify(dest)
    manifest = Manifest.read(dest)
    assert (manifest.kind, manifest.captions) == ("images", ("original",))
    assert manifest.rewards == ("colourfulness", "sharpness")
    assert (manifest.samples, summary.samples, summary.rejected) == (10, 10, 2)
    assert [shard.samples for shard in manifest.shards] == [4, 5, 1]
    assert summary.processed == 12
    assert summary.images_per_second > 0
    rows, keys = rows_of(dest), []
    for shard in manifest.shards:
        for key, members in iterate_shard(dest / "shards" / shard.name):
            json_member = json.loads(members.pop("json"))
            ((extension, data),) = members.items()
            number = int(key.removeprefix("part_0_").removeprefix("part_1_"))
            file = source / f"part {number % 2}" / f"{number:03d}.{extension}"
            assert data == file.read_bytes()
            assert json_member == {"captions": {"original": f"image number {number}"}}
            image = decode(data)
            expected = [r.score([image], ["x"]).item() for r in (Colourfulness(), Sharpness())]
            assert rows[key, "original"] == expected
            keys.append(key)
    assert keys == sorted(keys) and len(keys) == len(rows) == 10
    assert [line["source"] for line in rejected_lines(dest)] == [
        "part 0/004.jpeg",
        "part 1/009.png",
    ]


def test_keys_of_similar_file_names_are_unique(tmp_path: Path) -> None:
    names = ["a/b.png", "a.b.png", "a_b.png", "a_b.gif", "ä_b.png", "a_b-2.png"]
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(number, path.suffix[1:].upper()))
        path.with_suffix(".txt").write_text(name)
    long = tmp_path / "in" / ("z" * 200 + ".png")
    long.write_bytes(encoded_image(9))
    long.with_suffix(".txt").write_text("long")
    annotate(tmp_path / "in", tmp_path / "out", rewards=["sharpness"], config=SMALL)
    keys = read_scores(tmp_path / "out").keys
    assert len(set(keys)) == 7
    assert all(key.isascii() and len(key) < 80 and not set(key) & set("./") for key in keys)


def test_all_caption_types_and_json_fields_of_tars_are_copied(tmp_path: Path) -> None:
    captions = {"original": "a cat", "synthetic": "a very small cat"}
    more = json.dumps({"captions": captions, "width": 9}).encode()
    write_tar(
        tmp_path / "in" / "x-0.tar",
        [
            ("0", {"jpg": encoded_image(0, "JPEG"), "txt": b"one"}),
            ("1", {"webp": encoded_image(1, "WEBP"), "json": more}),
        ],
    )
    write_tar(
        tmp_path / "in" / "x-1.tar",
        [("0", {"PNG": encoded_image(2), "json": b'{"caption":"two"}'})],
    )
    lengths, bright = CaptionLength(), Brightness()
    dest = tmp_path / "out"
    annotate(tmp_path / "in", dest, rewards=[lengths, bright, "sharpness"], config=SMALL)
    rows = rows_of(dest)
    table = read_scores(dest)
    assert table.rewards == ("sharpness", "brightness", "caption_length")
    assert {key: values[2] for key, values in rows.items()} == {
        ("00000_0", "original"): 3,
        ("00000_1", "original"): 5,
        ("00000_1", "synthetic"): 16,
        ("00001_0", "original"): 3,
    }
    assert rows["00000_1", "original"][:2] == rows["00000_1", "synthetic"][:2]
    assert (lengths.scored, bright.scored) == (
        4,
        3,
    )  # a reward of the image alone scores each sample once
    manifest = Manifest.read(dest)
    assert manifest.captions == ("original", "synthetic")
    assert [shard.samples for shard in manifest.shards] == [2, 1]
    (_, first), (_, second) = iterate_shard(dest / "shards" / "00000.tar")
    assert json.loads(second["json"]) == {"captions": captions, "width": 9}
    assert first["jpg"] == encoded_image(0, "JPEG")


def test_a_large_tar_is_split_into_shards(tmp_path: Path) -> None:
    samples = [(f"{i:03d}", {"png": encoded_image(i), "txt": b"caption"}) for i in range(12)]
    tar = write_tar(tmp_path / "in.tar", samples)
    annotate(tar, tmp_path / "out", rewards=["sharpness"], config=SMALL)
    assert [shard.samples for shard in Manifest.read(tmp_path / "out").shards] == [5, 5, 2]
    assert read_scores(tmp_path / "out").keys == [key for key, _ in samples]


def test_the_number_of_threads_does_not_change_a_byte(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in")
    for name, workers in [("one", 1), ("three", 3)]:
        config = AnnotateConfig(batch_size=2, samples_per_shard=5, workers=workers)
        annotate(source, tmp_path / name, rewards=["colourfulness"], config=config)
    assert file_contents(tmp_path / "one") == file_contents(tmp_path / "three")


def test_a_second_call_scores_nothing_and_changes_nothing(tmp_path: Path) -> None:
    source, dest, reward = write_image_folder(tmp_path / "in"), tmp_path / "out", Brightness()
    annotate(source, dest, rewards=[reward], config=SMALL)
    before, scored = file_contents(dest), reward.scored
    summary = annotate(source, dest, rewards=[reward], config=SMALL)
    assert (reward.scored, summary.processed, summary.samples) == (scored, 0, 10)
    assert file_contents(dest) == before


def test_only_the_added_reward_is_computed(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in")
    both, later = [Brightness(), CaptionLength()], [Brightness(), CaptionLength()]
    annotate(source, tmp_path / "both", rewards=both, config=SMALL)
    annotate(source, tmp_path / "later", rewards=later[1:], config=SMALL)
    annotate(source, tmp_path / "later", rewards=later, config=SMALL)
    assert file_contents(tmp_path / "later") == file_contents(tmp_path / "both")
    assert [reward.scored for reward in later] == [10, 10]


def test_a_reward_added_to_an_interrupted_run_is_computed_for_all_shards(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in")

    class Stopping(CaptionLength):
        def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
            if self.scored > 5:
                raise KeyboardInterrupt
            return super().score(images, captions)

    with pytest.raises(KeyboardInterrupt):
        annotate(source, tmp_path / "a", rewards=[Stopping()], config=SMALL)
    assert len(Manifest.read(tmp_path / "a").shards) == 1
    rewards = [Brightness(), CaptionLength()]
    annotate(source, tmp_path / "a", rewards=rewards, config=SMALL)
    annotate(source, tmp_path / "b", rewards=[Brightness(), CaptionLength()], config=SMALL)
    assert file_contents(tmp_path / "a") == file_contents(tmp_path / "b")
    assert [reward.scored for reward in rewards] == [10, 6]


def test_a_dataset_is_linked_and_only_scored(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in")
    annotate(source, tmp_path / "a", rewards=["sharpness"], config=SMALL)
    before = file_contents(tmp_path / "a")
    reward = Brightness()
    annotate(tmp_path / "a", tmp_path / "b", rewards=[reward, "sharpness"], config=SMALL)
    assert file_contents(tmp_path / "a") == before
    assert reward.scored == 10
    verify(tmp_path / "b")
    for shard in Manifest.read(tmp_path / "a").shards:
        tar = Path("shards") / shard.name
        assert (tmp_path / "a" / tar).samefile(tmp_path / "b" / tar)
    table = read_scores(tmp_path / "b")
    assert table.rewards == ("sharpness", "brightness")
    np.testing.assert_array_equal(table.values[:, :1], read_scores(tmp_path / "a").values)


def test_a_dataset_without_scores_is_scored_in_place(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in")
    annotate(source, tmp_path / "a", rewards=[], config=SMALL)
    assert Manifest.read(tmp_path / "a").rewards == ()
    annotate(tmp_path / "a", tmp_path / "a", rewards=["sharpness"], config=SMALL)
    annotate(source, tmp_path / "b", rewards=["sharpness"], config=SMALL)
    assert file_contents(tmp_path / "a") == file_contents(tmp_path / "b")


def test_progress_is_reported_up_to_the_total(tmp_path: Path) -> None:
    reports: list[tuple[int, int | None]] = []
    annotate(
        write_image_folder(tmp_path / "in"),
        tmp_path / "out",
        rewards=["sharpness"],
        config=SMALL,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert reports == sorted(reports)
    assert reports[-1] == (12, 12)


def test_a_folder_made_from_another_source_is_unchanged(tmp_path: Path) -> None:
    source, dest = write_image_folder(tmp_path / "in"), tmp_path / "out"
    annotate(source, dest, rewards=["sharpness"], config=SMALL)
    before = file_contents(dest)
    other = write_image_folder(tmp_path / "other", 3)
    dataset = tmp_path / "dataset"
    annotate(other, dataset, rewards=["sharpness"], config=SMALL)
    for wrong, config in [
        (other, SMALL),
        (dataset, SMALL),
        (source, AnnotateConfig(samples_per_shard=4)),
    ]:
        with pytest.raises(ValueError, match="new folder"):
            annotate(wrong, dest, rewards=["sharpness"], config=config)
    assert file_contents(dest) == before


def test_a_locked_folder_is_an_error(tmp_path: Path) -> None:
    source, dest = write_image_folder(tmp_path / "in"), tmp_path / "out"
    with exclusive_lock(dest), pytest.raises(ValueError, match="another process"):
        annotate(source, dest, rewards=["sharpness"], config=SMALL)
    assert annotate(source, dest, rewards=["sharpness"], config=SMALL).samples == 10


KILLED = """
    import itertools, os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from miro.prepare.annotate import AnnotateConfig, annotate
    from miro.rewards.pixels import Colourfulness

    class Slow(Colourfulness):
        def score(self, images, captions):
            time.sleep(0.004)
            return super().score(images, captions)

    def run(dest, kill_at=None, kill_after=None, rewards=()):
        "Annotate in a fork, killed at an event or after a time; True if it finished."
        child = os.fork()
        if child == 0:
            event_count = 0
            def watch(event, arguments):
                nonlocal event_count
                if event in ("os.rename", "os.truncate") or (
                    event == "open" and arguments[1] and set(arguments[1]) & set("wa")
                ):
                    if event_count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    event_count += 1
            if kill_at is not None:
                sys.addaudithook(watch)
            config = AnnotateConfig(2, samples_per_shard=4, workers=1, decoder="pillow")
            annotate(Path(sys.argv[1]), dest, rewards=[Slow(), *rewards], config=config)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0

    def contents(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    root = Path(sys.argv[2])
    assert run(root / "first")
    shutil.copytree(root / "first", root / "both")
    assert run(root / "both", rewards=["sharpness"])
    expected = contents(root / "both")
    kills = 0
    for start, rewards in [(None, []), (root / "first", ["sharpness"])]:
        for event in itertools.count():
            dest = root / f"event-{event}-{len(rewards)}"
            if start is not None:
                shutil.copytree(start, dest)
            if run(dest, kill_at=event, rewards=rewards):
                break
            kills += 1
            assert run(dest, rewards=["sharpness"])
            assert contents(dest) == expected, (event, rewards)
    random.seed(0)
    dest = root / "times"
    for _ in range(6):
        kills += not run(dest, kill_after=random.uniform(0.02, 0.2))
    assert run(dest, rewards=["sharpness"])
    assert contents(dest) == expected
    print(kills)
"""


def test_a_run_killed_at_any_file_operation_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 8)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    script = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(tmp_path / "runs")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert script.returncode == 0, script.stderr
    assert int(script.stdout) > 20, script.stdout  # number of kills
