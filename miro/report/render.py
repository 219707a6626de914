"""Rendering of reports as single HTML files, and formatting of numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from miro.report.plots import svg
from miro.utils.atomic_io import write_text

_FOLDER = Path(__file__).parent
_NAMES = {
    "baseline": "Baseline",
    "miro": "MIRO",
    "unguided": "No guidance",
    "guided": "Text guidance",
    "reward_guided": "Reward guidance",
}


def label(name: str) -> str:
    """A human-readable name: "only_alignment" becomes "Alignment only"."""
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("only_"):
        return f"{label(name[5:])} only"
    return name.replace("_", " ").capitalize()


def number(value: float | None, like: float | None = None) -> str:
    """Format to three significant digits or more; None and non-finite values are a dash.

    Args:
        value: The number.
        like: A number whose decimals are used instead, for columns of a table.
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value if like is None else like)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:z,.{decimals}f}".replace("-", "−")  # z: never −0.00


def duration(seconds: float | None) -> str:
    """Format seconds: 42 s, 8 min 45 s, 1 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plot(figure: Figure, name: str) -> Markup:
    """A figure as SVG markup for a template; matplotlib escapes the text in it."""
    return Markup(svg(figure, name))


def data_uri(path: Path) -> str:
    """A PNG file as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def page_colours() -> str:
    """The rules of page.css that define the colors of `plots.PALETTE`, light and dark."""
    css = (_FOLDER / "page.css").read_text("utf-8")
    return css[: css.index("* {")]


def write_page(path: Path, template: str, folders: Sequence[Path] = (), **values: Any) -> Path:
    """Render a template to `path` atomically, with all values escaped.

    Args:
        path: The HTML file.
        template: Name of a template in this folder or one of `folders`.
        folders: Additional folders of templates.
        **values: The variables of the template.
    """
    environment = Environment(
        loader=FileSystemLoader([_FOLDER, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = {"label": label, "number": number, "duration": duration}
    environment.filters |= formats
    environment.globals |= formats
    write_text(path, environment.get_template(template).render(**values))
    return path
