"""The folder that `miro encode` makes for one size: what it holds, and how it grows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from miro.data.reader import copy_scores
from miro.data.shards import MODELS, Manifest, ShardInfo, score_columns, scores_path
from miro.encoders.encoder import EncodingConfig
from miro.prepare.completed_shards import (
    CompletedShard,
    commit_completed,
    read_completed,
    write_completed,
)
from miro.prepare.rejected_log import RejectedLog
from miro.utils.distributed import DistEnv
from miro.utils.locks import blocking_lock, exclusive_lock

log = logging.getLogger(__name__)


class EncodedFolder:
    """An encoded folder that is being made from the images folder `source`, by this process's rank.

    Raises:
        ValueError: `dest` was made with other settings; the message names them.
    """

    def __init__(
        self, source: Path, dest: Path, images: Manifest, encoding: EncodingConfig, ranks: DistEnv
    ) -> None:
        self.source, self.dest, self.images, self.encoding = source, dest, images, encoding
        self.ranks = ranks
        found = (dest / "manifest.json").is_file()
        self.manifest = self._check_same_encoding() if found else None
        self.cut = 0  # captions of the shard under way whose ends were not read

    @property
    def samples(self) -> int:
        """Samples the manifest lists."""
        return self.manifest.samples if self.manifest else 0

    @property
    def record(self) -> dict[str, Any]:
        """How the manifest says it is encoded."""
        assert self.manifest is not None and self.manifest.encoding is not None
        return self.manifest.encoding

    def open(self, stack: ExitStack) -> None:
        """Keep other processes of this rank out, and bring the scores that are there up to date."""
        stack.enter_context(exclusive_lock(self.dest, self.ranks.rank))
        self.rejected = stack.enter_context(RejectedLog(self.dest / "rejected.jsonl"))
        if self.manifest:
            self._gather()
        shards = self.manifest.shards if self.manifest else ()
        for shard in shards[self.ranks.rank :: self.ranks.world]:
            copy_scores(self.source, self.dest, shard)

    def begin(self, record: dict[str, Any]) -> None:
        """The manifest of a folder without shards, unless another process was first."""
        with blocking_lock(self.dest):
            if (self.dest / "manifest.json").is_file():
                self.manifest = self._check_same_encoding()
                return
            origin = {**self.images.source, "encoded_from": {}}
            self.manifest = replace(
                self.images, kind="encoded", shards=(), encoding=record, source=origin
            )
            self.manifest.write(self.dest)

    def made(self, position: int) -> ShardInfo | None:
        """The shard made of the source's shard at `position`, if it is."""
        if self.manifest and position < len(self.manifest.shards):
            return self.manifest.shards[position]
        record = read_completed(self.dest, self.images.shards[position])
        return record and record.shard

    def complete(self, shard: ShardInfo, made: ShardInfo) -> None:
        """A shard of the source was encoded."""
        copy_scores(self.source, self.dest, made)
        write_completed(self.dest, shard, CompletedShard(made, self.cut))
        self.cut = 0
        self._gather()
        log.info("%s: %d samples encoded", self.dest, self.samples)

    def _gather(self) -> None:
        self.manifest = commit_completed(self.dest, self.images.shards, self._extended)

    def _extended(self, manifest: Manifest, shard: ShardInfo, made: CompletedShard) -> Manifest:
        assert manifest.encoding is not None
        made_from = {**manifest.source["encoded_from"], shard.name: shard.sha256}
        return replace(
            self.images,
            kind="encoded",
            shards=(*manifest.shards, made.shard),
            encoding={**manifest.encoding, "cut": manifest.encoding["cut"] + made.cut},
            source={**self.images.source, "encoded_from": made_from},
        )

    def sync_reward_columns(self) -> None:
        """Let the manifest list the source's rewards of which every shard has the scores by now."""
        with blocking_lock(self.dest):
            manifest = Manifest.read(self.dest)
            rewards = set(self.images.rewards)
            for shard in manifest.shards if manifest.rewards != self.images.rewards else ():
                table = scores_path(self.dest, shard)
                rewards &= set(score_columns(table)) if table.is_file() else set()
            source = dict(manifest.source)
            if MODELS in self.images.source:
                source[MODELS] = self.images.source[MODELS]
            listed = tuple(name for name in self.images.rewards if name in rewards)
            self.manifest = replace(manifest, rewards=listed, source=source)
            if self.manifest != manifest:
                self.manifest.write(self.dest)

    def check_shape(self, origin: str, image: Tensor, shape: Sequence[int]) -> None:
        """ValueError for an image of a size of its own, where none was asked for."""
        first, (height, width) = self.record["latent_shape"], image.shape[1:]
        if not self.encoding.buckets and list(shape) != first:
            raise ValueError(
                f"{origin}: the image is {width} x {height} pixels, its latents {shape}, those of"
                f" the first {tuple(first)}; give a size, to which all are cropped and resized"
            )

    def check_share(self, most: float) -> None:
        """Raise ValueError if too large a share of the source was skipped."""
        share = len(self.rejected) / self.images.samples
        if share > most:
            raise ValueError(
                f"{len(self.rejected)} of {self.images.samples} samples were skipped, more "
                f"than the share of {most:g} allowed by max_rejected; "
                f"{self.rejected.path} says why, last: {self.rejected.last}"
            )

    def _check_same_encoding(self) -> Manifest:
        """The manifest that is there; ValueError where it is not what this call would make."""
        dest, manifest = self.dest, Manifest.read(self.dest)
        if manifest.kind != "encoded" or manifest.encoding is None:
            raise ValueError(f"{dest}: holds images, not latents; choose a new folder")
        if differ := self.encoding.diff(manifest.encoding):
            raise ValueError(
                f"{dest}: was encoded with other settings ({'; '.join(differ)}); use the same "
                "settings, or choose a new folder"
            )
        made_from = manifest.source.get("encoded_from", {})
        for position, shard in enumerate(manifest.shards):
            shards = self.images.shards
            now = shards[position] if position < len(shards) else None
            if now is None or now.name != shard.name or now.sha256 != made_from.get(shard.name):
                raise ValueError(
                    f"{dest}: its shard {shard.name} was encoded from other images than "
                    f"{self.source} holds now; choose a new folder"
                )
        return manifest
