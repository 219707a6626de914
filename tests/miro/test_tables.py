"""Tables and Hugging Face datasets: columns, rows, images as paths and bytes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.corrupt import encoded, noise
from helpers.sources import (
    png,
    rejected,
    save_to_disk,
    usable,
    write_csv,
    write_jsonl,
    write_parquet,
    write_pngs,
)

from miro.data.shards import read_scores, verify
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.sources.csv_jsonl import STRIDE, DelimitedFile, JsonLinesFile
from miro.sources.source import open_source
from miro.sources.tables import TableColumns


def captions_of(path: Path, columns: TableColumns | None = None) -> list[dict[str, str]]:
    return [sample.captions for sample in usable(open_source(path, 3, columns)).values()]


# Text files.


def test_csv_captions_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    captions = ["one, two", 'a "quoted" one', "first line\nsecond line", "naïve ☃"]
    rows = [
        f'{i}.png,"{text.replace(chr(34), chr(34) * 2)}",{i}' for i, text in enumerate(captions)
    ]
    text = "\r\n".join(["\ufeffpath,caption,width", *rows, "", ""])

    source = open_source(write_csv(tmp_path / "a.csv", text), 3)

    found = usable(source)
    assert (source.total, source.groups) == (4, 2)
    assert list(found) == ["00000000", "00000001", "00000002", "00000003"]
    assert [sample.captions["original"] for sample in found.values()] == captions
    assert found["00000002"].image == png(2)
    assert found["00000002"].extra == {"width": "2"}
    assert found["00000002"].origin == "a.csv:00000002"


def test_tsv_jsonl_and_parquet_give_equal_captions(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    captions = ["one, two", "tab\there", 'a "quoted" one']
    rows = [{"image": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    lines = [f'{i}.png\t"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(captions)]

    tsv = captions_of(write_csv(tmp_path / "a.tsv", "\n".join(["image\ttext", *lines])))
    jsonl = captions_of(write_jsonl(tmp_path / "a.jsonl", rows))
    parquet = captions_of(write_parquet(tmp_path / "a.parquet", rows))

    assert tsv == jsonl == parquet == [{"original": text} for text in captions]


@pytest.mark.parametrize("file_format", ["csv", "jsonl"])
def test_any_range_of_rows_of_a_long_text_file_is_read(file_format: str, tmp_path: Path) -> None:
    rows = [{"path": f"{i}.png", "caption": "line\n" * (i % 3) + str(i)} for i in range(2500)]
    if file_format == "csv":
        lines = [f'{row["path"]},"{row["caption"]}"' + "\n" * (i % 2) for i, row in enumerate(rows)]
        file = DelimitedFile(write_csv(tmp_path / "a.csv", "\n".join(["path,caption", *lines])))
    else:
        file = JsonLinesFile(write_jsonl(tmp_path / "a.jsonl", rows))

    assert file.rows == 2500
    for start in [0, 1, STRIDE - 1, STRIDE, STRIDE + 1, 2499]:
        for stop in {start, start + 1, min(start + STRIDE + 1, 2500)}:
            assert list(file.read(start, stop, "path")) == rows[start:stop]


# Columns.


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_columns_are_found_by_name(
    write: Callable[[Path, list[Any]], Path], tmp_path: Path
) -> None:
    write_pngs(tmp_path)
    row = {
        "Image_Path": "0.png",
        "width": 5,
        "caption": "original",
        "caption_long": "long",
        "short_caption": "short",
        "caption_length": 8,
        "caption_score": "0.31",
        "original_caption": "the true original",
        "nothing": None,
    }

    (sample,) = usable(open_source(write(tmp_path / f"a.{write.__name__[6:]}", [row]), 3)).values()

    assert sample.captions == {
        "original": "the true original",
        "caption": "original",
        "long": "long",
        "short": "short",
    }
    assert sample.extra == {"width": 5, "caption_length": 8, "caption_score": "0.31"}


def test_columns_can_be_named(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    row = {"image": "absent.png", "where": "0.png", "what": "a", "caption": "b", "caption_x": "c"}
    row |= {"caption_y": "not named"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    config = AnnotateConfig(image_column="where", caption_columns=("what", "caption_x"))

    assert captions_of(path, TableColumns("where", ("what",))) == [{"original": "a"}]
    assert captions_of(path, TableColumns("where")) == [
        {"original": "b", "x": "c", "y": "not named"},
    ]
    annotate(path, tmp_path / "out", rewards=["sharpness"], config=config)
    annotate(tmp_path / "out", tmp_path / "out", rewards=["colourfulness"])
    assert read_scores(tmp_path / "out").captions == ["original", "x"]
    assert read_scores(tmp_path / "out").rewards == ("colourfulness", "sharpness")


def test_missing_columns_raise_when_the_table_is_opened(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    path = write_csv(tmp_path / "a.csv", "path,caption,x\n0.png,good,1\n")
    for columns, message in [
        (TableColumns(image="pth"), "unknown column 'pth'; did you mean 'path'"),
        (TableColumns(captions=("captions",)), "did you mean 'caption'"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(path, 3, columns)
    for text, message in [
        ("url,caption\n0.png,good\n", "no column of images, it has the columns url, caption.*--im"),
        (
            "path,title\n0.png,good\n",
            "no captions.* path, title; .*--caption-columns",
        ),
        ("path,caption_length\n0.png,4\n", "no captions"),
        ("path,caption,caption\n0.png,a,b\n", "two columns have one name"),
        ("path,caption\n", "no rows"),
        ("", "the file is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(write_csv(tmp_path / "b.csv", text), 3)
    with pytest.raises(ValueError, match="UTF-16"):
        open_source(write_csv(tmp_path / "b.csv", "path,caption".encode("utf-16")), 3)


def test_several_captions_in_one_cell_are_all_read(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    rows = [{"image": "0.png", "captions": ["a", "b", ""]}, {"image": "1.png", "captions": []}]
    by_type = [{"image": "2.png", "captions": {"original": "c", "long one": "d"}}]

    listed = open_source(write_parquet(tmp_path / "a.parquet", rows), 3)

    assert [c.captions for c in usable(listed).values()] == [{"original": "a", "original_1": "b"}]
    assert rejected(listed) == {
        ("a.parquet:00000000", "captions.original_2"): "the caption is empty",
        ("a.parquet:00000001", "caption"): "no caption in captions",
    }
    assert captions_of(write_jsonl(tmp_path / "b.jsonl", by_type)) == [
        {"original": "c", "long_one": "d"}
    ]


def test_paths_may_be_absolute_or_relative_to_the_table(tmp_path: Path) -> None:
    write_pngs(tmp_path / "images")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "loop").symlink_to("loop")
    paths = ["../images/0.png", str(tmp_path / "images" / "1.png"), "loop/2.png"]
    lines = [f"{path},good" for path in paths]

    source = open_source(
        write_csv(tmp_path / "tables" / "a.csv", "\n".join(["path,caption", *lines])), 3
    )

    assert [sample.image for sample in usable(source).values()] == [png(0), png(1)]
    assert "link to itself" in rejected(source)["a.csv:00000002", "image"]


# Parquet and Arrow.


def test_parquet_columns_that_json_can_represent_are_preserved(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    row = {
        "path": "0.png",
        "text": "good",
        "number": 5,
        "share": math.nan,
        "when": datetime(2026, 1, 1),
        "raw": b"\x00",
        "tags": ["a", "b"],
        "box": {"x": 1.5},
    }

    (sample,) = usable(open_source(write_parquet(tmp_path / "a.parquet", [row]), 3)).values()

    assert sample.extra == {"number": 5, "tags": ["a", "b"], "box": {"x": 1.5}}


@pytest.mark.parametrize("where", ["disk", "parquet"])
def test_hugging_face_images_are_read_from_bytes_or_paths(where: str, tmp_path: Path) -> None:
    forms = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    images = [{"bytes": encoded(noise(), form), "path": None} for form in forms]
    write_pngs(tmp_path / "data")
    images += [
        {"bytes": png(9), "path": "named.PNG"},
        {"bytes": None, "path": str(tmp_path / "data" / "3.png")},
        {"bytes": None, "path": None},
        {"bytes": b"<html>", "path": None},
        None,
    ]
    rows = [{"image": image, "text": f"{i}", "n": i} for i, image in enumerate(images)]
    for row in rows:
        row["text"] = f"image {row['text']}"
    folder = tmp_path / "data"
    if where == "disk":
        folder = save_to_disk(tmp_path / "disk", rows)
    else:
        (tmp_path / "sharded").mkdir()
        folder = write_parquet(tmp_path / "sharded" / "a.parquet", rows).parent

    source = open_source(folder, 4)
    annotate(folder, tmp_path / "out", rewards=["sharpness"])

    verify(tmp_path / "out")
    found = usable(source)
    assert (source.total, source.groups) == (11, 3)
    extensions = ["png", "jpg", "webp", "gif", "bmp", "tif", "png", "png", "jpg"]
    assert [c.extension for c in found.values()] == extensions
    assert [c.image for c in list(found.values())[:7]] == [i["bytes"] for i in images[:7] if i]
    assert found["00000007"].image == png(3)
    assert found["00000003"].captions == {"original": "image 3"}
    assert found["00000003"].extra == {"n": 3}
    assert [int(o[-8:]) for o, _ in rejected(source)] == [8, 10]
    assert len(read_scores(tmp_path / "out").keys) == 8  # the HTML page is rejected too


def test_a_dataset_with_several_splits_raises(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(0), "path": None}, "text": "good"}] * 4
    for split in ["train", "test"]:
        save_to_disk(tmp_path / "disk" / split, rows)
        (tmp_path / "hub").mkdir(exist_ok=True)
        write_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", rows)
    (tmp_path / "disk" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    with pytest.raises(ValueError, match=r"several splits.*one of them: \S+/train, \S+/test"):
        open_source(tmp_path / "disk", 4)
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        open_source(tmp_path / "hub", 4)
    assert open_source(tmp_path / "disk" / "test", 4).total == 4
    assert open_source(tmp_path / "hub" / "train-{00000..00000}-of-00001.parquet", 4).total == 4


def test_all_files_of_a_table_must_have_its_columns(tmp_path: Path) -> None:
    write_pngs(tmp_path)
    for name, column in [("0", "caption"), ("1", "caption"), ("2", "text")]:
        write_csv(tmp_path / f"{name}.csv", f"path,{column},x\n{name}.png,from {name},1\n")

    assert captions_of(tmp_path / "{0..1}.csv") == [
        {"original": "from 0"}, {"original": "from 1"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2\.csv: no column 'caption', which \S+0\.csv has"):
        open_source(tmp_path / "{0..2}.csv", 3)
