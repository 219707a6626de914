"""The demo's command line: `python -m openmoji COMMAND`, with examples/ on PYTHONPATH."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from miro.cli.main import Command, run_command
from miro.utils.progress import bar, console
from openmoji.demo import DemoConfig
from openmoji.fit_clip import FitClipConfig
from openmoji.verifier import VerifierConfig

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


def demo(config: Annotated[DemoConfig, Inline] = DemoConfig()) -> None:  # noqa: B008 frozen
    """Everything, from pictures to a report, on two CPU cores; stopped, it goes on where it was.

    Args:
        config: where, and how much.
    """
    from openmoji.demo import run_demo

    console.print(f"the report is {run_demo(config)}")


def scenes(
    dest: Positional[Path],
    samples: int = 30_000,
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    clean: bool = False,
    wrong_captions: float = 0.5,
) -> None:
    """Compose captioned pictures from OpenMoji artwork, uncurated like the web.

    Args:
        dest: the dataset folder to make.
        samples: how many pictures.
        seed: of everything random in them.
        split: no composition occurs in both splits.
        clean: no blur, noise or faded colours, and only true captions.
        wrong_captions: share of captions that are not true of their picture.
    """
    from openmoji.scenes import write_scenes

    manifest = write_scenes(
        dest, samples=samples, seed=seed, split=split, clean=clean, wrong_captions=wrong_captions
    )
    console.print(f"{dest}: {manifest.samples} pictures in {len(manifest.shards)} shards")


def fit_clip(
    data: Positional[Path],
    dest: Positional[Path],
    config: Annotated[FitClipConfig, Inline] = FitClipConfig(),  # noqa: B008 frozen
) -> None:
    """Fit a small open_clip model to a dataset's own pairs, for the alignment reward.

    Args:
        data: a dataset folder of captioned images.
        dest: the folder to write; give it to annotate as alignment=DEST.
        config: its size and training.
    """
    from openmoji.fit_clip import fit_clip as run

    with bar("fit-clip") as progress:
        run(data, dest, config=config, progress=progress)
    console.print(f"{dest}: use it as `miro annotate ... --rewards alignment={dest}`")


def fit_verifier(
    dest: Positional[Path],
    config: Annotated[VerifierConfig, Inline] = VerifierConfig(),  # noqa: B008 frozen
) -> None:
    """Train the held-out judge of scenes, which no model is conditioned on.

    Args:
        dest: the folder to write.
        config: its size and training.
    """
    from openmoji.verifier import fit_verifier as run

    run(dest, config)
    console.print(f"{dest}: verifier written, its accuracy is in {dest / 'metrics.json'}")


def report(folder: Positional[Path] = Path("runs/demo")) -> None:
    """Write the demo's HTML report again from what its folder holds.

    Args:
        folder: the demo's folder.
    """
    from openmoji.demo_page import write_demo_report

    console.print(str(write_demo_report(folder)))


COMMANDS = {
    name: Command(
        f"openmoji.__main__:{function.__name__}", (function.__doc__ or "").splitlines()[0]
    )
    for name, function in {
        "demo": demo,
        "scenes": scenes,
        "fit-clip": fit_clip,
        "fit-verifier": fit_verifier,
        "report": report,
    }.items()
}

if __name__ == "__main__":
    run_command("python -m openmoji", COMMANDS)
