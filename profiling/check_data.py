"""Check and time JPEG decoding on a GPU against the CPU.

    python profiling/check_data.py [--workers 16] [--rounds 5]

DALI with nvJPEG and Pillow are interleaved, in batches of 64 of 256 JPEGs through
`prefetch_decoded`. Prints images/s and the difference of the pixels for each size. Exits 2 without
a GPU or DALI.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import closing
from functools import partial

import torch
from bench_data import SIZES, jpegs
from bench_utils import argument_parser, interleave, quantiles, seconds
from torch import Tensor

from miro.images.decoder import prefetch_decoded
from miro.images.open_decoder import DALI_INSTALL, DecoderName, build_decoder
from miro.images.pillow import decode

COUNT, BATCH = 256, 64


def rates(images: list[bytes], workers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images/s of DALI on the GPU and of Pillow; the first round builds the pipeline."""
    names: tuple[DecoderName, ...] = ("dali", "pillow")
    decoders = {name: build_decoder(name, "cuda", BATCH, workers) for name in names}

    def run(name: DecoderName) -> None:
        for batch in prefetch_decoded(images, lambda data: data, BATCH, decoders[name]):
            assert all(isinstance(image, Tensor) for _, image in batch)

    def timed(name: DecoderName, _: int) -> float:
        return seconds(lambda: run(name), "cuda")

    variants = {name: partial(timed, name) for name in names}
    try:
        times = interleave(variants, rounds)
    finally:
        for decoder in decoders.values():
            decoder.close()
    return {name: quantiles([len(images) / t for t in found]) for name, found in times.items()}


def difference(images: list[bytes], workers: int) -> tuple[int, float]:
    """Largest and mean absolute difference of DALI's and Pillow's pixels, of 255 levels."""
    with closing(build_decoder("dali", "cuda", len(images), workers)) as decoder:
        decoded = decoder.start(images)()
    differences = []
    for image, data in zip(decoded, images, strict=True):
        assert isinstance(image, Tensor) and image.is_cuda, "DALI did not decode on the GPU"
        differences.append((image.cpu().int() - decode(data).int()).abs().flatten())
    levels = torch.cat(differences)
    return int(levels.max()), float(levels.double().mean())


def main() -> int:
    """Run the checks and print them."""
    parser = argument_parser(__doc__, out=None)
    parser.add_argument("--workers", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("check_data: no GPU; decoding on a GPU was not checked")
        return 2
    if importlib.util.find_spec("nvidia.dali") is None:
        print(f"check_data: DALI is not installed ({DALI_INSTALL}); nothing was checked")
        return 2
    for width, height in SIZES:
        images = jpegs(width, height, COUNT)
        largest, mean = difference(images[:8], args.workers)
        gpu, cpu = rates(images, args.workers, args.rounds).values()
        print(
            f"decode {width} x {height}: GPU {gpu['median']:.0f} images/s ({gpu['p20']:.0f} to "
            f"{gpu['p80']:.0f}), Pillow {cpu['median']:.0f} ({cpu['p20']:.0f} to {cpu['p80']:.0f}) "
            f"with {args.workers} workers; pixels differ by up to {largest} levels, mean {mean:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
