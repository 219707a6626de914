"""The HTML page of `miro inspect`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from miro.inspect.summary import ContactSheet, Correlation, DatasetSummary, RewardStats
from miro.report import plots
from miro.report.render import label, number, plot, write_page

_MAX_REASONS = 30  # listed; the rest are in the JSON
_MAX_CAPTION = 400  # characters
_QUANTILES = {
    "0.0": "lowest", "0.01": "1 %", "0.25": "25 %", "0.5": "median", "0.75": "75 %", "0.99": "99 %",
    "1.0": "highest",
}  # fmt: skip


def write_inspect_page(path: Path, summary: DatasetSummary) -> Path:
    """Write the page and return its path; all text of the dataset is escaped."""
    sheets: dict[str, list[dict[str, Any]]] = {}
    for reward in summary.rewards:
        of_reward = [_sheet(sheet) for sheet in summary.sheets if sheet.reward == reward.name]
        if of_reward:
            sheets[reward.name] = of_reward
    reasons = summary.rejected.reasons if summary.rejected else ()
    shorter_side = summary.sample_stats.shorter_side.values()
    aspect_ratio = summary.sample_stats.aspect_ratio.values()
    return write_page(
        path,
        "inspect.html",
        summary=summary,
        size=size_text(summary.bytes),
        histograms=[_histogram(i, reward) for i, reward in enumerate(summary.rewards)],
        quantile_names=_QUANTILES.values(),
        table=[_row(reward) for reward in summary.rewards],
        correlation=None if summary.correlation is None else _cells(summary.correlation),
        sheets=sheets,
        reasons=reasons[:_MAX_REASONS],
        reasons_left_out=max(0, len(reasons) - _MAX_REASONS),
        sizes=[
            ("Shorter side, pixels", [number(value, 100) for value in shorter_side]),
            ("Width / height", [number(value, 1) for value in aspect_ratio]),
        ]
        if summary.sample_stats.sizes
        else [],
    )


def size_text(count: float) -> str:
    """Format a number of bytes: 512 B, 1.4 MB, 12 GB."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.{1 if count < 9.95 else 0}f} {unit}"
    return f"{count / 1000:,.1f} TB"


def _histogram(index: int, reward: RewardStats) -> dict[str, Any]:
    """The plot of a reward, None if there is nothing to plot, and the note below it."""
    notes = []
    if reward.model is not None:
        notes.append(f"Scored by {reward.model}.")
    if not reward.scored:
        notes.append("All scores are missing.")
    elif reward.distinct == 1:
        notes.append(
            f"Constant: every score is {reward.mean:g}. It has no best or worst, and conditioning "
            "on it has no effect."
        )
    if reward.below or reward.above:
        notes.append(f"Outside the plot: {reward.below:,} below, {reward.above:,} above.")
    figure = None
    if reward.distinct > 1:
        figure = plots.histogram(reward.histogram_edges, reward.histogram, reward.bin_edges)
    return {
        "reward": reward,
        "note": " ".join(notes),
        "plot": None if figure is None else plot(figure, f"histogram {index}"),
    }


def _row(reward: RewardStats) -> dict[str, Any]:
    """A row of the table of scores."""
    # The interquartile range sets the decimals, so that an outlier does not round the others away.
    typical = max((abs(reward.quantiles[q]) for q in ("0.25", "0.75") if reward.scored), default=0)
    return {
        "reward": reward,
        "mean": number(reward.mean, typical),
        "quantiles": [number(reward.quantiles.get(q), typical) for q in _QUANTILES],
    }


def _cells(correlation: Correlation) -> list[dict[str, Any]]:
    """The correlation as rows of cells: text, number of pairs, and background color."""
    rows = []
    for name, values, pairs in zip(
        correlation.rewards, correlation.values, correlation.pairs, strict=True
    ):
        cells = [
            {
                "text": "–" if value is None else f"{value:.2f}".replace("-", "−"),
                "pairs": count,
                "color": "other-1" if (value or 0) < 0 else "miro",
                "percent": 0 if value is None else round(75 * abs(value)),
            }
            for value, count in zip(values, pairs, strict=True)
        ]
        rows.append({"reward": name, "cells": cells})
    return rows


def _sheet(sheet: ContactSheet) -> dict[str, Any]:
    """A contact sheet and the text of each of its samples."""
    largest = max((abs(sample.score) for sample in sheet.samples), default=0.0)
    samples = []
    for sample in sheet.samples:
        score, caption = number(sample.score, largest), sample.caption
        if len(caption) > _MAX_CAPTION:
            caption = caption[:_MAX_CAPTION] + " …"
        title = f"{score}: {caption} ({sample.key}, {sample.caption_type})"
        samples.append({"score": score, "caption": caption, "title": title})
    source = "data:image/jpeg;base64," + base64.b64encode(sheet.jpeg).decode()
    return {
        "title": f"{label(sheet.reward)}, {sheet.end}",
        "samples": samples,
        "skipped": sheet.skipped,
        "columns": sheet.columns,
        "source": source if sheet.jpeg else None,
    }
