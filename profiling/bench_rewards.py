"""Cost of scoring: seven rewards in one pass or in separate passes, and the hours on a GPU.

    python profiling/bench_rewards.py [--rounds 5] [--images 96] [--device cuda]

One pass: one `miro annotate` with seven rewards, which decodes each image once. Separate passes:
seven of them, which decode all images again for each reward, as separate scripts do. The networks
are stubs that each take as long per image as decoding on this machine, so their total time is the
same in both. JPEGs of 1024 x 768 from bench_data.py, two threads decode, one computes; interleaved.

Then a projection for 16 million images with two captions each on one H100: FLOPs of the published
networks, counted on the meta device, at the share of peak given by --mfu, without any other cost.
The released code took 369 GPU-hours for its seven rewards. With --device cuda the same networks,
with random weights, in bf16 and compiled, are timed on the GPU instead. Writes
rewards-DEVICE-DATE.json.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from bench_data import jpegs
from bench_utils import (
    argument_parser,
    interleave,
    metadata,
    quantiles,
    ratios,
    seconds,
    write_json,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from miro.data.shards import read_scores
from miro.images.decoder import prefetch_decoded
from miro.images.open_decoder import build_decoder
from miro.images.transforms import ImageTransform
from miro.prepare.annotate import AnnotateConfig, annotate
from miro.rewards.base import Reward, RewardOptions
from miro.rewards.network import DualEncoderReward

SEVEN = 7
WIDTH, HEIGHT = 1024, 768
PEAK = 989e12  # dense bf16 FLOP/s of an H100
IMAGES, CAPTIONS = 16_000_000, 2
RELEASED_HOURS = 369  # GPU-hours in the paper, all seven rewards


class StubReward(DualEncoderReward):
    """A stub with a cost: `layers` matrix products of the patches of a 224-pixel image."""

    reads_caption = True
    range = (-1.0, 1.0)
    transform = ImageTransform(224)

    def __init__(self, number: int, layers: int) -> None:
        super().__init__(nn.Linear(768, 768), RewardOptions(batch_size=16))
        self.name = f"stub_{number}"
        self.model = f"{layers} products"
        self.layers = layers

    def embed_images(self, squares: Tensor) -> Tensor:
        """Embed squares, (B, 3, H, W) to (B, 768), by `layers` products."""
        patches = squares.float().unfold(2, 16, 16).unfold(3, 16, 16)
        states = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) / 255
        for _ in range(self.layers):
            states = self.network(states)
        return nn.functional.normalize(states.mean(1), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Equal vectors, (len(captions), 768)."""
        return nn.functional.normalize(torch.ones(len(captions), 768), dim=1)

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Similarity of each image and its caption."""
        return self.similarity(images, captions)


def decoding_seconds(images: Sequence[bytes]) -> float:
    """Seconds to decode the images with two threads."""
    with closing(build_decoder("auto", "cpu", 16, 2)) as decoder:
        return seconds(lambda: list(prefetch_decoded(images, lambda data: data, 16, decoder)))


def layers_for(target: float, count: int) -> int:
    """Number of layers with which a stub takes `target` seconds for `count` images."""
    pixels = torch.zeros(count, 3, 224, 224, dtype=torch.uint8)

    def duration(layers: int) -> float:
        network = StubReward(0, layers)
        with torch.inference_mode():
            return seconds(
                lambda: network.in_batches(lambda a, b: network.embed_images(pixels[a:b]), count)
            )

    duration(4)
    per_layer = (duration(24) - duration(4)) / 20
    return max(1, round(target / per_layer))


def write_tar(path: Path, images: Sequence[bytes]) -> None:
    """Write the images with captions as a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for extension, data in (("jpg", image), ("txt", f"image {number}".encode())):
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def one_pass(tar: Path, dest: Path, rewards: Sequence[Reward], config: AnnotateConfig) -> None:
    """Annotate with all rewards at once."""
    annotate(tar, dest, rewards=rewards, config=config)


def separate_passes(
    tar: Path, dest: Path, rewards: Sequence[Reward], config: AnnotateConfig
) -> None:
    """Annotate with one reward after the other."""
    annotate(tar, dest, rewards=rewards[:1], config=config)
    for count in range(2, len(rewards) + 1):
        annotate(dest, dest, rewards=rewards[:count], config=config)


def scoring(rounds: int, count: int) -> dict[str, Any]:
    """Images/s of one pass and of separate passes, and their ratio round by round."""
    images = jpegs(WIDTH, HEIGHT, count)
    decoding_seconds(images)
    decoding = quantiles([decoding_seconds(images) for _ in range(3)])["median"]
    layers = layers_for(decoding, count)
    variants = {"one pass": one_pass, "separate passes": separate_passes}
    config = AnnotateConfig(batch_size=16, workers=2)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "images.tar"
        write_tar(tar, images)
        tables = {}

        def rate(name: str, number: int) -> float:
            dest = Path(folder) / f"{name}-{number}"
            torch.manual_seed(0)
            rewards = [StubReward(n, layers) for n in range(SEVEN)]
            duration = seconds(lambda: variants[name](tar, dest, rewards, config))
            tables[name] = read_scores(dest).values
            return count / duration

        rates = interleave({name: partial(rate, name) for name in variants}, rounds)
        one, separate = tables.values()
        assert (one == separate).all(), "the scores of one pass and of separate passes differ"
    ratio = ratios(rates["one pass"], rates["separate passes"])
    row: dict[str, Any] = {
        "pixels": [WIDTH, HEIGHT],
        "images": count,
        "decoding_images_per_second": count / decoding,
        "images_per_second": {name: quantiles(rate) for name, rate in rates.items()},
        "ratio_to_separate_passes": ratio,
    }
    for name, found in row["images_per_second"].items():
        print(
            f"{name:16}{found['median']:8.1f} images/s ({found['p20']:.1f} to {found['p80']:.1f})"
        )
    print("one pass: {median:.2f} × separate passes ({p20:.2f} to {p80:.2f})".format(**ratio))
    return row


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def networks(batch: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The forward passes of each published reward over `batch` images, and over as many captions.

    Random networks of the published sizes, on the default device and in the default dtype.
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
    vit: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }  # fmt: skip
    bert = BlipTextConfig(
        vocab_size=30_524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, is_decoder=True,
    )  # fmt: skip
    blip = BlipScorer(BlipVisionConfig(image_size=224, patch_size=16, **vit), bert)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **vit)
    t5: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    xxl = T5Config(
        vocab_size=32_128, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64, **t5
    )  # fmt: skip
    flan = ClipT5(CLIPVisionModel(vision), T5ForConditionalGeneration(xxl))

    # Without attention masks, which cannot be built of meta tensors; FLOPs are the same.
    def match() -> Any:
        encoded = torch.zeros(batch, 197, 1024)
        states = blip.text(input_ids=ids(TOKENS), encoder_hidden_states=encoded).last_hidden_state
        return blip.head(states[:, 0])

    def answer() -> Any:
        question = torch.zeros(batch, 40 + 576 + 60, 4096)
        return flan.t5(inputs_embeds=question, decoder_input_ids=ids(2)).logits

    nothing = lambda: None  # noqa: E731
    return {
        "clip (ViT-L-14)": large,
        "aesthetic": (large[0], nothing),
        "image_reward": (lambda: blip.encode_image(pixels(224)), match),
        "pick_score": huge,
        "hpsv2": huge,
        "vqa (CLIP-FlanT5-xxl)": (lambda: flan.encode_image(pixels(336)), answer),
        "sci_score": huge,
    }


def projection(mfu: float) -> dict[str, Any]:
    """FLOPs per image and per caption of each reward, and projected H100-hours of the dataset."""
    with torch.device("meta"):
        rows: dict[str, dict[str, float]] = {
            name: {"image_flops": count_flops(image), "caption_flops": count_flops(caption)}
            for name, (image, caption) in networks(1).items()
        }
    total = 0.0
    for name, row in rows.items():
        flops = IMAGES * (row["image_flops"] + CAPTIONS * row["caption_flops"])
        row["projected_h100_hours"] = flops / (mfu * PEAK) / 3600
        total += row["projected_h100_hours"]
        print(
            f"{name:24}{row['image_flops'] / 1e9:9.1f} GFLOP per image"
            f"{row['caption_flops'] / 1e9:9.1f} per caption"
            f"{row['projected_h100_hours']:8.1f} H100-hours, projected"
        )
    print(f"all seven: {total:.0f} H100-hours projected at {mfu:.0%} of peak; released: 369")
    return {
        "images": IMAGES,
        "captions_per_image": CAPTIONS,
        "assumed_share_of_peak": mfu,
        "peak_flops": PEAK,
        "rewards": rows,
        "projected_h100_hours": total,
        "released_gpu_hours": RELEASED_HOURS,
    }


def timed(batch: int) -> dict[str, Any]:
    """Images/s of each reward on the GPU, captions included, and GPU-hours of the dataset."""
    torch.set_default_dtype(torch.bfloat16)
    rows: dict[str, Any] = {}
    with torch.device("cuda"), torch.inference_mode():
        for name, (image, caption) in networks(batch).items():
            durations = []
            for run in (torch.compile(image), torch.compile(caption)):
                for _ in range(3):
                    run()
                total = seconds(lambda run=run: [run() for _ in range(10)], "cuda")
                durations.append(total / 10 / batch)
            each = durations[0] + CAPTIONS * durations[1]
            rows[name] = {"images_per_second": 1 / each, "gpu_hours": IMAGES * each / 3600}
            print(f"{name:24}{1 / each:9.0f} images/s {rows[name]['gpu_hours']:8.1f} GPU-hours")
    total = sum(row["gpu_hours"] for row in rows.values())
    print(f"all seven: {total:.0f} GPU-hours, of networks alone; released: {RELEASED_HOURS}")
    return {"batch": batch, "captions_per_image": CAPTIONS, "rewards": rows, "gpu_hours": total}


def main() -> int:
    """Time the rewards, and write the result."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of peak")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="images per batch on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_rewards: no GPU; nothing was timed")
        return 2
    record = metadata(args.device)
    if args.device == "cuda":
        record["networks"] = timed(args.batch)
    else:
        record["settings"] = {"rounds": args.rounds, "images": args.images, "workers": 2}
        record["scoring"] = scoring(args.rounds, args.images)
        record["projection"] = projection(args.mfu)
    write_json(record, args.out / f"rewards-{args.device}-{record['date']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
