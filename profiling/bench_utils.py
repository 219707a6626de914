"""Arguments, metadata, timing and output shared by the profiling scripts."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
LATENTS, TEXT_CHANNELS, REWARDS, BINS = (4, 32, 32), 2048, 7, 64
"""Shapes of the presets: a latent, a text state, the rewards and their bins."""
T = TypeVar("T")


def argument_parser(doc: str | None, out: Path | None = RESULTS) -> argparse.ArgumentParser:
    """A parser with the first line of `doc` as description, and --out."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if out is not None:
        # argparse applies the type to a default that is a string.
        parser.add_argument(
            "--out",
            type=_created,
            default=str(out),
            help="folder of the results, created if absent",
        )
    return parser


def _created(path: str) -> Path:
    """Create the folder before anything is measured, or refuse it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder} cannot be written: {error}") from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, the GPU by default if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p20": ordered[len(ordered) // 5],
        "p80": ordered[min(len(ordered) - 1, len(ordered) * 4 // 5)],
    }


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Quantiles of the ratio to `base`, round by round."""
    return quantiles([a / b for a, b in zip(values, base, strict=True)])


def interleave(
    variants: Mapping[str, Callable[[int], T]], rounds: int, warmup: int = 1
) -> dict[str, list[T]]:
    """Run all variants in turn in every round, so that noise affects them equally.

    Args:
        variants: functions of the number of the round.
        rounds: whose results are returned.
        warmup: rounds before those that are returned.

    Returns:
        The results of each variant, one per round.
    """
    results: dict[str, list[T]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in variants.items():
            result = run(number)
            if number >= warmup:
                results[name].append(result)
    return results


def seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of a call, including the work that it enqueues on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def output_of(*command: str) -> str:
    """Standard output of a command run in the checkout; "unknown" without any."""
    if shutil.which(command[0]) is None:
        return "unknown"
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip() or "unknown"


def commit() -> str:
    """Commit of this checkout, with -dirty if files differ from it."""
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def metadata(device: str) -> dict[str, Any]:
    """Date, device, threads, torch, commit and command line, for the head of a result."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON and print its path, or the record if it cannot be written."""
    text = json.dumps(record, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        print(text)  # Not lost.
        raise
    print(path)
