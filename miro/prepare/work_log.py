"""What is done of a dataset folder that several processes make, and the manifest that lists it.

A unit of the source becomes a shard and its scores, and last of all gets a record:

    DEST/units/00003.json    the shard, its captions, what was skipped, and whether it is
                             the last unit of its group

Whoever has written a record extends the manifest by all units that are done, in order, up to the
first that is not. So the manifest is always what a single process would have written by then; there
is no coordinator, and a process that dies loses only the unit in progress.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from miro.data.shards import Manifest, ShardInfo, score_columns, scores_path
from miro.prepare.rejected_log import RejectedLog
from miro.sources.sample import RejectedSample
from miro.sources.source import shard_name
from miro.utils.atomic_io import atomic_write
from miro.utils.locks import blocking_lock

STATE = "annotate"
"""Where in a manifest's source it says from what, and how far, it was made."""


@dataclass(frozen=True)
class CompletedUnit:
    """The record of a unit. `shard` is None where not one sample of it can be used."""

    shard: ShardInfo | None
    captions: tuple[str, ...]
    rejections: tuple[RejectedSample, ...]
    last: bool


def record_path(dest: Path, group: int, unit: int) -> Path:
    """Where the record of a unit lies."""
    return dest / "units" / Path(shard_name(group, unit)).with_suffix(".json")


def write_completed_unit(dest: Path, group: int, unit: int, done: CompletedUnit) -> None:
    """Say that a unit is done: its shard and its scores are there."""
    atomic_write(record_path(dest, group, unit), json.dumps(asdict(done)).encode())


def read_completed_unit(dest: Path, group: int, unit: int) -> CompletedUnit | None:
    """The record of a unit, or None if it is not done.

    Raises:
        ValueError: the file is not a record; names it and the remedy.
    """
    path = record_path(dest, group, unit)
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not a record ({error}); delete it and run again") from None
    try:
        shard = record["shard"]
        return CompletedUnit(
            None if shard is None else ShardInfo(**shard),
            tuple(record["captions"]),
            tuple(RejectedSample(**rejection) for rejection in record["rejections"]),
            bool(record["last"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record ({error}); delete it and run again") from None


def begin(dest: Path, name: str, fingerprint: str) -> Manifest:
    """The manifest to go on from: DEST's, or a new one, which is written.

    name and fingerprint are the source's.

    Raises:
        ValueError: DEST was made from something else, or holds shards without a record.
    """
    with blocking_lock(dest):
        if (dest / "manifest.json").is_file():
            manifest = Manifest.read(dest)
            if manifest.source.get(STATE, {}).get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{dest}: was made from something else than {name} is now, or with"
                    " another samples_per_shard; annotate into a new folder"
                )
            return manifest
        if (dest / "shards").exists():
            raise ValueError(f"{dest}: holds shards but no manifest.json; choose a new folder")
        state = {"from": name, "fingerprint": fingerprint, "group": 0, "unit": 0}
        manifest = Manifest("images", (), (), source={STATE: state})
        manifest.write(dest)
        return manifest


def gather(dest: Path, log: RejectedLog) -> Manifest:
    """Extend the manifest by the units that are done, up to the first that is not."""
    with blocking_lock(dest):
        manifest = Manifest.read(dest)
        state: dict[str, Any] = dict(manifest.source[STATE])
        at = state["group"], state["unit"]
        while (done := read_completed_unit(dest, *at)) is not None:
            for rejection in done.rejections:
                log.add(*rejection.line)
            manifest = _extended(dest, manifest, done)
            at = (at[0] + 1, 0) if done.last else (at[0], at[1] + 1)
        if at != (state["group"], state["unit"]):
            state |= {"group": at[0], "unit": at[1]}
            manifest = replace(manifest, source={**manifest.source, STATE: state})
            manifest.write(dest)
        return manifest


def _extended(dest: Path, manifest: Manifest, done: CompletedUnit) -> Manifest:
    if done.shard is None:
        return manifest
    first = not manifest.shards
    rewards = score_columns(scores_path(dest, done.shard))
    common = [name for name in rewards if first or name in manifest.rewards]
    return replace(
        manifest,
        captions=tuple(dict.fromkeys([*manifest.captions, *done.captions])),
        shards=(*manifest.shards, done.shard),
        rewards=tuple(common),  # what a shard lacks can be added later
    )
