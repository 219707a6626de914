"""Choice of the image decoder: DALI where it is installed, else Pillow."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch

from miro.images.decoder import Decoder
from miro.images.pillow import (
    PillowDecoder,
)
from miro.utils.threads import default_num_workers

log = logging.getLogger(__name__)

DecoderName = Literal["auto", "pillow", "dali"]
DALI_INSTALL = "pip install 'miro-trainer[dali]'"


def build_decoder(
    name: DecoderName, device: str | torch.device = "cpu", batch_size: int = 64, workers: int = 0
) -> Decoder:
    """Build an image decoder.

    Args:
        name: "auto" is DALI where it is installed, on a GPU or a CPU, and Pillow elsewhere.
        device: Where DALI decodes, and where images are returned.
        batch_size: Largest batch.
        workers: Threads; 0 for one per core, at most 16.

    Raises:
        ValueError: DALI is requested and not installed.
    """
    workers = workers or default_num_workers()
    if name == "pillow":
        return PillowDecoder(workers)
    # Asking for a module inside a package that is not there would raise.
    if not all(importlib.util.find_spec(module) for module in ("nvidia", "nvidia.dali")):
        if name == "dali":
            raise ValueError(f"decoder='dali': DALI is not installed: {DALI_INSTALL}")
        _say_once(f"Pillow decodes the images; DALI, faster, is not installed: {DALI_INSTALL}")
        return PillowDecoder(workers)
    from miro.images.dali import DaliDecoder

    return DaliDecoder(torch.device(device), batch_size, workers)


@cache
def _say_once(message: str) -> None:
    log.warning(message)
