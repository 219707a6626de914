"""Folders of captioned images, and the files of a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def encoded_image(number: int, form: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_image_folder(root: Path, count: int = 12) -> Path:
    """Write images of three formats with captions into subfolders; every fifth is truncated."""
    for i in range(count):
        form = ("PNG", "JPEG", "WEBP")[i % 3]
        path = root / f"part {i % 2}" / f"{i:03d}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded_image(i, form, (6 + i % 4, 8))
        path.write_bytes(data[:40] if i % 5 == 4 else data)
        path.with_suffix(".txt").write_text(f"image number {i}\n")
    return root


def file_contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def dataset_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the empty lock files, of which there is one per rank."""
    return {name: data for name, data in file_contents(folder).items() if ".lock" not in name}


def rejected_lines(folder: Path) -> list[dict[str, str]]:
    """The lines of rejected.jsonl: source, field and reason."""
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
