"""The two pictures of the README: a grid with its labels drawn, and the training curves."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from miro.report import plots
from miro.report.render import label
from openmoji.demo_page import curve_sheet_panels
from openmoji.page_data import Grid, read_demo

_FONT = "fonts/ttf/DejaVuSans.ttf"  # comes with matplotlib and knows signs like ⁺
_WIDTH = 960  # pixels a sheet may take beside its row labels
_SIZE = 15  # pixels of the letters


def write_readme_pictures(folder: Path, dest: Path) -> tuple[Path, Path]:
    """Write dest/grid.png (the FIRST grid of grids.json) and dest/curves.png; return both paths.

    Raises:
        ValueError: the demo has no grid or no curves yet, or a file is broken; names it.
    """
    demo = read_demo(Path(folder))
    if not demo.grids:
        raise ValueError(f"{Path(folder) / 'grids.json'}: no grid; run `miro demo` to its end")
    panels = curve_sheet_panels(demo)
    if not panels:
        raise ValueError(f"{Path(folder) / 'curves.json'}: no curves; run `miro demo` to its end")
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    grid, curves = dest / "grid.png", dest / "curves.png"
    # 256 colours halve the file, and no eye sees it.
    _labelled(demo.grids[0]).quantize(256).save(grid, optimize=True)
    names = {model: label(model) for row in panels for panel in row for model in panel["scores"]}
    curves.write_bytes(plots.png(plots.curves_sheet(panels, names)))
    return grid, curves


def _labelled(grid: Grid) -> Image.Image:
    """The sheet, enlarged by a whole number, with its labels at the left and above."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / _FONT), _SIZE)
    small = font.font_variant(size=_SIZE - 3)
    cell = grid.cell * max(1, min(4, _WIDTH // (len(grid.columns) * grid.cell)))
    letters = max(4, round(cell / small.getlength("n")))
    heads = [textwrap.wrap(text, letters) for text in grid.columns]
    line, gap = _SIZE + 1, 8
    top = line * max(map(len, heads)) + 2 * gap
    left = round(max(font.getlength(text) for text in grid.rows)) + 2 * gap
    size = left + cell * len(grid.columns) + gap, top + cell * len(grid.rows) + gap
    sheet = Image.new("RGB", size, plots.PALETTE["paper"])
    with Image.open(grid.picture) as picture:
        area = cell * len(grid.columns), cell * len(grid.rows)
        cells = picture.convert("RGB").resize(area, Image.Resampling.NEAREST)
    sheet.paste(cells, (left, top))
    draw, ink = ImageDraw.Draw(sheet), plots.PALETTE["ink"]
    for k, text in enumerate(grid.rows):
        draw.text((left - gap, top + cell * (k + 0.5)), text, ink, font, anchor="rm")
    for k, lines in enumerate(heads):
        middle, y = left + cell * (k + 0.5), top - gap - line * len(lines)
        for text in lines:
            draw.text((middle, y), text, plots.PALETTE["muted"], small, anchor="ma")
            y += line
    # Hairlines part the cells, as the page's do.
    paper, right, bottom = plots.PALETTE["paper"], size[0] - gap, size[1] - gap
    for k in range(1, len(grid.columns)):
        draw.line([(left + k * cell, top), (left + k * cell, bottom)], paper)
    for k in range(1, len(grid.rows)):
        draw.line([(left, top + k * cell), (right, top + k * cell)], paper, width=3)
    return sheet
