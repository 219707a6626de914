"""What scoring costs: rewards together against one after another, and a projection for a GPU.

    python profiling/bench_rewards.py [--rounds 5] [--images 96] [--device cuda]

Together: one `miro annotate` with seven rewards, which decodes each picture once. Apart: seven of
them, one after another, each of which adds its reward to the folder and decodes all pictures again,
as separate scripts do. The seven networks are stand-ins, each made to take as long for a picture as
its decoding does on this machine, so the time in networks is the same in both. JPEGs of 1024 x 768
(bench_data makes them), two threads decode, one computes; both ways take turns, round by round.

Then FLOPs of the published networks at their sizes, counted by torch on the meta device, and what
they are for 16 million pictures with two captions each on one H100: a projection, which assumes the
share of the device's peak given by --mfu and nothing else that takes time. The released code took
369 GPU-hours for its seven. With --device cuda the same networks, random, in bf16 and compiled, are
timed on the GPU in place of the projection. Writes rewards-DEVICE-DATE.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from bench_data import jpegs
from measured import machine, quantiles, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from miro.data.shards import read_scores
from miro.images.decoder import prefetch_decoded
from miro.images.open_decoder import build_decoder
from miro.images.transforms import ImageTransform
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.network import DualEncoderReward

HERE = Path(__file__).parent
SEVEN = 7
WIDTH, HEIGHT = 1024, 768
PEAK = 989e12  # FLOP/s of an H100 in bf16, without sparsity
PICTURES, CAPTIONS = 16_000_000, 2
RELEASED_HOURS = 369  # of the paper, all seven rewards


class StandIn(DualEncoderReward):
    """A network over squares of 224 pixels: `layers` products of its patches with a matrix."""

    reads_caption = True
    range = (-1.0, 1.0)
    transform = ImageTransform(224)

    def __init__(self, number: int, layers: int) -> None:
        super().__init__(nn.Linear(768, 768), RewardOptions(batch_size=16))
        self.name = f"stand_in_{number}"
        self.model = f"{layers} products"
        self.layers = layers

    def embed_images(self, squares: Tensor) -> Tensor:
        patches = squares.float().unfold(2, 16, 16).unfold(3, 16, 16)
        states = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) / 255
        for _ in range(self.layers):
            states = self.network(states)
        return nn.functional.normalize(states.mean(1), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        return nn.functional.normalize(torch.ones(len(captions), 768), dim=1)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        return self.similarity(images, captions)


def decoding_seconds(images: Sequence[bytes]) -> float:
    with closing(build_decoder("auto", "cpu", 16, 2)) as decoder:
        started = time.perf_counter()
        for _ in prefetch_decoded(images, lambda data: data, 16, decoder):
            pass
        return time.perf_counter() - started


def layers_as_long_as(seconds: float, pictures: int) -> int:
    """Products after which a stand-in takes as long for the pictures as decoding them."""
    squares = torch.zeros(pictures, 3, 224, 224, dtype=torch.uint8)

    def taken(layers: int) -> float:
        network = StandIn(0, layers)
        started = time.perf_counter()
        with torch.inference_mode():
            network.in_batches(lambda a, b: network.embed_images(squares[a:b]), pictures)
        return time.perf_counter() - started

    taken(4)
    per_layer = (taken(24) - taken(4)) / 20
    return max(1, round(seconds / per_layer))


def write_tar(path: Path, images: Sequence[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for extension, data in (("jpg", image), ("txt", f"picture {number}".encode())):
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def together(tar: Path, dest: Path, rewards: Sequence[Reward], config: AnnotateConfig) -> None:
    annotate(tar, dest, rewards=rewards, config=config)


def apart(tar: Path, dest: Path, rewards: Sequence[Reward], config: AnnotateConfig) -> None:
    annotate(tar, dest, rewards=rewards[:1], config=config)
    for count in range(2, len(rewards) + 1):
        annotate(dest, dest, rewards=rewards[:count], config=config)


def scoring(rounds: int, count: int) -> dict[str, Any]:
    """Images/s of both ways, and their ratio round by round."""
    images = jpegs(WIDTH, HEIGHT, count)
    decoding_seconds(images)
    seconds = quantiles([decoding_seconds(images) for _ in range(3)])["median"]
    layers = layers_as_long_as(seconds, count)
    ways: dict[str, Callable[..., None]] = {"together": together, "apart": apart}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    config = AnnotateConfig(batch_size=16, workers=2)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "pictures.tar"
        write_tar(tar, images)
        tables = {}
        for number in range(rounds + 1):
            for name, way in ways.items():
                dest = Path(folder) / f"{name}-{number}"
                torch.manual_seed(0)
                rewards = [StandIn(n, layers) for n in range(SEVEN)]
                started = time.perf_counter()
                way(tar, dest, rewards, config)
                if number:  # the first warms up
                    rates[name].append(count / (time.perf_counter() - started))
                tables[name] = read_scores(dest).values
        assert (tables["together"] == tables["apart"]).all(), "both ways must score the same"
    ratio = quantiles([a / b for a, b in zip(rates["together"], rates["apart"], strict=True)])
    row = {
        "pixels": [WIDTH, HEIGHT],
        "images": count,
        "decoding_images_per_second": count / seconds,
        "images_per_second": {name: quantiles(rate) for name, rate in rates.items()},
        "together_to_apart": ratio,
    }
    for name, rate in row["images_per_second"].items():
        print(f"{name:10}{rate['median']:8.1f} images/s ({rate['p20']:.1f} to {rate['p80']:.1f})")
    print(f"together {ratio['median']:.2f} × apart ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
    return row


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def networks(batch: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Of each published reward what `batch` pictures run, and what a caption of each runs.

    Random networks of the published sizes, on torch's default device and in its default dtype.
    """
    import open_clip
    from transformers import (
        BlipTextConfig,
        BlipVisionConfig,
        CLIPVisionConfig,
        CLIPVisionModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    from miro.rewards.clip_t5 import ClipT5
    from miro.rewards.image_reward import TOKENS, BlipScorer

    def pixels(side: int) -> Tensor:
        return torch.zeros(batch, 3, side, side)

    def ids(length: int) -> Tensor:
        return torch.zeros(batch, length, dtype=torch.long)

    def clip(name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        device, precision = torch.get_default_device(), torch.get_default_dtype()
        model: Any = open_clip.create_model(name, pretrained=None, device=device).to(precision)
        return (lambda: model.encode_image(pixels(224))), (lambda: model.encode_text(ids(77)))

    large, huge = clip("ViT-L-14"), clip("ViT-H-14")
    blip = BlipScorer(
        BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
        ),
        BlipTextConfig(
            vocab_size=30_524,
            hidden_size=768,
            encoder_hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            is_decoder=True,
        ),
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    xxl = T5Config(
        vocab_size=32_128,
        d_model=4096,
        d_kv=64,
        d_ff=10_240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    flan = ClipT5(CLIPVisionModel(vision), T5ForConditionalGeneration(xxl))

    # Without masks, which meta tensors cannot make; what is computed is the same.
    def judge() -> Any:
        seen = torch.zeros(batch, 197, 1024)
        states = blip.text(input_ids=ids(TOKENS), encoder_hidden_states=seen).last_hidden_state
        return blip.head(states[:, 0])

    def ask() -> Any:
        question = torch.zeros(batch, 40 + 576 + 60, 4096)
        return flan.t5(inputs_embeds=question, decoder_input_ids=ids(2)).logits

    nothing = lambda: None  # noqa: E731
    return {
        "clip (ViT-L-14)": large,
        "aesthetic": (large[0], nothing),
        "image_reward": (
            lambda: blip.encode_image(pixels(224)),
            judge,
        ),
        "pick_score": huge,
        "hpsv2": huge,
        "vqa (CLIP-FlanT5-xxl)": (lambda: flan.encode_image(pixels(336)), ask),
        "sci_score": huge,
    }


def projection(mfu: float) -> dict[str, Any]:
    """FLOPs a picture and a caption of each reward, and H100-hours of the released data set."""
    with torch.device("meta"):
        rows = {
            name: {"picture_flops": counted(see), "caption_flops": counted(read)}
            for name, (see, read) in networks(1).items()
        }
    total = 0.0
    for name, row in rows.items():
        flops = PICTURES * (row["picture_flops"] + CAPTIONS * row["caption_flops"])
        row["projected_h100_hours"] = flops / (mfu * PEAK) / 3600
        total += row["projected_h100_hours"]
        print(
            f"{name:24}{row['picture_flops'] / 1e9:9.1f} GFLOP a picture"
            f"{row['caption_flops'] / 1e9:9.1f} a caption"
            f"{row['projected_h100_hours']:8.1f} H100-hours, projected"
        )
    print(f"all seven: {total:.0f} H100-hours projected at {mfu:.0%} of peak; released: 369")
    return {
        "pictures": PICTURES,
        "captions_a_picture": CAPTIONS,
        "share_of_peak_assumed": mfu,
        "peak_flops": PEAK,
        "rewards": rows,
        "projected_h100_hours": total,
        "released_gpu_hours": RELEASED_HOURS,
    }


def timed(batch: int) -> dict[str, Any]:
    """Pictures/s of each reward on the GPU, its captions read, and H100-hours of the data set."""
    torch.set_default_dtype(torch.bfloat16)
    rows: dict[str, Any] = {}
    with torch.device("cuda"), torch.inference_mode():
        for name, (see, read) in networks(batch).items():
            seconds = []
            for run in (torch.compile(see), torch.compile(read)):
                for _ in range(3):
                    run()
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(10):
                    run()
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - started) / 10 / batch)
            each = seconds[0] + CAPTIONS * seconds[1]
            rows[name] = {"pictures_per_second": 1 / each, "gpu_hours": PICTURES * each / 3600}
            print(f"{name:24}{1 / each:9.0f} pictures/s {rows[name]['gpu_hours']:8.1f} GPU-hours")
    total = sum(row["gpu_hours"] for row in rows.values())
    print(f"all seven: {total:.0f} GPU-hours, of networks alone; released: {RELEASED_HOURS}")
    return {"batch": batch, "captions_a_picture": CAPTIONS, "rewards": rows, "gpu_hours": total}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of peak that is assumed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time on a GPU")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was timed")
        return 2
    record = {**machine(given.device), "command": shlex.join(["python", *sys.argv])}
    if given.device == "cuda":
        record["networks"] = timed(given.batch)
    else:
        record["settings"] = {"rounds": given.rounds, "images": given.images, "workers": 2}
        record["scoring"] = scoring(given.rounds, given.images)
        record["projection"] = projection(given.mfu)
    write(record, given.out / f"rewards-{given.device}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
