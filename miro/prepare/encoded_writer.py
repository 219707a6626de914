"""The encoded folder that `miro encode` writes for one image size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from miro.data.reader import copy_scores
from miro.data.shards import MODELS, Manifest, ShardInfo
from miro.encoders.encoder import EncodingConfig
from miro.prepare.manifests import check_source_shards, columns_of
from miro.prepare.rejected_log import RejectedLog
from miro.prepare.work_log import (
    CompletedShard,
    commit_completed,
    read_completed_from,
    write_completed,
)
from miro.utils.distributed import DistEnv
from miro.utils.locks import blocking_lock, exclusive_lock

log = logging.getLogger(__name__)


class EncodedFolder:
    """An encoded folder that this rank and others write from an images folder.

    Args:
        source: The images folder.
        dest: The encoded folder.
        images: The manifest of `source`.
        encoding: Of `dest`.
        env: This process's rank.

    Attributes:
        manifest: Of `dest`, None before it is created.
        cut: Truncated captions of the shard in progress.
        rejected: The log of rejected samples, once `open` was called.

    Raises:
        ValueError: `dest` has another encoding or source.
    """

    def __init__(
        self, source: Path, dest: Path, images: Manifest, encoding: EncodingConfig, env: DistEnv
    ) -> None:
        self.source, self.dest, self.images, self.encoding = source, dest, images, encoding
        self.cut = 0
        self._env = env
        exists = (dest / "manifest.json").is_file()
        self.manifest = self._read_manifest() if exists else None

    @property
    def samples(self) -> int:
        """Number of samples in the manifest."""
        return self.manifest.samples if self.manifest else 0

    @property
    def record(self) -> dict[str, Any]:
        """The manifest's record of the encoding."""
        assert self.manifest is not None and self.manifest.encoding is not None
        return self.manifest.encoding

    def open(self, stack: ExitStack) -> None:
        """Lock the folder for this rank until `stack` is closed, and update its score tables."""
        stack.enter_context(exclusive_lock(self.dest, self._env.rank))
        self.rejected = stack.enter_context(RejectedLog(self.dest / "rejected.jsonl"))
        if self.manifest:
            self._commit()
        for shard in self._env.shard(self.manifest.shards if self.manifest else ()):
            copy_scores(self.source, self.dest, shard)

    def create(self, record: dict[str, Any]) -> None:
        """Write a manifest without shards, unless another process has."""
        with blocking_lock(self.dest):
            if (self.dest / "manifest.json").is_file():
                self.manifest = self._read_manifest()
                return
            origin = {**self.images.source, "encoded_from": {}}
            self.manifest = replace(
                self.images, kind="encoded", shards=(), encoding=record, source=origin
            )
            self.manifest.write(self.dest)

    def completed(self, position: int) -> ShardInfo | None:
        """The encoded shard of the source's shard at `position`, None if it is missing."""
        if self.manifest and position < len(self.manifest.shards):
            return self.manifest.shards[position]
        record = read_completed_from(self.dest, self.images.shards[position])
        return record and record.shard

    def complete(self, source: ShardInfo, encoded: ShardInfo) -> None:
        """Copy the scores of a shard that was encoded from `source`, and record it."""
        copy_scores(self.source, self.dest, encoded)
        completed = CompletedShard(encoded, source.sha256, self.cut)
        write_completed(self.dest, source.name, completed)
        self.cut = 0
        self._commit()
        log.info("%s: %d samples encoded", self.dest, self.samples)

    def _commit(self) -> None:
        self.manifest = commit_completed(self.dest, self.images.shards, self._extend)

    def _extend(self, manifest: Manifest, source: ShardInfo, completed: CompletedShard) -> Manifest:
        assert manifest.encoding is not None and completed.shard is not None
        checksums = {**manifest.source["encoded_from"], source.name: source.sha256}
        return replace(
            self.images,
            kind="encoded",
            shards=(*manifest.shards, completed.shard),
            encoding={**manifest.encoding, "cut": manifest.encoding["cut"] + completed.cut},
            source={**self.images.source, "encoded_from": checksums},
        )

    def sync_reward_columns(self) -> None:
        """List in the manifest the rewards of the source that every shard has scores of."""
        with blocking_lock(self.dest):
            manifest = Manifest.read(self.dest)
            rewards = set(self.images.rewards)
            for shard in manifest.shards if manifest.rewards != self.images.rewards else ():
                rewards &= set(columns_of(self.dest, shard) or ())
            source = dict(manifest.source)
            if MODELS in self.images.source:
                source[MODELS] = self.images.source[MODELS]
            listed = tuple(name for name in self.images.rewards if name in rewards)
            self.manifest = replace(manifest, rewards=listed, source=source)
            if self.manifest != manifest:
                self.manifest.write(self.dest)

    def check_latent_shape(self, origin: str, image: Tensor, shape: Sequence[int]) -> None:
        """Raise ValueError if images differ in size and no size is configured."""
        first, (height, width) = self.record["latent_shape"], image.shape[1:]
        if not self.encoding.buckets and list(shape) != first:
            raise ValueError(
                f"{origin}: the image is {width} x {height} pixels, its latents {shape}, those of"
                f" the first {tuple(first)}; give a size, to which all are cropped and resized"
            )

    def check_rejected(self, limit: float) -> None:
        """Raise ValueError if more than the share `limit` of the source is rejected."""
        if len(self.rejected) / self.images.samples > limit:
            raise ValueError(
                f"{len(self.rejected)} of {self.images.samples} samples were skipped, a share "
                f"above max_rejected={limit:g}; see {self.rejected.path}, last: "
                f"{self.rejected.last}"
            )

    def _read_manifest(self) -> Manifest:
        """Read the manifest; ValueError if it has another encoding or source."""
        dest, manifest = self.dest, Manifest.read(self.dest)
        if manifest.kind != "encoded" or manifest.encoding is None:
            raise ValueError(f"{dest}: holds images, not latents; choose a new folder")
        if differences := self.encoding.diff(manifest.encoding):
            raise ValueError(
                f"{dest}: was encoded with other settings ({'; '.join(differences)}); use the same "
                "settings, or choose a new folder"
            )
        checksums = manifest.source.get("encoded_from", {})
        check_source_shards(dest, manifest, self.source, self.images, checksums)
        return manifest
