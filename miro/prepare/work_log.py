"""Records of completed shards, and the manifest that lists them.

Several processes write one dataset folder without a coordinator. The record of a shard,

    DEST/completed/00003.json

is written last, after the shard and its scores. Its process then extends the manifest by all
completed shards in order, up to the first that is missing. So the manifest is what a single process
would have written, and a killed process loses only the shard in progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from miro.data.shards import Manifest, ShardInfo, score_columns, scores_path
from miro.prepare.manifests import STATE
from miro.prepare.rejected_log import RejectedLog
from miro.sources.sample import RejectedSample
from miro.sources.source import shard_name
from miro.utils.atomic_io import atomic_write
from miro.utils.locks import blocking_lock


@dataclass(frozen=True)
class CompletedShard:
    """The record of a shard; a stage leaves the fields of others at their defaults."""

    shard: ShardInfo | None  # annotate: None if no sample of the partition is valid
    source_sha256: str = ""  # caption, encode: of the shard it was made from
    cut: int = 0  # encode: truncated captions
    captions: tuple[str, ...] = ()  # annotate: caption types
    rejections: tuple[RejectedSample, ...] = ()  # annotate
    last: bool = False  # annotate: whether the partition is the last of its group


def write_completed(dest: Path, name: str, completed: CompletedShard) -> None:
    """Record that the shard `name` and all that belongs to it are written."""
    atomic_write(_record_path(dest, name), json.dumps(asdict(completed)).encode())


def read_completed(dest: Path, name: str) -> CompletedShard | None:
    """Read the record of the shard `name`; None if it is not completed.

    Raises:
        ValueError: The file is not a record.
    """
    path = _record_path(dest, name)
    try:
        record = json.loads(path.read_text("utf-8"))
        shard, captions, rejections = (record.pop(k) for k in ("shard", "captions", "rejections"))
        return CompletedShard(
            None if shard is None else ShardInfo(**shard),
            captions=tuple(captions),
            rejections=tuple(RejectedSample(**rejection) for rejection in rejections),
            **record,
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a record ({error}); delete it and run again") from None


def read_completed_from(dest: Path, source: ShardInfo) -> CompletedShard | None:
    """Read the record of the shard made from `source`; None if another version was its source."""
    completed = read_completed(dest, source.name)
    return completed if completed and completed.source_sha256 == source.sha256 else None


def commit_partitions(dest: Path, log: RejectedLog) -> Manifest:
    """Extend the manifest by the completed partitions of an annotated source."""
    with blocking_lock(dest):
        manifest = Manifest.read(dest)
        state: dict[str, Any] = dict(manifest.source[STATE])
        group, partition = state["group"], state["partition"]
        while (completed := read_completed(dest, shard_name(group, partition))) is not None:
            for rejection in completed.rejections:
                log.add(rejection)
            manifest = _extend(dest, manifest, completed)
            group, partition = (group + 1, 0) if completed.last else (group, partition + 1)
        if (group, partition) != (state["group"], state["partition"]):
            state |= {"group": group, "partition": partition}
            manifest = replace(manifest, source={**manifest.source, STATE: state})
            manifest.write(dest)
        return manifest


def _extend(dest: Path, manifest: Manifest, completed: CompletedShard) -> Manifest:
    if completed.shard is None:
        return manifest
    rewards = score_columns(scores_path(dest, completed.shard))
    # Rewards that some shard lacks are not listed until `annotate` has added their scores.
    common = [name for name in rewards if not manifest.shards or name in manifest.rewards]
    return replace(
        manifest,
        captions=tuple(dict.fromkeys([*manifest.captions, *completed.captions])),
        shards=(*manifest.shards, completed.shard),
        rewards=tuple(common),
    )


def commit_completed(
    dest: Path,
    sources: Sequence[ShardInfo],
    extend: Callable[[Manifest, ShardInfo, CompletedShard], Manifest],
) -> Manifest:
    """Extend the manifest by the completed shards of a dataset that has a shard per source shard.

    Args:
        dest: The dataset folder.
        sources: All shards of the source.
        extend: Returns the manifest with the shard made from a source shard appended.
    """
    with blocking_lock(dest):
        manifest = extended = Manifest.read(dest)
        for source in sources[len(manifest.shards) :]:
            completed = read_completed_from(dest, source)
            if completed is None:
                break
            extended = extend(extended, source, completed)
        if extended != manifest:
            extended.write(dest)
        return extended


def _record_path(dest: Path, name: str) -> Path:
    return dest / "completed" / Path(name).with_suffix(".json")
