"""Asynchronous checkpoints: all ranks write in the background while training continues.

A save copies this rank's shards to host memory and returns; a thread of each rank writes them. The
threads have a process group of their own, since collectives of two threads in one group could be
mixed up. Rank 0 commits the checkpoint when every file is on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from miro.training import checkpoint
from miro.training.checkpoint import RANK_FILE, RunFolder
from miro.training.zero_shards import ShardSlice
from miro.utils.atomic_io import write_text
from miro.utils.distributed import DistEnv, cpu_process_group

log = logging.getLogger(__name__)

OnFailure = Literal["stop", "continue"]


class AsyncCheckpointer:
    """Writes the checkpoints and EMA weights of a run, one at a time and in order.

    Every rank makes the same calls. An error of any rank is raised on all of them at the next
    call, or logged if `on_failure` is `continue`.
    """

    def __init__(
        self,
        run: RunFolder,
        env: DistEnv,
        *,
        keep_last: int,
        keep_every: int | None,
        on_failure: OnFailure,
    ) -> None:
        self.run, self.env, self.on_failure = run, env, on_failure
        self.keep_last, self.keep_every = keep_last, keep_every
        self._group = cpu_process_group(env)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="miro-checkpoint")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, *error: object) -> None:
        # Finish a save in progress, whatever ended the training. If other ranks have died, its
        # collectives fail because their connections are closed.
        self._thread.shutdown(wait=True)

    def wait(self) -> None:
        """Wait until all saves are on disk.

        Raises:
            OSError: a save failed and `on_failure` is `stop`.
        """
        while self._pending:
            try:
                self._pending.pop(0).result()
            except OSError as error:
                if self.on_failure == "stop":
                    raise
                log.error("%s; the run continues because of on_failed_save=continue", error)

    def checkpoint(
        self, images: int, shards: Iterable[ShardSlice], state: Mapping[str, Any]
    ) -> None:
        """Save this rank's shards and the plain numbers that all ranks share.

        Raises:
            OSError: an earlier save failed and `on_failure` is `stop`.
        """
        self.wait()
        copies = {
            f"{key}/{shard.name}@{shard.start}": tensor.detach().to("cpu", copy=True)
            for shard in shards
            for key, tensor in shard.tensors.items()
        }
        state = {**state, "images": images}
        self._submit(lambda: self._write(images, copies, state))

    def weights(self, images: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save the EMA weights, which rank 0 has whole."""
        if self.env.first:
            copies = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()
            }
            folder = self.run.weights_at(images)
            self._submit(lambda: checkpoint.save(folder, copies, state))

    def _submit(self, action: Callable[[], None]) -> None:
        self._pending.append(self._thread.submit(action))

    def _write(self, images: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        folder, name = self.run.checkpoint(images), RANK_FILE.format(self.env.rank)
        self._collective(folder, lambda: checkpoint.begin(folder) if self.env.first else None)
        written = self._collective(
            folder, lambda: (name, checkpoint.write_tensors(folder, name, tensors))
        )

        def complete() -> None:
            if self.env.first:
                checkpoint.commit(folder, dict(written), state)
                write_text(self.run.latest, f"{folder.name}\n")
                checkpoint.delete_old(
                    self.run.checkpoints,
                    images,
                    keep_last=self.keep_last,
                    keep_every=self.keep_every,
                )

        self._collective(folder, complete)

    def _collective(self, folder: Any, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on all ranks; gather its results, or raise the first error on all ranks."""
        result: Any = None
        error: str | None = None
        try:
            result = action()
        except OSError as raised:
            error = f"rank {self.env.rank}: {raised}" if self.env.world > 1 else str(raised)
        outcomes: list[tuple[Any, str | None]] = [(result, error)]
        if self.env.world > 1:
            outcomes *= self.env.world
            dist.all_gather_object(outcomes, (result, error), group=self._group)
        errors = [error for _, error in outcomes if error is not None]
        if errors:
            failed = OSError(f"could not write {folder}: {errors[0]}")
            raise checkpoint.cleanup_error(folder, errors[0]) if self.env.first else failed
        return [result for result, _ in outcomes]
