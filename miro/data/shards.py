"""The dataset folder: WebDataset tars, raw scores as Parquet, and a manifest of complete shards.

    DEST/manifest.json         kind, caption types, shards with sizes and checksums, rewards
    DEST/shards/00000.tar      {key}.{extension} members; those of a sample are consecutive
    DEST/scores/00000.parquet  key, caption (its type), a float32 column of raw scores per reward;
                               one row per sample and caption, NaN where a score is missing

Files are written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miro.sources.tar import BLOCK, END, header, map_file, scan
from miro.utils.atomic_io import atomic_file, atomic_write

MANIFEST = "manifest.json"
MODELS = "models"
"""Key in `Manifest.source` of the model that computed each reward."""
VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """A complete tar: file name, number of samples, size in bytes, and SHA-256 in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a dataset folder: complete shards, and the rewards that every shard has."""

    kind: str  # "images" or "encoded"
    captions: tuple[str, ...]  # caption types, such as "original"
    shards: tuple[ShardInfo, ...]
    rewards: tuple[str, ...] = ()
    encoding: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)  # origin, and the models of the rewards

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder; raises ValueError if it is missing or invalid."""
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{path}: no such file, {folder} is not a dataset folder; `miro annotate` makes"
                " one of images, `miro encode` one to train on"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); make the folder again") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: not a JSON object; make the folder again")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"{path}: version {version!r}, this program reads version {VERSION}; update"
                " miro-trainer, or make the folder again"
            )
        try:
            shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
            captions, rewards = tuple(content.pop("captions")), tuple(content.pop("rewards", ()))
            manifest = cls(captions=captions, shards=shards, rewards=rewards, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a field is missing or unknown: {error}") from None
        if manifest.kind not in ("images", "encoded"):
            raise ValueError(f"{path}: kind is {manifest.kind!r}, not 'images' or 'encoded'")
        for shard in shards:
            if "/" in shard.name or not shard.name.endswith(".tar"):
                raise ValueError(f"{path}: {shard.name!r} is not the name of a shard")
        return manifest

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder atomically."""
        content = {"version": VERSION, **asdict(self)}
        if self.encoding is None:
            del content["encoding"]
        atomic_write(Path(folder) / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def shard_path(folder: Path, shard: ShardInfo) -> Path:
    """Return the path of a shard's tar."""
    return Path(folder) / "shards" / shard.name


def scores_path(folder: Path, shard: ShardInfo) -> Path:
    """Return the path of a shard's score table."""
    return Path(folder) / "scores" / f"{Path(shard.name).stem}.parquet"


class ShardWriter:
    """Append samples to a tar that is being written."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._keys: set[str] = set()
        self._digest = hashlib.sha256()
        self._size = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample, {extension: bytes}; raises ValueError if the key is invalid."""
        if not key or "." in key or "/" in key:
            raise ValueError(
                f"{self._path.name}: a key must be non-empty without '.' and '/', got {key!r}"
            )
        if key in self._keys:
            raise ValueError(f"{self._path.name}: the sample key {key!r} occurs twice")
        self._keys.add(key)
        for extension, data in members.items():
            self.write(header(f"{key}.{extension}", len(data)))
            self.write(data)
            self.write(bytes(-len(data) % BLOCK))

    def write(self, data: bytes) -> None:
        """Append raw bytes of the tar."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def info(self) -> ShardInfo:
        """Name, size and checksum of the bytes written."""
        return ShardInfo(self._path.name, len(self._keys), self._size, self._digest.hexdigest())


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """Write a tar that appears at `path` when the block ends without an exception."""
    with atomic_file(path) as file:
        shard = ShardWriter(path, file)
        yield shard
        shard.write(END)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> ShardInfo:
    """Write (key, {extension: bytes}) samples as a tar, atomically; equal samples, equal bytes."""
    with open_shard(Path(path)) as shard:
        for key, members in samples:
            shard.add(key, members)
    return shard.info


class ShardIndex:
    """Random access to the samples of a dataset folder, memory-mapped without copies.

    `keys` are the sample keys in the order of the manifest; each member needs 16 bytes of memory.

    Raises:
        ValueError: a shard is missing or does not match the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None):
        manifest = Manifest.read(folder) if manifest is None else manifest
        self.keys: list[str] = []
        self._views: list[memoryview] = []
        self._shard = np.empty(manifest.samples, np.int32)
        self._spans: dict[str, np.ndarray] = {}  # extension -> int64 (samples, 2), -1 where absent
        for shard in manifest.shards:
            self._add(check_shard(folder, shard), shard)

    def _add(self, path: Path, shard: ShardInfo) -> None:
        buffer = map_file(path)
        samples = list(scan(buffer, path))
        if len(samples) != shard.samples:
            raise ValueError(f"{path}: {len(samples)} samples, the manifest says {shard.samples}")
        first = len(self.keys)
        self.keys += [sample.key for sample in samples]
        self._shard[first : len(self.keys)] = len(self._views)
        self._views.append(memoryview(buffer))
        absent = (-1, -1)
        for extension in {extension for sample in samples for extension in sample.spans}:
            if extension not in self._spans:
                self._spans[extension] = np.full((len(self._shard), 2), -1, np.int64)
            spans = [sample.spans.get(extension, absent) for sample in samples]
            self._spans[extension][first : len(self.keys)] = spans

    def __len__(self) -> int:
        return len(self.keys)

    def extensions(self, i: int) -> list[str]:
        """Return the sorted extensions of the members of sample i."""
        return sorted(name for name, spans in self._spans.items() if spans[i, 0] >= 0)

    def member(self, i: int, extension: str) -> memoryview:
        """Return the bytes of a member as a view of the shard; raises KeyError if it is missing."""
        if extension not in self._spans or self._spans[extension][i, 0] < 0:
            raise KeyError(f"sample {self.keys[i]!r} has {self.extensions(i)}, not {extension!r}")
        start, stop = self._spans[extension][i]
        return self._views[self._shard[i]][start:stop]


@dataclass(frozen=True)
class ScoreTable:
    """Raw scores, one row per sample and caption, in the order of the shards."""

    keys: list[str]
    captions: list[str]  # caption types
    rewards: tuple[str, ...]
    values: np.ndarray  # float32 (rows, rewards), NaN where missing


def write_scores(
    path: Path,
    keys: Sequence[str],
    captions: Sequence[str],
    scores: Mapping[str, Sequence[float] | np.ndarray],
) -> None:
    """Write the score table of a shard atomically; `scores` are raw, NaN where missing."""
    columns = {"key": pa.array(keys, pa.string()), "caption": pa.array(captions, pa.string())}
    for name, values in scores.items():
        # from_pandas=False stores NaN as NaN, not as null: readers handle one missing value only.
        columns[name] = pa.array(np.asarray(values, np.float32), from_pandas=False)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    atomic_write(Path(path), sink.getvalue().to_pybytes())


def read_shard_scores(path: Path) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Read (keys, caption types, {reward: float32 (rows,)}); raises ValueError if unreadable."""
    try:
        table = pq.ParquetFile(path).read()
        keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(
            f"{path}: not a score file ({error}); delete it and run `miro annotate` again"
        ) from None
    names = table.column_names[2:]
    return keys, captions, {n: table[n].to_numpy().astype(np.float32) for n in names}


def score_columns(path: Path) -> list[str]:
    """Return the rewards in a score table; raises ValueError if the file is not one."""
    try:
        names = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: not a score file ({error}); delete it and run `miro annotate` again"
        ) from None
    return [name for name in names if name not in ("key", "caption")]


def read_scores(folder: Path, manifest: Manifest | None = None) -> ScoreTable:
    """Read the scores of all shards; raises ValueError if a reward of the manifest is missing."""
    manifest = Manifest.read(folder) if manifest is None else manifest
    keys: list[str] = []
    captions: list[str] = []
    parts = [np.empty((0, len(manifest.rewards)), np.float32)]
    for shard in manifest.shards:
        path = scores_path(folder, shard)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run `miro annotate {folder} {folder}` first")
        shard_keys, shard_captions, columns = read_shard_scores(path)
        missing = [name for name in manifest.rewards if name not in columns]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}; run `miro annotate` to add it")
        keys += shard_keys
        captions += shard_captions
        values = np.empty((len(shard_keys), len(manifest.rewards)), np.float32)
        for column, name in enumerate(manifest.rewards):
            values[:, column] = columns[name]
        parts.append(values)
    return ScoreTable(keys, captions, manifest.rewards, np.concatenate(parts))


def verify(folder: Path) -> None:
    """Check the size and checksum of every shard; raises ValueError at the first mismatch."""
    for shard in Manifest.read(folder).shards:
        path = check_shard(folder, shard)
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if checksum != shard.sha256:
            raise ValueError(
                f"{path}: its checksum is {checksum}, the manifest says {shard.sha256}; "
                "copy it again"
            )


def check_shard(folder: Path, shard: ShardInfo) -> Path:
    """Return the path of a shard's tar; raises ValueError if it is missing or of another size."""
    path = shard_path(folder, shard)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the manifest lists it; copy it again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(
            f"{path}: {size:,} bytes, the manifest says {shard.bytes:,}; copy it again"
        )
    return path
