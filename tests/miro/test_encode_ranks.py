"""`encode` by several ranks writes what one process writes."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.image_folders import dataset_files, write_image_folder
from helpers.multirank import MultiRank

from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.prepare.encode import EncodeConfig, encode
from miro.prepare.work_log import read_completed_from

CONFIG = EncodeConfig(size=8, batch_size=4, workers=1, max_rejected=0.5)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    config = AnnotateConfig(samples_per_shard=5, workers=1)
    annotate(
        write_image_folder(root / "in", 47), root / "scored", rewards=["sharpness"], config=config
    )
    return root / "scored"


def start_ranks(world: int, source: Path, dest: Path) -> MultiRank:
    """Also for one rank: results depend on the number of threads of a process."""
    action = partial(encode, config=CONFIG)
    return MultiRank(world, dest.with_name(f"{dest.name}-logs"), source, dest, action=action)


def test_ranks_encode_what_one_process_encodes(scored: Path, tmp_path: Path) -> None:
    assert start_ranks(1, scored, tmp_path / "one").wait() == [0]

    codes = start_ranks(3, scored, tmp_path / "three").wait()

    assert codes == [0, 0, 0]
    assert dataset_files(tmp_path / "three") == dataset_files(tmp_path / "one")
    assert EncodedDataset(tmp_path / "three").rewards == ("sharpness",)


def test_a_rank_may_have_no_shard(tmp_path: Path) -> None:
    config = AnnotateConfig(samples_per_shard=100, workers=1)
    source = write_image_folder(tmp_path / "in", 12)
    annotate(source, tmp_path / "one", rewards=["sharpness"], config=config)

    codes = start_ranks(3, tmp_path / "one", tmp_path / "three").wait()

    assert codes == [0, 0, 0]
    assert EncodedDataset(tmp_path / "three").rewards == ("sharpness",)


def test_killed_ranks_are_resumed_by_another_number_of_ranks(scored: Path, tmp_path: Path) -> None:
    dest, generator = tmp_path / "many", random.Random(3)
    assert start_ranks(1, scored, tmp_path / "one").wait() == [0]

    for world in (3, 2):
        together = start_ranks(world, scored, dest)
        time.sleep(generator.uniform(0.5, 2.0))
        for process in together.ranks:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGKILL)
        together.wait()
    before = {path: path.stat().st_mtime_ns for path in dest.glob("completed/*.json")}
    codes = start_ranks(2, scored, dest).wait()

    assert codes == [0, 0]
    assert dataset_files(dest) == dataset_files(tmp_path / "one")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "encoded twice"


def test_an_added_reward_reaches_the_shards_of_all_ranks(scored: Path, tmp_path: Path) -> None:
    source = tmp_path / "scored"
    annotate(scored, source, rewards=[])
    assert start_ranks(2, source, tmp_path / "two").wait() == [0, 0]
    annotate(source, source, rewards=["colourfulness"])

    codes = start_ranks(2, source, tmp_path / "two").wait()

    assert codes == [0, 0]
    manifest = Manifest.read(tmp_path / "two")
    assert manifest.rewards == ("colourfulness", "sharpness")
    assert manifest.source["models"].keys() == {"colourfulness", "sharpness"}


def test_a_record_of_another_source_shard_is_ignored(scored: Path, tmp_path: Path) -> None:
    encode(scored, tmp_path / "one", config=CONFIG)
    first, second = Manifest.read(scored).shards[:2]
    (tmp_path / "one" / "completed" / "00000.json").write_bytes(
        (tmp_path / "one" / "completed" / "00001.json").read_bytes()
    )

    assert read_completed_from(tmp_path / "one", first) is None
    assert read_completed_from(tmp_path / "one", second) is not None
