"""The demo's command line: `PYTHONPATH=examples python -m openmoji COMMAND`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from miro.cli.main import Command, run_command
from miro.utils.atomic_io import write_text
from miro.utils.progress import bar, console
from openmoji.demo import DemoConfig
from openmoji.fit_clip import FitClipConfig
from openmoji.verifier import VerifierConfig

Inline = tyro.conf.arg(name="")
Positional = tyro.conf.Positional


def demo(config: Annotated[DemoConfig, Inline] = DemoConfig()) -> None:  # noqa: B008 frozen
    """Run everything from images to a report, on two CPU cores; resumes if interrupted.

    Args:
        config: folder and size.
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
    """Write a dataset folder of captioned scenes of mixed quality.

    Args:
        dest: the dataset folder.
        samples: number of images.
        seed: of all randomness.
        split: the two splits have no composition in common.
        clean: no blur, noise or faded colors.
        wrong_captions: share of false captions.
    """
    from openmoji.scenes import write_scenes

    manifest = write_scenes(
        dest, samples=samples, seed=seed, split=split, clean=clean, wrong_captions=wrong_captions
    )
    console.print(f"{dest}: {manifest.samples} images in {len(manifest.shards)} shards")


def prompts(dest: Positional[Path], count: int = 768, seed: int = 91_919) -> None:
    """Write held-out prompts, one per line, for `miro evaluate --prompts`.

    Args:
        dest: the text file.
        count: number of prompts; a multiple of 6 has equally many of each category.
        seed: of the order; the default is that of the demo's final evaluations.
    """
    from openmoji.scenes import heldout_prompts

    lines = [f"{prompt.caption}\n" for prompt in heldout_prompts(count, seed)]
    write_text(dest, "".join(lines))
    console.print(f"{dest}: {count} prompts")


def fit_clip(
    data: Positional[Path],
    dest: Positional[Path],
    config: Annotated[FitClipConfig, Inline] = FitClipConfig(),  # noqa: B008 frozen
) -> None:
    """Fit the small CoCa of the alignment reward to a dataset's own pairs.

    Args:
        data: a dataset folder of captioned images.
        dest: the folder to write.
        config: size and training.
    """
    from openmoji.fit_clip import fit_clip as run

    with bar("fit-clip") as progress:
        run(data, dest, config=config, progress=progress)
    console.print(
        f"{dest}: use it as `miro annotate ... --rewards openmoji.alignment:Alignment={dest}`"
    )


def fit_verifier(
    dest: Positional[Path],
    config: Annotated[VerifierConfig, Inline] = VerifierConfig(),  # noqa: B008 frozen
) -> None:
    """Train the verifier of scenes, an evaluator that no model is conditioned on.

    Args:
        dest: the folder to write.
        config: size and training.
    """
    from openmoji.verifier import fit_verifier as run

    run(dest, config)
    console.print(
        f"{dest}: accuracy in metrics.json; use it as `miro evaluate ... --rewards "
        f"openmoji.verifier:VerifierReward={dest}`"
    )


def report(folder: Positional[Path] = Path("runs/demo"), readme: Path | None = None) -> None:
    """Write the demo's HTML report again.

    Args:
        folder: the demo's folder.
        readme: a folder for grid.png and curves.png, the images of the README.
    """
    from openmoji.demo_page import write_demo_report
    from openmoji.readme_images import write_readme_images

    console.print(str(write_demo_report(folder)))
    if readme is not None:
        write_readme_images(folder, readme)


COMMANDS = {
    name: Command(
        f"openmoji.__main__:{function.__name__}", (function.__doc__ or "").splitlines()[0]
    )
    for name, function in {
        "demo": demo,
        "scenes": scenes,
        "prompts": prompts,
        "fit-clip": fit_clip,
        "fit-verifier": fit_verifier,
        "report": report,
    }.items()
}

if __name__ == "__main__":
    run_command("python -m openmoji", COMMANDS)
