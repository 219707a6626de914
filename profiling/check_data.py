"""Decoding on a GPU beside the CPU's: images/s of 256 JPEGs, and how far apart the pixels are.

    python profiling/check_data.py [--workers 16] [--rounds 5]

DALI with nvJPEG and Pillow take turns, in batches of 64 through `prefetch_decoded`. Prints a line
for each size. Exits 2 on a machine without a GPU, or where DALI is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from contextlib import closing

import torch
from bench_data import SIZES, jpegs
from measured import quantiles
from torch import Tensor

from miro.images.decoder import prefetch_decoded
from miro.images.open_decoder import DALI_INSTALL, DecoderName, build_decoder
from miro.images.pillow import decode

COUNT, BATCH = 256, 64


def rate(name: DecoderName, images: list[bytes], workers: int, rounds: int) -> dict[str, float]:
    """Images/s over rounds, the first, which builds the pipeline, left out."""
    rates = []
    with closing(build_decoder(name, "cuda", BATCH, workers)) as decoder:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for batch in prefetch_decoded(images, lambda data: data, BATCH, decoder):
                assert all(isinstance(image, Tensor) for _, image in batch)
            torch.cuda.synchronize()
            rates.append(len(images) / (time.perf_counter() - started))
    return quantiles(rates[1:])


def difference(images: list[bytes], workers: int) -> tuple[int, float]:
    """Levels between DALI's pixels and Pillow's: the most, and the mean."""
    with closing(build_decoder("dali", "cuda", len(images), workers)) as decoder:
        pictures = decoder.start(images)()
    apart = []
    for picture, data in zip(pictures, images, strict=True):
        assert isinstance(picture, Tensor) and picture.is_cuda, "DALI did not decode on the GPU"
        apart.append((picture.cpu().int() - decode(data).int()).abs().flatten())
    return int(torch.cat(apart).max()), float(torch.cat(apart).double().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: decoding on one was not checked")
        return 2
    if importlib.util.find_spec("nvidia.dali") is None:
        print(f"DALI is not installed ({DALI_INSTALL}): decoding on the GPU was not checked")
        return 2
    for width, height in SIZES:
        images = jpegs(width, height, COUNT)
        most, mean = difference(images[:8], given.workers)
        gpu = rate("dali", images, given.workers, given.rounds)
        cpu = rate("pillow", images, given.workers, given.rounds)
        print(
            f"decode {width} x {height}: GPU {gpu['median']:.0f} images/s ({gpu['p20']:.0f} to "
            f"{gpu['p80']:.0f}), Pillow {cpu['median']:.0f} ({cpu['p20']:.0f} to {cpu['p80']:.0f}) "
            f"with {given.workers} workers; pixels up to {most} levels apart, mean {mean:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
