"""Dataset folders whose shards are made one for one from those of another, by several processes.

    DEST/units/00003.json    the shard that was made, of which one, and what else there is to say

A record is written last of all that belongs to a shard. Whoever has written one extends the
manifest by all shards that are made, in order, up to the first that is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from miro.data.shards import Manifest, ShardInfo
from miro.utils.atomic_io import atomic_write
from miro.utils.locks import blocking_lock


@dataclass(frozen=True)
class CompletedShard:
    """A shard that was made. `cut`: captions of it whose ends were not read."""

    shard: ShardInfo
    cut: int = 0


def write_completed(dest: Path, source: ShardInfo, made: CompletedShard) -> None:
    """Say that the shard made of `source` is there, with all that belongs to it."""
    content = {"of": source.sha256, **asdict(made)}
    atomic_write(_path(dest, source), json.dumps(content).encode())


def read_completed(dest: Path, source: ShardInfo) -> CompletedShard | None:
    """The shard made of `source`, or None if it is not made, or was made of another one.

    Raises:
        ValueError: the file is not a record; names it and the remedy.
    """
    path = _path(dest, source)
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["of"] != source.sha256:
            return None
        return CompletedShard(ShardInfo(**record["shard"]), record["cut"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record ({error}); delete it and run again") from None


def commit_completed(
    dest: Path,
    sources: Sequence[ShardInfo],
    extend: Callable[[Manifest, ShardInfo, CompletedShard], Manifest],
) -> Manifest:
    """Extend DEST's manifest by the shards that are made, up to the first that is not."""
    with blocking_lock(dest):
        manifest = grown = Manifest.read(dest)
        for source in sources[len(manifest.shards) :]:
            made = read_completed(dest, source)
            if made is None:
                break
            grown = extend(grown, source, made)
        if grown != manifest:
            grown.write(dest)
        return grown


def _path(dest: Path, source: ShardInfo) -> Path:
    return dest / "units" / Path(source.name).with_suffix(".json")
