"""Checkpoints of all ranks, written while the training goes on.

A save copies this rank's pieces to the host's memory and returns; a thread of each rank writes
them. The threads meet in a process group of their own, so that they never mix with the training's,
and the first one completes the checkpoint when every file is on the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from miro.training import checkpoint
from miro.training.checkpoint import PART, RunFolder
from miro.training.zero_shards import ShardSlice
from miro.utils.atomic_io import write_text
from miro.utils.distributed import DistEnv, cpu_process_group

log = logging.getLogger(__name__)

OnFailure = Literal["stop", "continue"]


class AsyncCheckpointer:
    """Writes the checkpoints and the weights of a run, one at a time and in order.

    Every rank makes the same calls. An error of any rank is raised, or logged where `on_failure`
    is `continue`, on all of them, at the next call.
    """

    def __init__(
        self,
        run: RunFolder,
        ranks: DistEnv,
        *,
        keep_last: int,
        keep_every: int | None,
        on_failure: OnFailure,
    ) -> None:
        self.run, self.ranks, self.on_failure = run, ranks, on_failure
        self.keep_last, self.keep_every = keep_last, keep_every
        self._group = cpu_process_group(ranks)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="miro-saver")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, *error: object) -> None:
        # A save that was begun is worth finishing, whatever ended the training. Where other ranks
        # are gone it ends with them: their connections are closed.
        self._thread.shutdown(wait=True)

    def wait(self) -> None:
        """Let all that was given be written."""
        while self._pending:
            try:
                self._pending.pop(0).result()
            except OSError as error:
                if self.on_failure == "stop":
                    raise
                log.error("%s; the run goes on, as on_failed_save=continue says", error)

    def checkpoint(
        self, images: int, pieces: Iterable[ShardSlice], numbers: Mapping[str, Any]
    ) -> None:
        """Save what a resumed run needs: this rank's pieces, and numbers that all ranks share."""
        self.wait()
        copies = {
            f"{key}/{piece.name}@{piece.start}": tensor.detach().to("cpu", copy=True)
            for piece in pieces
            for key, tensor in piece.tensors.items()
        }
        state = {**numbers, "images": images}
        self._later(lambda: self._write(images, copies, state))

    def weights(self, images: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save the averaged weights, which the first rank has, whole."""
        if self.ranks.first:
            copies = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()
            }
            folder = self.run.weights_at(images)
            self._later(lambda: checkpoint.save(folder, copies, state))

    def _later(self, action: Callable[[], None]) -> None:
        self._pending.append(self._thread.submit(action))

    def _write(self, images: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        folder, name = self.run.checkpoint(images), PART.format(self.ranks.rank)
        self._collective(folder, lambda: checkpoint.begin(folder) if self.ranks.first else None)
        written = self._collective(
            folder, lambda: (name, checkpoint.write_tensors(folder, name, tensors))
        )

        def complete() -> None:
            if self.ranks.first:
                checkpoint.commit(folder, dict(written), state)
                write_text(self.run.latest, f"{folder.name}\n")
                checkpoint.keep(
                    self.run.checkpoints, images, last=self.keep_last, every=self.keep_every
                )

        self._collective(folder, complete)

    def _collective(self, folder: Any, action: Callable[[], Any]) -> list[Any]:
        """Do it on every rank; what each returned, or the first error of any on all of them."""
        result: Any = None
        error: str | None = None
        try:
            result = action()
        except OSError as raised:
            error = f"rank {self.ranks.rank}: {raised}" if self.ranks.world > 1 else str(raised)
        told: list[tuple[Any, str | None]] = [(result, error)]
        if self.ranks.world > 1:
            told *= self.ranks.world
            dist.all_gather_object(told, (result, error), group=self._group)
        errors = [error for _, error in told if error is not None]
        if errors:
            failed = OSError(f"could not write {folder}: {errors[0]}")
            raise checkpoint.cleanup_error(folder, errors[0]) if self.ranks.first else failed
        return [result for result, _ in told]
