"""Pictures into pixels, and encoded samples into a training step: what each way does a second.

    python profiling/bench_data.py [--rounds 5] [--workers 2] [--side 256]

Decoding alone, and decoding with a resize of the whole picture to 256 x 256 (bicubic, antialiased),
by Pillow, torchvision and DALI as their manuals have it, and by ours: `prefetch_decoded` with
either decoder, and the squares that a reward looks at. Each has two workers: threads, DALI's own
where it is DALI; our squares are made by all cores. All are warmed up and take turns, round by
round.

The pictures are made: noise whose amplitude falls as 1/f^1.15, about as in photographs, with
objects that have edges, at qualities 85 to 92; and the photograph that lies in matplotlib, cropped
and resized. The table has their bytes a pixel, which decide what entropy decoding takes. Pillow's
draft mode is left out: it decodes fewer coefficients and gives other pixels.

Then the loader: `Loader.batch_at` alone on an encoded folder made up for it, and a step of the demo
preset fed by it as a training run is, with the share of time it waits for data. Writes
data-cpu-DATE.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_precision import LATENTS, TEXT_CHANNELS, make, step
from measured import machine, quantiles, write
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

HERE = Path(__file__).parent
SIZES = {(640, 480): 128, (1024, 768): 128, (2048, 1536): 64}
"""Width and height of the pictures, and how many of them a turn takes."""
BASE, BATCH = "Pillow", 64
Run = Callable[[Sequence[bytes]], Any]


def invented(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A picture with the statistics of a photograph: 1/f^1.15 noise, weak in colour, and edges."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf

    def noise() -> np.ndarray:
        phases = np.exp(2j * np.pi * generator.random(frequency.shape))
        field = np.fft.irfft2(phases / frequency**1.15, s=(height, width))
        return field / field.std()

    luma, chroma = 118 + 42 * noise(), [10 * noise() for _ in range(3)]
    pixels = np.stack([luma + colour for colour in chroma], -1)
    pixels += generator.normal(0, 0.7, pixels.shape)  # a sensor's
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(12):
        corners = generator.integers(0, (width, height), (3, 2))
        colour = (*generator.integers(0, 256, 3).tolist(), 90)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
    return picture


def photograph(width: int, height: int) -> Image.Image | None:
    """matplotlib's portrait of Grace Hopper, its centre in this shape; None where it is not."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        tall = image.width * height // width
        top = (image.height - tall) // 2
        return image.crop((0, top, image.width, top + tall)).resize((width, height))


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    generator = np.random.default_rng([width, height])
    found = []
    for number in range(min(count, 8)):
        picture = photograph(width, height) if number == 0 else None
        picture = picture or invented(width, height, generator)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85 + number)
        found.append(buffer.getvalue())
    return list(itertools.islice(itertools.cycle(found), count))


def by_pillow(pool: ThreadPoolExecutor, side: int | None) -> Run:
    def one(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        whole = image if side is None else image.resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(whole)

    return lambda images: list(pool.map(one, images))


def by_torchvision(pool: ThreadPoolExecutor, side: int | None) -> Run:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    def one(data: bytes) -> torch.Tensor:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        if side is None:
            return image
        return resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True)

    return lambda images: list(pool.map(one, images))


def by_dali(workers: int, side: int | None) -> Run:
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


def by_us(name: Any, workers: int, side: int | None) -> Run:
    decoder = build_decoder(name, "cpu", batch_size=BATCH, workers=workers)

    def run(images: Sequence[bytes]) -> None:
        for batch in prefetch_decoded(images, lambda data: data, BATCH, decoder):
            pictures = [image for _, image in batch if isinstance(image, torch.Tensor)]
            assert len(pictures) == len(batch)
            if side is not None:
                ImageBatch(pictures).preprocessed(ImageTransform(side, "stretch"))

    return run


def decoding(workers: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each size and task: images/s of each variant, and its ratio to Pillow's."""
    rows = []
    pool = ThreadPoolExecutor(workers)
    sets = {size: jpegs(*size, count) for size, count in SIZES.items()}
    for task, to in {"decode": None, f"decode and resize to {side}": side}.items():
        variants = {
            BASE: by_pillow(pool, to),
            "torchvision": by_torchvision(pool, to),
            "DALI": by_dali(workers, to),
            "ours with Pillow": by_us("pillow", workers, to),
            "ours with DALI": by_us("dali", workers, to),
        }
        for (width, height), images in sets.items():
            rates: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(rounds + 1):
                for name, run in variants.items():
                    started = time.perf_counter()
                    run(images)
                    if number:  # the first warms up
                        rates[name].append(len(images) / (time.perf_counter() - started))
            ratio = {
                name: quantiles([a / b for a, b in zip(rate, rates[BASE], strict=True)])
                for name, rate in rates.items()
            }
            row = {
                "task": task,
                "pixels": [width, height],
                "bytes_a_pixel": sum(map(len, images)) / len(images) / width / height,
                "images_per_second": {name: quantiles(rate) for name, rate in rates.items()},
                "ratio_to_pillow": ratio,
            }
            print(f"{task}, {width} x {height}, {row['bytes_a_pixel']:.2f} bytes a pixel")
            for name, rate in row["images_per_second"].items():
                print(
                    f"  {name:18}{rate['median']:8.0f} images/s"
                    f" ({rate['p20']:.0f} to {rate['p80']:.0f})"
                    f"  × {ratio[name]['median']:.2f} of Pillow"
                )
            rows.append(row)
    return rows


def encoded_folder(folder: Path, samples: int) -> EncodedDataset:
    """Latents and texts of the demo's shapes, with nothing in them."""
    generator = np.random.default_rng(0)

    def content(number: int) -> tuple[str, dict[str, bytes]]:
        latent = generator.standard_normal(LATENTS).astype(np.float16)
        text = generator.standard_normal((5 + number % 10, TEXT_CHANNELS)).astype(np.float16)
        return f"{number:06d}", {
            "latent.npy": npy_bytes(latent),
            "text.original.npy": npy_bytes(text),
            "json": b'{"captions": {"original": "a picture"}}',
        }

    shard = write_shard(folder / "shards" / "00000.tar", map(content, range(samples)))
    keys = [f"{number:06d}" for number in range(samples)]
    scores = {"sharpness": generator.random(samples)}
    write_scores(scores_path(folder, shard), keys, ["original"] * samples, scores)
    encoding = {"latent_shape": list(LATENTS), "has_std": False, "text_dim": TEXT_CHANNELS}
    Manifest("encoded", ("original",), (shard,), ("sharpness",), encoding).write(folder)
    return EncodedDataset(folder)


def loading(steps: int, compiled: bool) -> dict[str, Any]:
    """The loader alone, and in front of the demo preset's step, which waits for it or not."""
    config = preset("demo")
    torch.set_num_threads(config.threads or 1)
    engine = make(config, config.precision, compiled)
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(encoded_folder(Path(folder), 20_000), seed=0)

        def batch_at(position: int) -> Any:
            return loader.batch_at(position, config.batch)

        positions = itertools.count(0, config.batch)
        alone, waits, taken = [], [], []
        for position in itertools.islice(positions, 100):
            started = time.perf_counter()
            batch_at(position)
            alone.append(config.batch / (time.perf_counter() - started))
        for number in range(3):
            step(engine, config, number)
        ahead = prefetch(batch_at, itertools.islice(positions, steps))
        for number in range(steps):
            started = time.perf_counter()
            next(ahead)
            waits.append(time.perf_counter() - started)
            taken.append(step(engine, config, number))
        ahead.close()
    row = {
        "batch": config.batch,
        "compiled": compiled,
        "loader_images_per_second": quantiles(alone),
        "step_images_per_second": quantiles([config.batch / seconds for seconds in taken]),
        "share_of_time_waiting": sum(waits) / (sum(waits) + sum(taken)),
    }
    print(
        f"loader alone {row['loader_images_per_second']['median']:.0f} images/s, demo step "
        f"{row['step_images_per_second']['median']:.0f}; waiting for data "
        f"{row['share_of_time_waiting']:.2%} of the time"
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="training steps behind the loader")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a worker is a thread
    rows = decoding(given.workers, given.side, given.rounds)
    record = {
        **machine("cpu"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {"rounds": given.rounds, "workers": given.workers, "side": given.side},
        "decoding": rows,
        "loading": loading(given.steps, not given.eager),
    }
    write(record, given.out / f"data-cpu-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
