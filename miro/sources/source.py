"""Open a source of captioned images: a folder, tars, or a table.

A source is divided into groups, which can be read independently, and a group into partitions, each
of which becomes one shard. The division depends on the source and the shard size alone, so a run
writes the same shards whether it is resumed or distributed over processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from braceexpand import braceexpand

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.folder import FolderSource, list_images
from miro.sources.sample import (
    MAX_JSON_BYTES,
    Samples,
    read_file,
    read_json,
)
from miro.sources.tables import TABLES, TableColumns, TableSource
from miro.sources.webdataset import TarSource

MAX_FILES = 1_000_000  # names that a brace pattern may expand to


class Source(Protocol):
    """Captioned images in groups, each of which can be read without the groups before it.

    Attributes:
        groups: their number: one per tar, or per `samples_per_shard` images or rows.
        total: number of samples, None if unknown before they are read.
        fingerprint: changes with the samples and with their division into partitions.

    Sample keys are unique across groups.
    """

    groups: int
    total: int | None
    fingerprint: str

    def partitions(self, group: int, skip: int = 0) -> Iterator[Samples]:
        """Yield the partitions of a group in a fixed order, without the first `skip` of them."""
        ...


def shard_name(group: int, partition: int) -> str:
    """Return the shard of a partition: `00003.tar` for (3, 0), `00003-001.tar` for (3, 1)."""
    return f"{group:05d}-{partition:03d}.tar" if partition else f"{group:05d}.tar"


def open_source(
    path: Path | str, samples_per_shard: int, columns: TableColumns | None = None
) -> Source:
    """Open a source without reading images.

    Args:
        path: one of

            - a folder with images in it or below it, and caption files next to them;
            - a .tar, a folder of .tar files, or a brace pattern like `shards/{00000..00099}.tar`;
            - a .csv, .tsv, .jsonl or .parquet file, a brace pattern, or a folder of .parquet files;
            - a folder that `save_to_disk` of Hugging Face datasets wrote.
        samples_per_shard: samples per partition.
        columns: of a table, if they cannot be found by name.

    Raises:
        ValueError: there is nothing to read, or several kinds of data.
    """
    path = Path(path)
    files = _list_files(path)
    endings = {file.suffix.lower() for file in files}
    if len(endings) == 1 and endings <= TABLES.keys():
        return TableSource(files, samples_per_shard, columns or TableColumns())
    if columns not in (None, TableColumns()):
        raise ValueError(f"{path}: is not a table, so columns cannot be named")
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


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern like "a/{000..099}.tar" or "{train,val-{0..9}}.tar" with `braceexpand`.

    Raises:
        ValueError: braces are unbalanced, a brace is neither a list nor an ascending range, or
            there are more than MAX_FILES names.
    """
    too_many = f"{pattern}: expands to more than {MAX_FILES:,} files"
    for body in re.findall(r"\{([^{}]*)\}", pattern):
        if "," not in body and ".." not in body:
            raise ValueError(
                f"{pattern}: {{{body}}} is neither a range {{000..099}} nor a list {{a,b}}"
            )
        if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", body)) is not None:
            first, last = map(int, ends.groups())
            if first > last:
                raise ValueError(f"{pattern}: the range {{{body}}} ends before it begins")
            if last - first >= MAX_FILES:  # before braceexpand allocates them
                raise ValueError(too_many)
    names = list(islice(braceexpand(pattern, escape=False), MAX_FILES + 1))
    if len(names) > MAX_FILES:
        raise ValueError(too_many)
    return names


def _list_files(path: Path) -> list[Path]:
    """The tars or table files that `path` names; empty for a folder of images."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _list_saved_dataset(path)
        return _list_shards(path)
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


def _list_shards(folder: Path) -> list[Path]:
    """The tars or the Parquet files of a folder; ValueError if there is other data too."""
    tars, tables = sorted(folder.glob("*.tar")), sorted(folder.glob("*.parquet"))
    if not tars and not tables:
        return []
    found = {"tars": tars, "tables": tables, "images": list_images(folder)[0]}
    present = [name for name, files in found.items() if files]
    if len(present) > 1:
        raise ValueError(
            f"{folder}: contains both {' and '.join(present)}; annotate them one after the other"
        )
    splits = {file.name.partition("-")[0] for file in tables if "-of-" in file.name}
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: contains several splits ({', '.join(sorted(splits))}); name the files of"
            f" one, as in {folder}/train-{{00000..00009}}-of-00010.parquet"
        )
    return tars or tables


def _list_saved_dataset(folder: Path) -> list[Path]:
    """The Arrow files that `save_to_disk` of Hugging Face datasets wrote, in row order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_list(folder / "dataset_dict.json", "splits")
        paths = ", ".join(str(folder / str(split)) for split in splits)
        raise ValueError(f"{folder}: contains several splits; annotate one of them: {paths}")
    state = folder / "state.json"
    if _read_list(state, "_indices_data_files") or _read_list(state, "_indices_files"):
        raise ValueError(
            f"{folder}: is a selection of rows by a very old version of datasets; load it and save"
            " it again"
        )
    files: list[Path] = []
    for entry in _read_list(state, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or "/" in name or not name.endswith(".arrow"):
            raise ValueError(f"{state}: {entry!r} names no file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {state.name} lists it")
        files.append(folder / name)
    if not files:
        raise ValueError(f"{state}: lists no files; save the dataset again")
    return files


def _read_list(path: Path, name: str) -> list[Any]:
    """A list field of a JSON file, empty if absent."""
    data = read_file(str(path), MAX_JSON_BYTES)
    try:
        content = {name: None} if isinstance(data, str) else read_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy it again") from None
    value = content.get(name)
    return value if isinstance(value, list) else []
