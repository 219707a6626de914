"""Throughput of image decoding, and of the data loader in front of a training step.

    python profiling/bench_data.py [--rounds 5] [--workers 2] [--side 256]

Decoding alone, and with a resize of the whole image to 256 x 256 (bicubic, antialiased), by Pillow,
torchvision and DALI as documented, and by our `prefetch_decoded` with either decoder and the
preprocessing of rewards. Each has two worker threads; our preprocessing uses all cores. All
variants are warmed up and interleaved.

The images are synthetic: noise with an amplitude of 1/f^1.15, about that of photographs, and
objects with edges, at JPEG qualities 85 to 92; one is the photograph in matplotlib's sample data,
cropped and resized. Bytes per pixel, which determine the cost of entropy decoding, are reported.
Pillow's draft mode is excluded: it decodes fewer coefficients and gives different pixels.

Then `Loader.batch_at` alone on a synthetic encoded folder, and a training step of the demo preset
behind it, with the share of time that it waits for data. Writes data-cpu-DATE.json.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_precision import DEMO_LATENTS, DEMO_TEXT_CHANNELS, build_engine, timed_step
from bench_utils import (
    argument_parser,
    interleave,
    metadata,
    quantiles,
    ratios,
    seconds,
    write_json,
)
from PIL import Image, ImageDraw

from miro.data.loader import Loader, prefetch
from miro.data.npy import npy_bytes
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, scores_path, write_scores, write_shard
from miro.images.decoder import prefetch_decoded
from miro.images.open_decoder import build_decoder
from miro.images.transforms import ImageTransform
from miro.rewards.image_batch import ImageBatch
from miro.training.presets import preset

SIZES = {(640, 480): 128, (1024, 768): 128, (2048, 1536): 64}
"""Width and height of the images, and their number per round."""
BASE, BATCH = "Pillow", 64
Run = Callable[[Sequence[bytes]], Any]


def synthetic(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """An image with the statistics of a photograph: 1/f^1.15 noise, mostly luma, and edges."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf

    def noise() -> np.ndarray:
        phases = np.exp(2j * np.pi * generator.random(frequency.shape))
        field = np.fft.irfft2(phases / frequency**1.15, s=(height, width))
        return field / field.std()

    luma, chroma = 118 + 42 * noise(), [10 * noise() for _ in range(3)]
    pixels = np.stack([luma + colour for colour in chroma], -1)
    pixels += generator.normal(0, 0.7, pixels.shape)  # sensor noise
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(12):
        corners = generator.integers(0, (width, height), (3, 2))
        colour = (*generator.integers(0, 256, 3).tolist(), 90)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
    return image


def photograph(width: int, height: int) -> Image.Image | None:
    """The centre of matplotlib's portrait of Grace Hopper; None if it is not installed."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        crop = image.width * height // width
        top = (image.height - crop) // 2
        return image.crop((0, top, image.width, top + crop)).resize((width, height))


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """`count` JPEGs of a size, eight of them distinct."""
    generator = np.random.default_rng([width, height])
    found = []
    for number in range(min(count, 8)):
        image = photograph(width, height) if number == 0 else None
        image = image or synthetic(width, height, generator)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85 + number)
        found.append(buffer.getvalue())
    return list(itertools.islice(itertools.cycle(found), count))


def with_pillow(pool: ThreadPoolExecutor, side: int | None) -> Run:
    """Decode, and resize to `side` if given, with Pillow."""

    def one(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        resized = image if side is None else image.resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(resized)

    return lambda images: list(pool.map(one, images))


def with_torchvision(pool: ThreadPoolExecutor, side: int | None) -> Run:
    """The same with torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    def one(data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image: Any = decode_jpeg(encoded, ImageReadMode.RGB)  # a list for a list of JPEGs
        if side is None:
            return image
        return resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True)

    return lambda images: list(pool.map(one, images))


def with_dali(workers: int, side: int | None) -> Run:
    """The same with DALI's CPU operators."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(
        batch_size=max(SIZES.values()), num_threads=workers, device_id=None, prefetch_queue_depth=1
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB)
        if side is not None:
            cubic = types.DALIInterpType.INTERP_CUBIC
            images = fn.resize(images, size=[side, side], interp_type=cubic, antialias=True)
        pipeline.set_outputs(images)
    pipeline.build()
    return lambda images: pipeline.run(encoded=[np.frombuffer(data, np.uint8) for data in images])


def with_ours(name: Any, workers: int, side: int | None) -> Run:
    """The same with our decoder of that name."""
    decoder = build_decoder(name, "cpu", batch_size=BATCH, workers=workers)

    def run(images: Sequence[bytes]) -> None:
        for batch in prefetch_decoded(images, lambda data: data, BATCH, decoder):
            decoded = [image for _, image in batch if isinstance(image, torch.Tensor)]
            assert len(decoded) == len(batch)
            if side is not None:
                ImageBatch(decoded).preprocessed(ImageTransform(side, "stretch"))

    return run


def timed(run: Run, images: Sequence[bytes], _: int) -> float:
    """Seconds of a run; for `interleave`."""
    return seconds(lambda: run(images))


def decoding(workers: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """Rows by task and size: images/s of each variant, and its ratio to Pillow."""
    rows = []
    pool = ThreadPoolExecutor(workers)
    sets = {size: jpegs(*size, count) for size, count in SIZES.items()}
    for task, size in {"decode": None, f"decode and resize to {side}": side}.items():
        variants = {
            BASE: with_pillow(pool, size),
            "torchvision": with_torchvision(pool, size),
            "DALI": with_dali(workers, size),
            "ours with Pillow": with_ours("pillow", workers, size),
            "ours with DALI": with_ours("dali", workers, size),
        }
        for (width, height), images in sets.items():
            times = interleave(
                {name: partial(timed, run, images) for name, run in variants.items()},
                rounds,
            )
            rates = {name: [len(images) / t for t in found] for name, found in times.items()}
            ratio = {name: ratios(rate, rates[BASE]) for name, rate in rates.items()}
            row = {
                "task": task,
                "pixels": [width, height],
                "bytes_per_pixel": sum(map(len, images)) / len(images) / width / height,
                "images_per_second": {name: quantiles(rate) for name, rate in rates.items()},
                "ratio_to_pillow": ratio,
            }
            print(f"{task}, {width} x {height}, {row['bytes_per_pixel']:.2f} bytes per pixel")
            for name, rate in row["images_per_second"].items():
                print(
                    f"  {name:18}{rate['median']:8.0f} images/s"
                    f" ({rate['p20']:.0f} to {rate['p80']:.0f})"
                    f"  × {ratio[name]['median']:.2f} of Pillow"
                )
            rows.append(row)
    return rows


def encoded_folder(folder: Path, samples: int) -> EncodedDataset:
    """Random latents and texts of the demo's shapes."""
    generator = np.random.default_rng(0)

    def content(number: int) -> tuple[str, dict[str, bytes]]:
        latent = generator.standard_normal(DEMO_LATENTS).astype(np.float16)
        text = generator.standard_normal((5 + number % 10, DEMO_TEXT_CHANNELS)).astype(np.float16)
        return f"{number:06d}", {
            "latent.npy": npy_bytes(latent),
            "text.original.npy": npy_bytes(text),
            "json": b'{"captions": {"original": "an image"}}',
        }

    shard = write_shard(folder / "shards" / "00000.tar", map(content, range(samples)))
    keys = [f"{number:06d}" for number in range(samples)]
    scores = {"sharpness": generator.random(samples)}
    write_scores(scores_path(folder, shard), keys, ["original"] * samples, scores)
    encoding = {
        "latent_shape": list(DEMO_LATENTS),
        "has_std": False,
        "text_dim": DEMO_TEXT_CHANNELS,
    }
    Manifest("encoded", ("original",), (shard,), ("sharpness",), encoding).write(folder)
    return EncodedDataset(folder)


def loading(steps: int, compiled: bool) -> dict[str, Any]:
    """Throughput of the loader alone, and of the demo's training step behind it."""
    config = preset("demo")
    torch.set_num_threads(config.threads or 1)
    engine = build_engine(config, config.precision, compiled)
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(encoded_folder(Path(folder), 20_000), seed=0)

        def batch_at(position: int) -> Any:
            return loader.batch_at(position, config.batch)

        positions = itertools.count(0, config.batch)
        alone = [
            config.batch / seconds(lambda position=position: batch_at(position))
            for position in itertools.islice(positions, 100)
        ]
        for number in range(3):
            timed_step(engine, config, number)
        waits, steps_seconds = [], []
        ahead = prefetch(batch_at, itertools.islice(positions, steps))
        for number in range(steps):
            waits.append(seconds(lambda: next(ahead)))
            steps_seconds.append(timed_step(engine, config, number))
        ahead.close()
    row = {
        "batch": config.batch,
        "compiled": compiled,
        "loader_images_per_second": quantiles(alone),
        "step_images_per_second": quantiles([config.batch / t for t in steps_seconds]),
        "share_of_time_waiting": sum(waits) / (sum(waits) + sum(steps_seconds)),
    }
    print(
        f"loader alone {row['loader_images_per_second']['median']:.0f} images/s, demo step "
        f"{row['step_images_per_second']['median']:.0f}; waiting for data "
        f"{row['share_of_time_waiting']:.2%} of the time"
    )
    return row


def main() -> int:
    """Time decoders and loaders, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="training steps behind the loader")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = decoding(args.workers, args.side, args.rounds)
    record = {
        **metadata("cpu"),
        "settings": {"rounds": args.rounds, "workers": args.workers, "side": args.side},
        "decoding": rows,
        "loading": loading(args.steps, not args.eager),
    }
    write_json(record, args.out / f"data-cpu-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
