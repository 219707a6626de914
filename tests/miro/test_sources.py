"""Sources: folders and tars, and their division into groups and partitions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.sources import png, read_all, rejected, usable, write_tar
from torch import Tensor

from miro.data.shards import Manifest, read_scores, verify
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.sources.folder import FolderSource
from miro.sources.source import expand_braces, open_source, shard_name
from miro.sources.tables import TableColumns


def put(path: Path, content: bytes | str | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def captions_in(folder: Path, size: int = 100) -> dict[str, dict[str, str]]:
    return {key: c.captions for key, c in usable(open_source(folder, size)).items()}


# The contract of every source: (function that writes one, its number of groups of 4).


def make_folder(root: Path) -> Path:
    for i in range(11):
        put(root / f"{i % 3}" / f"{i}.png", png(i))
        put(root / f"{i % 3}" / f"{i}.txt", f"image {i}" if i != 5 else "")
    return root


def make_tars(root: Path) -> Path:
    for number, count in enumerate([9, 0, 2]):
        samples = [(f"{i}", {"png": png(i), "txt": b"image"}) for i in range(count)]
        write_tar(root / f"{number}.tar", samples)
    return root


def make_table(root: Path) -> Path:
    lines = [f'../images/{i}.png,"image {i}\nof ""many"", in rows"' for i in range(11)]
    for i in range(11):
        put(root / "images" / f"{i}.png", png(i))
    return put(root / "tables" / "a.csv", "\n".join(["path,caption", *lines]))


def make_parquet(root: Path) -> Path:
    images = [{"bytes": png(i), "path": None} for i in range(11)]
    table = pa.table({"image": images, "text": [f"image {i}" for i in range(11)]})
    root.mkdir()
    pq.write_table(table.slice(0, 7), root / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table.slice(7), root / "train-00001-of-00002.parquet", row_group_size=3)
    return root


EVERY = pytest.mark.parametrize(
    ("make", "groups"), [(make_folder, 3), (make_tars, 3), (make_table, 3), (make_parquet, 3)]
)


@EVERY
def test_groups_are_read_independently_and_contain_each_sample_once(make, groups, tmp_path) -> None:
    path = make(tmp_path / "in")
    expected = read_all(open_source(path, 4))

    items = []
    for group in range(groups):
        source = open_source(path, 4)  # as another process would
        items += [item for part in source.partitions(group) for item in part]

    assert open_source(path, 4).groups == groups
    assert items == expected
    assert len(usable(open_source(path, 4))) >= 10


@EVERY
def test_skipped_partitions_do_not_change_the_others(make, groups, tmp_path) -> None:
    source = open_source(make(tmp_path / "in"), 4)

    for group in range(groups):
        parts = [list(part) for part in source.partitions(group)]
        assert parts
        for skip in range(len(parts) + 1):
            assert [list(part) for part in source.partitions(group, skip)] == parts[skip:]


@EVERY
def test_the_fingerprint_depends_on_the_files_and_the_shard_size(make, groups, tmp_path) -> None:
    path, again = make(tmp_path / "in"), make(tmp_path / "again")

    one = open_source(path, 4).fingerprint
    assert open_source(again, 4).fingerprint == one
    assert open_source(again, 5).fingerprint != one

    if make is make_folder:
        put(again / "more.png", png(0))
    elif make is make_tars:
        write_tar(again / "1.tar", [("0", {"png": png(0), "txt": b"image"})] * 99)
    elif make is make_table:
        again.write_bytes(again.read_bytes() + b"\n../images/0.png,more")
    else:
        (again / "train-00001-of-00002.parquet").unlink()
    assert open_source(again, 4).fingerprint != one


class Interrupting:
    """A reward that raises KeyboardInterrupt after some images."""

    name, model, reads_caption, range = "brightness", "a test", False, (0.0, 255.0)

    def __init__(self, after: int):
        self._left = after

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        self._left -= len(images)
        if self._left < 0:
            raise KeyboardInterrupt
        return torch.stack([image.float().mean() for image in images])


@EVERY
def test_annotate_resumes_to_the_same_bytes_wherever_it_stopped(make, groups, tmp_path) -> None:
    path = make(tmp_path / "in")
    config = AnnotateConfig(batch_size=2, samples_per_shard=4, workers=1)
    annotate(path, tmp_path / "uninterrupted", rewards=[Interrupting(100)], config=config)
    expected = {
        str(file.relative_to(tmp_path / "uninterrupted")): file.read_bytes()
        for file in (tmp_path / "uninterrupted").rglob("*")
        if file.is_file()
    }

    for after in (0, 4, 6, 9):
        dest = tmp_path / f"stopped after {after}"
        with pytest.raises(KeyboardInterrupt):
            annotate(path, dest, rewards=[Interrupting(after)], config=config)
        annotate(path, dest, rewards=[Interrupting(100)], config=config)
        files = (file for file in dest.rglob("*") if file.is_file())
        assert {str(f.relative_to(dest)): f.read_bytes() for f in files} == expected


def test_shards_are_named_by_group_and_partition(tmp_path: Path) -> None:
    path = make_tars(tmp_path / "in")
    config = AnnotateConfig(samples_per_shard=4, workers=1)

    annotate(path, tmp_path / "out", rewards=["sharpness"], config=config)

    verify(tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    names = [shard.name for shard in manifest.shards]
    assert names == ["00000.tar", "00000-001.tar", "00000-002.tar", "00002.tar"]
    assert names == [shard_name(*index) for index in [(0, 0), (0, 1), (0, 2), (2, 0)]]
    assert (tmp_path / "out" / "scores" / "00000-001.parquet").is_file()
    assert read_scores(tmp_path / "out").keys[-2:] == ["00002_0", "00002_1"]


# Folders.


def test_captions_of_a_folder_are_read_from_txt_json_or_both(tmp_path: Path) -> None:
    captions = {"original": "from json", "long": "a longer one"}
    for name in ["a", "b", "c", "d"]:
        put(tmp_path / f"{name}.png", png(0))
    put(tmp_path / "a.txt", "from txt")
    put(tmp_path / "b.json", {"caption": "from json", "width": 5})
    put(tmp_path / "c.txt", "from txt")
    put(tmp_path / "c.json", {"captions": captions})
    put(tmp_path / "d.txt", "from txt")
    put(tmp_path / "d.json", {"captions": ["", "second"], "seen": True})

    source = open_source(tmp_path, 100)
    found = usable(source)

    assert {key: sample.captions for key, sample in found.items()} == {
        "a": {"original": "from txt"},
        "b": {"original": "from json"},
        "c": captions,
        "d": {"original_1": "second"},
    }
    assert (found["a"].extra, found["b"].extra, found["d"].extra) == ({}, {"width": 5}, {"seen": 1})
    assert rejected(source) == {("d.png", "captions.original"): "the caption is empty"}


def test_an_invalid_caption_file_is_rejected_with_its_reason(tmp_path: Path) -> None:
    for name in ["list", "deep", "none", "large", "loop", "digits"]:
        put(tmp_path / f"{name}.png", png(0))
    put(tmp_path / "list.json", [1])
    put(tmp_path / "deep.json", '{"caption": "good", "x": ' + "[" * 500 + "]" * 500 + "}")
    put(tmp_path / "none.json", {"width": 5})
    put(tmp_path / "large.json", b'{"caption": "' + b"x" * 10_000_000 + b'"}')
    put(tmp_path / "digits.json", '{"caption": "good", "x": ' + "1" * 5000 + "}")
    (tmp_path / "loop.json").symlink_to("loop.json")

    reasons = {name: reason for (name, _), reason in rejected(open_source(tmp_path, 100)).items()}

    assert reasons.keys() == {
        f"{n}.png" for n in ("list", "deep", "none", "large", "loop", "digits")
    }
    assert "must be a JSON object, got list" in reasons["list.png"]
    assert "nested too deeply" in reasons["deep.png"]
    assert "no caption in a .json" in reasons["none.png"]
    assert "more than 1 MB" in reasons["large.png"]
    assert "link to itself" in reasons["loop.png"]
    assert "digits" in reasons["digits.png"]


def test_json_of_the_maximum_depth_is_accepted(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png", png(0))
    put(tmp_path / "in" / "a.json", '{"caption": "a", "x": ' + "[" * 99 + "]" * 99 + "}")

    annotate(tmp_path / "in", tmp_path / "a", rewards=[])
    annotate(tmp_path / "a", tmp_path / "a", rewards=["sharpness"])

    assert read_scores(tmp_path / "a").keys == ["a"]


def test_keys_are_unique_across_the_groups_of_a_folder(tmp_path: Path) -> None:
    for name in ["a b.png", "a_b.png", "a-b.png", "a.b.png"]:
        put(tmp_path / name, png(0))
        put(tmp_path / name.replace(".png", ".txt"), "caption")

    source = open_source(tmp_path, 1)

    assert isinstance(source, FolderSource)
    assert list(usable(source)) == ["a_b", "a-b", "a_b-2", "a_b-3"]


# Tars.


def test_braces_are_expanded_as_in_a_shell() -> None:
    assert expand_braces("a/{008..011}.tar") == [f"a/{n}.tar" for n in ("008", "009", "010", "011")]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("{train-{0..1},val}.{a,b}") == [
        "train-0.a", "train-0.b", "train-1.a", "train-1.b", "val.a", "val.b",
    ]  # fmt: skip
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{0..9.tar", "Unbalanced braces"),
        ("{9..0}.tar", "ends before it begins"),
        ("{0..99999999999}.tar", "more than 1,000,000"),
        ("{0..9999}{0..9999}.tar", "more than 1,000,000"),
        ("{abc}.tar", "neither a range"),
        ("{}.tar", "neither a range"),
    ],
)
def test_invalid_braces_raise(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_braces(text)


def test_tars_of_a_brace_pattern_are_read_in_its_order(tmp_path: Path) -> None:
    for split in ["train", "val"]:
        for number in range(3):
            name = tmp_path / split / f"{number:05d}.tar"
            write_tar(name, [("0", {"png": png(number), "txt": b"x", "cls": b"1"})])
    (tmp_path / "val" / "00001.tar").write_bytes(b"")

    source = open_source(f"{tmp_path}/{{val,train}}/{{00000..00001}}.tar", 4)

    assert source.groups == 4
    assert [item.origin for item in usable(source).values()] == [
        "val/00000.tar:0", "train/00000.tar:0", "train/00001.tar:0",
    ]  # fmt: skip
    assert list(rejected(source)) == [("val/00001.tar", "shard")]


def test_a_missing_file_of_a_brace_pattern_raises(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])

    with pytest.raises(ValueError, match=r"1\.tar: no such file or folder \(2 of 3 are absent\)"):
        open_source(tmp_path / "{0..2}.tar", 4)
    with pytest.raises(ValueError, match="names a file twice"):
        open_source(tmp_path / "{0,0}.tar", 4)
    with pytest.raises(ValueError, match=r"absent\.tar: no such file or folder"):
        open_source(tmp_path / "absent.tar", 4)


def test_a_folder_with_braces_in_its_name_is_not_expanded(tmp_path: Path) -> None:
    make_folder(tmp_path / "{0..3}")

    assert open_source(tmp_path / "{0..3}", 4).total == 11


def test_the_released_layout_is_read_with_captions_and_scores(tmp_path: Path) -> None:
    record = {
        "caption": "alt text",
        "synthetic_caption": "a long one",
        "short_synthetic_caption": "short",
        "clip_score": 0.31,
        "synthetic_clip_score": 0.42,
        "caption_length": 8,
    }
    arrays = {"vae_embeddings_mean_256.npy": b"x" * 999, "flan_t5_xl_embeddings.npy": b"y" * 999}
    members = {"jpg": png(0), "txt": b"<PERSON> alt text", "json": json.dumps(record).encode()}
    tar = write_tar(tmp_path / "0.tar", [("000", {**members, **arrays})])

    (sample,) = usable(open_source(tar, 4)).values()

    assert sample.captions == {
        "original": "alt text",
        "synthetic": "a long one",
        "short_synthetic": "short",
    }
    assert sample.extra == {n: v for n, v in record.items() if "score" in n or "length" in n}


def test_the_shards_of_annotate_have_the_captions_of_their_source(tmp_path: Path) -> None:
    record = {"captions": {"original": "a", "long": ""}, "long_caption": "c", "tall_caption": "d"}
    tar = write_tar(
        tmp_path / "0.tar", [("0", {"png": png(0), "json": json.dumps(record).encode()})]
    )

    annotate(tar, tmp_path / "a", rewards=["sharpness"])
    annotate(tmp_path / "a", tmp_path / "b", rewards=["colourfulness"])

    expected = {"original": "a", "long_caption": "c", "tall": "d"}
    assert captions_in(tar) == {"0": expected}
    assert read_scores(tmp_path / "b").captions == list(expected)
    assert read_scores(tmp_path / "b").rewards == ("colourfulness", "sharpness")


def test_naming_columns_without_a_table_raises(tmp_path: Path) -> None:
    for path in [make_folder(tmp_path / "folder"), make_tars(tmp_path / "tars")]:
        with pytest.raises(ValueError, match="not a table"):
            open_source(path, 4, TableColumns(captions=("caption",)))
