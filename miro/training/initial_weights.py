"""`miro train --init`: begin a run from the EMA weights of another, as far as they fit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from miro.conditioning import Bins
from miro.training import checkpoint

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@torch.no_grad()
def load_initial_weights(model: nn.Module, rewards: Sequence[str], source: str) -> None:
    """Copy the weights that fit into a new network, and log those that do not.

    A parameter is taken if it has the same name and shape. Of the reward table, whose first
    dimension are the rewards, each reward's part is taken by the reward's name. The position
    embedding is computed, so another resolution takes everything.

    Args:
        model: the network, with its initialization.
        rewards: its reward slots, in order.
        source: a run's folder, a weights folder (also one of `miro export`), or a hub id.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
        ValueError: nothing fits.
    """
    folder = checkpoint.newest_weights(_local_folder(source))
    tensors, state = checkpoint.load(folder)
    their_rewards = Bins.from_json(json.dumps(state["bins"]), folder).rewards
    shared = [name for name in rewards if name in their_rewards]
    ours, theirs = ([names.index(name) for name in shared] for names in (rewards, their_rewards))
    taken, left = 0, []
    for name, param in model.named_parameters():
        found = tensors.get(name)
        if name.startswith("table.") and found is not None and found.shape[1:] == param.shape[1:]:
            rows = found[theirs].to(param)
            found = param.index_copy(0, torch.tensor(ours), rows) if shared else None
        if found is not None and found.shape == param.shape:
            param.copy_(found)
            taken += 1
        else:
            other = "absent" if found is None else f"{tuple(found.shape)} there"
            left.append(f"{name} ({tuple(param.shape)} here, {other})")
    if not taken:
        raise ValueError(f"init={source}: no parameter fits this network; the first: {left[0]}")
    log.info("initial weights of %s: %d of %d parameters taken", folder, taken, taken + len(left))
    if new := [name for name in rewards if name not in shared]:
        log.info("initial weights: new rewards %s", ", ".join(new))
    if left:
        log.warning("initial weights: not taken are %s", "; ".join(left))


def _local_folder(source: str) -> Path:
    """The folder itself, or the downloaded files of a hub id."""
    if Path(source).exists() or not HUB_ID.fullmatch(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source))
