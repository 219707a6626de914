"""Where captioned images come from: folders, tars and tables that others made.

A source is cut into groups, which can be read independently of each other, and a group into units,
each of which becomes one shard. The cut depends on the source and the shard size alone, so a run
that is stopped, or shared out among processes, makes the same shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.braces import expand_braces
from miro.sources.folder import FolderSource, list_images
from miro.sources.sample import (
    MAX_JSON_BYTES,
    RawSample,
    RejectedSample,
    read_file,
    read_json,
    read_sample,
)
from miro.sources.tables import TABLES, Columns, TableSource
from miro.sources.webdataset import TarSource

__all__ = [
    "RawSample",
    "Columns",
    "RejectedSample",
    "Source",
    "open_source",
    "read_sample",
    "shard_name",
]


class Source(Protocol):
    """What can be read in groups, each of which opens without reading those before it.

    `groups`: how many there are: one a tar, or one for each samples_per_shard of a folder or table.
    `total`: how many samples there are, None where only reading would tell.
    `fingerprint`: changes with the samples and with how they are cut into units.

    No two samples have one key, in whatever groups they are.
    """

    groups: int
    total: int | None
    fingerprint: str

    def units(self, group: int, done: int = 0) -> Iterator[Iterator[RawSample | RejectedSample]]:
        """What each unit of a group holds, in a fixed order, without the first `done` units."""
        ...


def shard_name(group: int, unit: int) -> str:
    """The file of a unit: `00003.tar` of the first of group 3, `00003-001.tar` of the next."""
    return f"{group:05d}-{unit:03d}.tar" if unit else f"{group:05d}.tar"


def open_source(path: Path | str, samples_per_shard: int, columns: Columns | None = None) -> Source:
    """The source at `path`, which is one of these:

    - a folder with images in it or below it, captions beside them;
    - a .tar, a folder of them, or a brace range of them, like `shards/{00000..00099}.tar`;
    - a table: .csv, .tsv, .jsonl or .parquet, a brace range, or a folder of .parquet files;
    - a folder that `save_to_disk` of Hugging Face datasets wrote.

    columns: of a table, where their names do not tell them. ValueError where there is nothing to
    read, before any image has been opened.
    """
    path = Path(path)
    files = _files_of(path)
    endings = {file.suffix.lower() for file in files}
    if len(endings) == 1 and endings <= TABLES.keys():
        return TableSource(files, samples_per_shard, columns or Columns())
    if columns not in (None, Columns()):
        raise ValueError(f"{path}: is not a table; only of a table columns can be named")
    if endings == {".tar"}:
        return TarSource(files, samples_per_shard)
    if files:
        raise ValueError(
            f"{path}: neither a folder nor a .tar file nor a table ({', '.join(TABLES)})"
        )
    images, others = list_images(path)
    if not images:
        raise ValueError(
            f"{path}: no images found in it or below it ({others} other files); images end in "
            + ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        )
    return FolderSource(path, images, samples_per_shard)


def _files_of(path: Path) -> list[Path]:
    """The tars or the files of a table that `path` stands for; none for a folder of images."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_to_disk(path)
        return _shards_in(path)
    if path.is_file() or "{" not in str(path):
        names = [str(path)]
    else:
        names = expand_braces(str(path))
    files = [Path(name) for name in names]
    absent = [file for file in files if not file.is_file()]
    if absent:
        more = f" ({len(absent)} of {len(files)} are absent)" if len(files) > 1 else ""
        raise ValueError(f"{absent[0]}: no such file or folder{more}")
    if len(set(files)) < len(files):
        raise ValueError(f"{path}: names a file twice")
    return files


def _shards_in(folder: Path) -> list[Path]:
    """The tars, or the Parquet files, of a folder that holds nothing else to read."""
    tars, tables = sorted(folder.glob("*.tar")), sorted(folder.glob("*.parquet"))
    if not tars and not tables:
        return []
    found = {"tars": tars, "tables": tables, "images": list_images(folder)[0]}
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) > 1:
        raise ValueError(
            f"{folder}: holds both {' and '.join(kinds)}; annotate them one after the other"
        )
    splits = {file.name.partition("-")[0] for file in tables if "-of-" in file.name}
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: holds several splits ({', '.join(sorted(splits))}); name the files of one,"
            f" as in {folder}/train-{{00000..00009}}-of-00010.parquet"
        )
    return tars or tables


def _saved_to_disk(folder: Path) -> list[Path]:
    """The Arrow files of a Hugging Face dataset, in its order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        ways = ", ".join(str(folder / str(split)) for split in splits)
        raise ValueError(f"{folder}: holds several splits; annotate one of them: {ways}")
    state = folder / "state.json"
    if _listed(state, "_indices_data_files") or _listed(state, "_indices_files"):
        raise ValueError(
            f"{folder}: is a selection of rows by a very old version of datasets; load it and save"
            " it again"
        )
    files: list[Path] = []
    for entry in _listed(state, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or "/" in name or not name.endswith(".arrow"):
            raise ValueError(f"{state}: {entry!r} names no file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {state.name} lists it")
        files.append(folder / name)
    if not files:
        raise ValueError(f"{state}: lists no files; is {folder} a dataset that was saved to disk?")
    return files


def _listed(path: Path, name: str) -> list[Any]:
    """The list that a JSON file has under a name, empty where it has none."""
    data = read_file(str(path), MAX_JSON_BYTES)
    try:
        content = {name: None} if isinstance(data, str) else read_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy it again") from None
    value = content.get(name)
    return value if isinstance(value, list) else []
