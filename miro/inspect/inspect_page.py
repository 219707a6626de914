"""The page of a dataset: one HTML file from its numbers and contact sheets."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from miro.inspect.summary import Correlation, RewardNumbers, Sheet, Survey
from miro.report import plots
from miro.report.render import label, number, plot, write_page

_MOST_REASONS = 30  # listed; the rest are in the JSON
_MOST_CAPTION = 400  # characters of a caption
_QUANTILES = {
    "0.0": "lowest", "0.01": "1 %", "0.25": "25 %", "0.5": "median", "0.75": "75 %", "0.99": "99 %",
    "1.0": "highest",
}  # fmt: skip


def write_survey_page(path: Path, survey: Survey) -> Path:
    """Write the page and return its path; every text of the dataset's is escaped."""
    names = [reward.name for reward in survey.rewards]
    rejected = survey.rejected
    return write_page(
        path,
        "inspect.html",
        survey=survey,
        size=size_text(survey.bytes),
        histograms=[_histogram(i, reward) for i, reward in enumerate(survey.rewards)],
        quantile_names=_QUANTILES.values(),
        table=[_row(reward) for reward in survey.rewards],
        correlation=None if survey.correlation is None else _cells(survey.correlation),
        sheets={
            name: sheets
            for name in names
            if (sheets := [_sheet(sheet) for sheet in survey.sheets if sheet.reward == name])
        },
        reasons=[] if rejected is None else rejected.reasons[:_MOST_REASONS],
        reasons_left_out=0 if rejected is None else max(0, len(rejected.reasons) - _MOST_REASONS),
        sizes=[
            (title, [number(values[q], 100 if whole else 1) for q in values])
            for title, values, whole in (
                ("Shorter side, pixels", survey.looks.shorter_side, True),
                ("Width / height", survey.looks.aspect, False),
            )
            if values
        ],
    )


def size_text(count: float) -> str:
    """Bytes as people read them: 512 B, 1.4 MB, 12 GB."""
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.{1 if count < 9.95 else 0}f} {unit}"
    return f"{count / 1000:,.1f} TB"


def _histogram(number_of: int, reward: RewardNumbers) -> dict[str, Any]:
    """A reward's plot, or why there is none, and what must be said beside it."""
    notes = []
    if reward.model is not None:
        notes.append(f"Scored by {reward.model}.")
    if not reward.known:
        notes.append("No score is known.")
    elif reward.distinct == 1:
        notes.append(
            f"Constant: every known score is {reward.mean:g}. It has no best or worst, and teaches"
            " nothing."
        )
    if reward.below or reward.above:
        notes.append(f"Beyond the bars: {reward.below:,} below, {reward.above:,} above.")
    figure = None
    if reward.distinct > 1:
        figure = plots.histogram(reward.bar_edges, reward.bars, reward.bin_edges)
    return {
        "reward": reward,
        "note": " ".join(notes),
        "plot": None if figure is None else plot(figure, f"histogram {number_of}"),
    }


def _row(reward: RewardNumbers) -> dict[str, Any]:
    """A line of the table of scores."""
    # The middle half sets the decimals: one score far out must not round the others away.
    usual = max((abs(reward.quantiles[q]) for q in ("0.25", "0.75") if reward.known), default=0.0)
    return {
        "reward": reward,
        "mean": number(reward.mean, usual),
        "quantiles": [number(reward.quantiles.get(q), usual) for q in _QUANTILES],
    }


def _cells(correlation: Correlation) -> list[dict[str, Any]]:
    """The correlation as rows of cells: text, pairs, and how much of which colour lies behind."""
    rows = []
    for name, values, pairs in zip(
        correlation.rewards, correlation.values, correlation.pairs, strict=True
    ):
        cells = [
            {
                "text": "–" if value is None else f"{value:.2f}".replace("-", "−"),
                "pairs": count,
                "colour": "other-1" if (value or 0) < 0 else "miro",
                "share": 0 if value is None else round(75 * abs(value)),
            }
            for value, count in zip(values, pairs, strict=True)
        ]
        rows.append({"reward": name, "cells": cells})
    return rows


def _sheet(sheet: Sheet) -> dict[str, Any]:
    """A contact sheet with the text of each of its places."""
    largest = max((abs(shown.score) for shown in sheet.shown), default=0.0)
    places = []
    for shown in sheet.shown:
        score, caption = number(shown.score, largest), shown.caption
        if len(caption) > _MOST_CAPTION:
            caption = caption[:_MOST_CAPTION] + " …"
        title = f"{score}: {caption} ({shown.key}, {shown.kind})"
        places.append({"score": score, "caption": caption, "title": title})
    source = "data:image/jpeg;base64," + base64.b64encode(sheet.jpeg).decode()
    return {
        "title": f"{label(sheet.reward)}, {sheet.end}",
        "end": sheet.end,
        "places": places,
        "skipped": sheet.skipped,
        "columns": sheet.columns,
        "source": source if sheet.jpeg else None,
    }
