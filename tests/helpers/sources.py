"""Small tars and tables, and all items of a source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.corrupt import encoded
from PIL import Image

from miro.sources.sample import RawSample, RejectedSample
from miro.sources.source import Source


def png(shade: int) -> bytes:
    return encoded(Image.new("RGB", (5, 4), (shade, 0, 0)))


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_pngs(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def write_csv(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_to_disk(folder: Path, rows: Any) -> Path:
    """Write a dataset as `datasets` 5 does: two Arrow streams and their state.json."""
    folder.mkdir(parents=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    half = len(rows) // 2
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, [table.slice(0, half), table.slice(half)], strict=True):
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, part.schema) as to,
        ):
            to.write_table(part, max_chunksize=2)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def read_all(source: Source) -> list[RawSample | RejectedSample]:
    """All samples and rejections of a source, in order."""
    return [
        item for group in range(source.groups) for unit in source.partitions(group) for item in unit
    ]


def usable(source: Source) -> dict[str, RawSample]:
    """Usable samples by key, which must be unique."""
    samples = [item for item in read_all(source) if isinstance(item, RawSample)]
    by_key = {sample.key: sample for sample in samples}
    assert len(by_key) == len(samples)
    return by_key


def rejected(source: Source) -> dict[tuple[str, str], str]:
    """{(source, field): reason} of all rejections, which must be unique."""
    rejections = [item for item in read_all(source) if isinstance(item, RejectedSample)]
    reasons = {(item.source, item.field): item.reason for item in rejections}
    assert len(reasons) == len(rejections)
    return reasons
