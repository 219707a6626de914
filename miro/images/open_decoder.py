"""Choice of the image decoder: DALI if it is installed, else Pillow."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch

from miro.images.decoder import Decoder
from miro.images.pillow import PillowDecoder
from miro.utils.threads import default_num_workers

log = logging.getLogger(__name__)

DecoderName = Literal["auto", "pillow", "dali"]
DALI_INSTALL = "pip install 'miro-trainer[dali]'"


def build_decoder(
    name: DecoderName, device: str | torch.device = "cpu", batch_size: int = 64, workers: int = 0
) -> Decoder:
    """Build an image decoder.

    Args:
        name: "auto" is DALI if it is installed, on a GPU or a CPU, else Pillow.
        device: Where DALI decodes; Pillow's images are on the CPU.
        batch_size: Largest batch.
        workers: Threads; 0 for one per core, at most 16.

    Raises:
        ValueError: `name` is "dali" and DALI is not installed.
    """
    workers = workers or default_num_workers()
    if name == "pillow":
        return PillowDecoder(workers)
    # find_spec("nvidia.dali") raises if the parent package is missing, so check that first.
    if not all(importlib.util.find_spec(module) for module in ("nvidia", "nvidia.dali")):
        if name == "dali":
            raise ValueError(f"decoder='dali': DALI is not installed: {DALI_INSTALL}")
        _warn_once(f"Pillow decodes the images; DALI, faster, is not installed: {DALI_INSTALL}")
        return PillowDecoder(workers)
    from miro.images.dali import DaliDecoder

    return DaliDecoder(torch.device(device), batch_size, workers)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
