"""Draws results as SVG: one file, or the history of several of one kind.

    python profiling/plot.py RESULT.json [RESULT.json ...] [--out FOLDER]

What is drawn of a file, its content tells. RESULT.svg lies beside it, and RESULT-NAME.svg where a
kind has several plots. Of several files the plot is history-KIND.svg: their main quantities by
date, each over its value in the first file; only files that can be compared are drawn together,
which are those of one device and equal settings. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from charts import lines, standalone
from pictures import Picture, pictures
from result_files import Quantity, Result, Spread, by_date, histories, read

HEADLINES = {
    "step budget": "bytes", "GPU check": "steps", "kernels": "bytes_over_inductor",
    "step": "images_per_second", "FLOPs": "forward", "sampling": "images_per_second",
    "precision": "images_per_second", "demo": "verifier", "data": "images_per_second",
    "rewards": "images_per_second",
}  # fmt: skip
"""The quantities of a kind that its history shows."""
MOST_LINES = 6


def history(results: Sequence[Result]) -> Picture | None:
    """The main quantities of comparable results over the first's; None where fewer than two are."""
    kind = results[0].kind.name
    known = [result.quantities for result in results]
    shared = [
        name
        for name, value in known[0].items()
        if HEADLINES.get(kind, "") in name and _middle(value) and any(name in k for k in known[1:])
    ][:MOST_LINES]
    if not shared:
        return None
    series = {
        name.replace("_", " "): [
            _middle(found[name]) / _middle(known[0][name]) if name in found else math.nan
            for found in known
        ]
        for name in shared
    }
    found = [value for row in series.values() for value in row if math.isfinite(value)]
    # Noise of a few percent must not look like news.
    limits = min(0.85, 0.95 * min(found)), max(1.15, 1.05 * max(found))
    days = [result.date for result in results]
    if len(set(days)) < len(days):
        days = [f"{result.date[5:]} {result.record.get('commit', '')}" for result in results]
    figure = lines(days, series, "date", limits)
    source = ", ".join(result.path.name for result in results)
    return Picture("history", results[0].series, "each over its first value", figure, source)


def _middle(value: Quantity) -> float:
    return value.median if isinstance(value, Spread) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, help="folder for the plots, in place of the first's")
    given = parser.parse_args()
    folder = given.out or given.results[0].parent
    try:
        found = by_date(map(read, given.results))
    except ValueError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    drawn = {}
    if len(found) == 1:
        stem = found[0].path.stem
        for place, picture in enumerate(pictures(found[0])):
            drawn[f"{stem}-{picture.name}" if place else stem] = picture
    else:
        for of_series in histories(found).values():
            picture = history(of_series) if len(of_series) > 1 else None
            if picture is not None:
                kind = of_series[0].kind.name.replace(" ", "-")
                drawn[f"history-{kind}-{len(drawn)}" if drawn else f"history-{kind}"] = picture
    if not drawn:
        print("plot: these files have no comparable quantity in common", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for stem, picture in drawn.items():
        path = folder / f"{stem}.svg"
        path.write_text(standalone(picture.figure, stem, picture.title, picture.note), "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
