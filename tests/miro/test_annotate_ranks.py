"""`annotate` by several ranks writes what one process writes."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.image_folders import dataset_files, encoded_image, write_image_folder
from helpers.multirank import MultiRank
from helpers.sources import write_tar

from miro.conditioning import Bins
from miro.data.shards import Manifest, read_scores, scores_path
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.prepare.work_log import read_completed

CONFIG = AnnotateConfig(batch_size=4, samples_per_shard=5, workers=1, max_rejected_after=1_000)
BOTH = ("colourfulness", "sharpness")


def start_ranks(world: int, source: Path, dest: Path, rewards: tuple[str, ...] = BOTH) -> MultiRank:
    action = partial(annotate, rewards=rewards, config=CONFIG)
    return MultiRank(world, dest.with_name(f"{dest.name}-logs"), source, dest, action=action)


def test_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 47)
    annotate(source, tmp_path / "one", rewards=BOTH, config=CONFIG)

    codes = start_ranks(3, source, tmp_path / "three").wait()

    assert codes == [0, 0, 0]
    assert dataset_files(tmp_path / "three") == dataset_files(tmp_path / "one")


def test_tars_are_divided_and_their_shards_are_in_order(tmp_path: Path) -> None:
    for tar in range(4):
        samples = [
            (f"{i:03d}", {"png": encoded_image(i), "txt": f"{tar} {i}".encode()})
            for i in range(tar * 6)
        ]
        write_tar(tmp_path / "in" / f"{tar}.tar", samples)
    annotate(tmp_path / "in", tmp_path / "one", rewards=BOTH, config=CONFIG)

    codes = start_ranks(2, tmp_path / "in", tmp_path / "two").wait()

    assert codes == [0, 0]
    assert dataset_files(tmp_path / "two") == dataset_files(tmp_path / "one")
    names = [Path(shard.name).stem for shard in Manifest.read(tmp_path / "two").shards]
    assert names == sorted(names) and "00003-003" in names


def test_ranks_may_run_one_after_the_other(tmp_path: Path) -> None:
    """As the tasks of a job array do; the last one completes the manifest, whichever it is."""
    source = write_image_folder(tmp_path / "in", 23)
    annotate(source, tmp_path / "one", rewards=BOTH, config=CONFIG)
    listed = []

    for rank in (2, 0, 1):
        before = dict(os.environ)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
        try:
            annotate(source, tmp_path / "three", rewards=BOTH, config=CONFIG)
        finally:
            os.environ.clear()
            os.environ.update(before)
        listed.append(len(Manifest.read(tmp_path / "three").shards))

    assert listed == [0, 1, 5]
    assert dataset_files(tmp_path / "three") == dataset_files(tmp_path / "one")


def test_killed_ranks_are_resumed_by_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    source = write_image_folder(tmp_path / "in", 61)
    annotate(source, tmp_path / "one", rewards=BOTH, config=CONFIG)
    generator = random.Random(0)
    dest = tmp_path / "many"

    for world in (3, 2, 4):
        together = start_ranks(world, source, dest)
        time.sleep(generator.uniform(0.1, 0.6))
        for process in together.ranks:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGKILL)
        together.wait()
    before = {path: path.stat().st_mtime_ns for path in dest.glob("completed/*.json")}
    codes = start_ranks(2, source, dest).wait()

    assert codes == [0, 0]
    assert dataset_files(dest) == dataset_files(tmp_path / "one")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "written twice"


def test_ranks_add_a_reward_to_existing_shards(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 31)
    annotate(source, tmp_path / "one", rewards=BOTH, config=CONFIG)
    annotate(source, tmp_path / "two", rewards=("colourfulness",), config=CONFIG)
    tables = [scores_path(tmp_path / "two", s) for s in Manifest.read(tmp_path / "two").shards]
    before = [table.read_bytes() for table in tables]

    codes = start_ranks(2, tmp_path / "two", tmp_path / "two").wait()

    assert codes == [0, 0]
    assert dataset_files(tmp_path / "two") == dataset_files(tmp_path / "one")
    assert all(a != b.read_bytes() for a, b in zip(before, tables, strict=True))


def test_two_processes_of_one_rank_are_an_error(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 400)
    first = start_ranks(2, source, tmp_path / "out")
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("completed/*")) and time.monotonic() < deadline:
        time.sleep(0.01)

    with pytest.raises(ValueError, match="another process is writing this folder"):
        annotate(source, tmp_path / "out", rewards=BOTH, config=CONFIG)

    assert first.wait() == [0, 0]


@pytest.mark.parametrize("damage", [lambda text: text[:20], lambda text: '{"shard": null}'])
def test_a_damaged_record_is_named_with_the_remedy(
    tmp_path: Path, damage: Callable[[str], str]
) -> None:
    source = write_image_folder(tmp_path / "in", 12)
    annotate(source, tmp_path / "out", rewards=BOTH, config=CONFIG)
    path = tmp_path / "out" / "completed" / "00001.json"
    path.write_text(damage(path.read_text()))

    with pytest.raises(ValueError, match=r"00001\.json: not a record .*delete it and run again"):
        read_completed(tmp_path / "out", "00001.tar")


def test_bins_do_not_depend_on_the_shards_or_their_order(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "in", 60)
    fitted = []
    for name, size in (("one", 1_000), ("many", 2)):
        config = AnnotateConfig(samples_per_shard=size, workers=1)
        annotate(source, tmp_path / name, rewards=BOTH, config=config)
        table = read_scores(tmp_path / name)
        fitted.append(Bins.fit(table.values, table.rewards, 8))
        fitted.append(Bins.fit(table.values[::-1], table.rewards, 8))

    assert len(Manifest.read(tmp_path / "many").shards) == 30
    assert all(bins == fitted[0] for bins in fitted)


def test_scores_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    source, dest = write_image_folder(tmp_path / "in", 12), tmp_path / "out"
    annotate(source, dest, rewards=["sharpness"], config=CONFIG)
    manifest = json.loads((dest / "manifest.json").read_text())
    manifest["source"]["models"]["sharpness"] = "an older measure"
    (dest / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ValueError, match="scored by an older measure, not by edges over noise"):
        annotate(source, dest, rewards=["sharpness"], config=CONFIG)
