"""Manifests of sources and destinations: opening, checks, and the columns that all shards have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from miro.data.shards import (
    MODELS,
    Manifest,
    ShardInfo,
    check_shard,
    score_columns,
    scores_path,
    shard_path,
)
from miro.rewards.base import Reward
from miro.utils.atomic_io import link_or_copy
from miro.utils.locks import blocking_lock
from miro.utils.reward_names import reward_position

STATE = "annotate"
"""Key in `Manifest.source` of the source that was annotated, and of its next partition."""


def read_images_manifest(source: Path, stage: str) -> Manifest:
    """Read the manifest of the source of a stage; ValueError if the folder is encoded."""
    manifest = Manifest.read(source)
    if manifest.kind != "images":
        raise ValueError(f"{source}: is encoded already; {stage} the images it was made from")
    return manifest


def open_manifest(dest: Path, name: str, fingerprint: str) -> Manifest:
    """Read the manifest of a dataset that is being annotated, or write an empty one.

    Args:
        dest: The dataset folder.
        name: Of the source.
        fingerprint: Of the source.

    Raises:
        ValueError: `dest` was made from another source, or has shards without a manifest.
    """
    with blocking_lock(dest):
        if (dest / "manifest.json").is_file():
            manifest = Manifest.read(dest)
            if manifest.source.get(STATE, {}).get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{dest}: was annotated from another source than {name} is now, or with another"
                    " samples_per_shard; annotate into a new folder"
                )
            return manifest
        if (dest / "shards").exists():
            raise ValueError(f"{dest}: has shards but no manifest.json; choose a new folder")
        state = {"from": name, "fingerprint": fingerprint, "group": 0, "partition": 0}
        manifest = Manifest("images", (), (), source={STATE: state})
        manifest.write(dest)
        return manifest


def link_dataset(source: Path, dest: Path, dataset: Manifest) -> None:
    """Hard-link the shards and scores of a dataset folder; ValueError if `dest` has others."""
    if source.resolve() == dest.resolve():
        return
    with blocking_lock(dest):
        if (dest / "manifest.json").is_file():
            if Manifest.read(dest).shards != dataset.shards:
                raise ValueError(f"{dest}: has other shards than {source}; choose a new folder")
            return
        for shard in dataset.shards:
            check_shard(source, shard)
            for path_of in (shard_path, scores_path):
                if path_of(source, shard).is_file():
                    link_or_copy(path_of(source, shard), path_of(dest, shard))
        dataset.write(dest)


def check_models(dest: Path, manifest: Manifest, rewards: Sequence[Reward]) -> None:
    """Raise ValueError if existing scores of a reward were computed by another model."""
    models = manifest.source.get(MODELS, {})
    for reward in rewards:
        existing = models.get(reward.name, reward.model)
        if existing != reward.model and reward.name in manifest.rewards:
            raise ValueError(
                f"{dest}: its {reward.name!r} was scored by {existing}, not by {reward.model}; "
                "scores of two models are not comparable: annotate into a new folder"
            )


def check_source_shards(
    dest: Path, manifest: Manifest, source: Path, images: Manifest, checksums: Mapping[str, str]
) -> None:
    """Check that the shards of a dataset were made from those that its source has now.

    Args:
        dest: The dataset folder.
        manifest: Its manifest.
        source: The folder it was made from.
        images: The manifest of `source`.
        checksums: SHA-256 by name of the shards that `dest` was made from.

    Raises:
        ValueError: A shard of `source` is missing or has changed.
    """
    for shard, now in zip_longest(manifest.shards, images.shards[: len(manifest.shards)]):
        if now is None or now.name != shard.name or now.sha256 != checksums.get(shard.name):
            raise ValueError(
                f"{dest}: its shard {shard.name} was made from other images than {source} has now; "
                "choose a new folder"
            )


def columns_of(dest: Path, shard: ShardInfo) -> list[str] | None:
    """The rewards in a shard's score table, None if it has no table."""
    path = scores_path(dest, shard)
    return score_columns(path) if path.is_file() else None


def commit_rewards(dest: Path, rewards: Sequence[Reward]) -> Manifest:
    """List the rewards that all shards have scores of, and the models of `rewards`."""
    with blocking_lock(dest):
        manifest = Manifest.read(dest)
        columns = [set(columns_of(dest, shard) or ()) for shard in manifest.shards]
        common = set.intersection(*columns) if columns else set()
        models = manifest.source.get(MODELS, {}) | {r.name: r.model for r in rewards}
        models = {name: models[name] for name in sorted(models, key=reward_position)}
        complete = replace(
            manifest,
            rewards=tuple(sorted(common, key=reward_position)),
            source={**manifest.source, MODELS: models},
        )
        if complete != manifest:
            complete.write(dest)
        return complete
