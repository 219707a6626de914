"""The two images of the README: a grid with its labels, and the training curves."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from miro.report.plots import PALETTE
from miro.report.render import label
from openmoji.demo_page import curve_sheet_panels
from openmoji.demo_plots import curves_sheet, png
from openmoji.page_data import Grid, read_demo

_FONT = "fonts/ttf/DejaVuSans.ttf"  # part of matplotlib; has characters like ⁺
_WIDTH = 960  # pixels of the grid beside its row labels
_SIZE = 15  # of the font in pixels


def write_readme_images(folder: Path, dest: Path) -> tuple[Path, Path]:
    """Write the first grid of a demo to DEST/grid.png and its curves to DEST/curves.png.

    Returns:
        Both paths.

    Raises:
        ValueError: The demo has no grid or no curves, or a file is invalid.
    """
    demo = read_demo(folder)
    if not demo.grids:
        raise ValueError(f"{folder / 'grids.json'}: no grid; run `python -m openmoji demo`")
    panels = curve_sheet_panels(demo)
    if not panels:
        raise ValueError(f"{folder / 'curves.json'}: no curves; run `python -m openmoji demo`")
    dest.mkdir(parents=True, exist_ok=True)
    grid, curves = dest / "grid.png", dest / "curves.png"
    # 256 colors halve the file, without a visible difference.
    _labelled(demo.grids[0]).quantize(256).save(grid, optimize=True)
    names = {model: label(model) for row in panels for panel in row for model in panel["scores"]}
    curves.write_bytes(png(curves_sheet(panels, names)))
    return grid, curves


def _labelled(grid: Grid) -> Image.Image:
    """The grid enlarged by an integer factor, with labels at the left and above."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / _FONT), _SIZE)
    small = font.font_variant(size=_SIZE - 3)
    cell = grid.cell * max(1, min(4, _WIDTH // (len(grid.columns) * grid.cell)))
    letters = max(4, round(cell / small.getlength("n")))
    heads = [textwrap.wrap(text, letters) for text in grid.columns]
    line, gap = _SIZE + 1, 8
    top = line * max(map(len, heads)) + 2 * gap
    left = round(max(font.getlength(text) for text in grid.rows)) + 2 * gap
    size = left + cell * len(grid.columns) + gap, top + cell * len(grid.rows) + gap
    sheet = Image.new("RGB", size, PALETTE["paper"])
    with Image.open(grid.image) as image:
        area = cell * len(grid.columns), cell * len(grid.rows)
        cells = image.convert("RGB").resize(area, Image.Resampling.NEAREST)
    sheet.paste(cells, (left, top))
    draw, ink = ImageDraw.Draw(sheet), PALETTE["ink"]
    for k, text in enumerate(grid.rows):
        draw.text((left - gap, top + cell * (k + 0.5)), text, ink, font, anchor="rm")
    for k, lines in enumerate(heads):
        middle, y = left + cell * (k + 0.5), top - gap - line * len(lines)
        for text in lines:
            draw.text((middle, y), text, PALETTE["muted"], small, anchor="ma")
            y += line
    # Thin lines between the cells, as on the page.
    paper, right, bottom = PALETTE["paper"], size[0] - gap, size[1] - gap
    for k in range(1, len(grid.columns)):
        draw.line([(left + k * cell, top), (left + k * cell, bottom)], paper)
    for k in range(1, len(grid.rows)):
        draw.line([(left, top + k * cell), (right, top + k * cell)], paper, width=3)
    return sheet
