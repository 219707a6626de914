"""The statistics of `inspect` against values computed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.inspect_pages import make_dataset, page_of, text_of

from miro.inspect.inspect_page import size_text
from miro.inspect.rejected_counts import read_rejected
from miro.inspect.score_stats import argsort_scores, dense_ranks, rank_correlation

NAN = float("nan")


def correlation_of(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, int]:
    columns = [np.array(values, np.float32) for values in (a, b)]
    return rank_correlation(*(dense_ranks(column, argsort_scores(column)) for column in columns))


def test_spearman_averages_ties_and_ignores_missing_scores() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: their deviations give 4.5 / sqrt(4.5 * 5).
    tied, count = correlation_of([1, 2, 2, 3], [1, 3, 2, 4])
    # A pair with one missing score has no rank in the other: 1, 2, 3 and 3, 1, 2 are left.
    masked, left = correlation_of([1, NAN, 2, 3, 9], [8, 5, 1, 7, NAN])

    assert (tied, count) == (pytest.approx((4.5 / 5) ** 0.5, abs=1e-12), 4)
    assert (masked, left) == (pytest.approx(-0.5, abs=1e-12), 3)
    assert correlation_of([1, 2, 3], [3e8, 2e-8, -7]) == (pytest.approx(-1), 3)


def test_a_constant_reward_or_a_single_pair_has_no_correlation() -> None:
    assert correlation_of([1, 2, 3], [5, 5, 5]) == (None, 3)
    assert correlation_of([1, 2, NAN], [NAN, 2, 3]) == (None, 1)
    assert correlation_of([], []) == (None, 0)


def test_reward_statistics(tmp_path: Path) -> None:
    scores = {"clip": [5, 1, 3, 3, NAN, 2, 4, 0, 9, 3], "vqa": [0, 1, 2, 3, 4, 5, 6, 7, 8, NAN]}

    html, record = page_of(make_dataset(tmp_path, scores), bins=4)

    clip = record["rewards"][0]
    assert (clip["scored"], clip["missing"], clip["distinct"]) == (9, 1, 7)
    assert clip["mean"] == pytest.approx(30 / 9)
    assert clip["quantiles"] == {
        "0.0": 0, "0.01": 0, "0.25": 2, "0.5": 3, "0.75": 4, "0.99": 9, "1.0": 9
    }  # fmt: skip
    # The bins of 0 1 2 3 3 3 4 5 9 begin at indices 2, 4 and 6.
    assert clip["bin_edges"] == [2, 3, 4] and clip["bins_used"] == 4
    assert sum(clip["histogram"]) == 9
    assert len(clip["histogram_edges"]) == len(clip["histogram"]) + 1
    assert record["correlation"]["pairs"] == [[9, 8], [8, 9]]
    assert record["correlation"]["values"][0][0] == pytest.approx(1)
    assert "Spearman" in html and html.count("<svg") == 2


def test_outliers_are_outside_the_histogram_and_counted(tmp_path: Path) -> None:
    scores = np.linspace(0, 1, 3000)
    scores[[0, 1, 2]] = 1e6, -1e6, 2e6

    html, record = page_of(make_dataset(tmp_path, {"clip": scores.tolist()}, count=3000), images=0)

    (clip,) = record["rewards"]
    assert (clip["below"], clip["above"]) == (3, 3)
    assert 0 <= clip["histogram_edges"][0] < clip["histogram_edges"][-1] <= 1
    assert sum(clip["histogram"]) == 2994
    assert "Outside the plot: 3 below, 3 above" in text_of(html)


def test_counts_of_captions_and_image_sizes(tmp_path: Path) -> None:
    captions = [{"original": "a" * (i + 1), "long": "same"} for i in range(6)]
    del captions[2]["long"]
    folder = make_dataset(tmp_path, {"clip": list(range(11))}, captions=captions)

    html, record = page_of(folder)

    assert (record["samples"], record["shards"], record["pairs"]) == (6, 2, 11)
    assert record["bytes"] == sum(path.stat().st_size for path in folder.glob("shards/*"))
    stats = record["sample_stats"]
    assert stats["complete"] and stats["caption_types"] == {"original": 6, "long": 5}
    assert (stats["captions"], stats["distinct"], stats["max_length"]) == (11, 7, 6)
    assert stats["mean_length"] == pytest.approx((21 + 20) / 11)
    assert stats["sizes"]["40 × 24"] == 1 and len(stats["sizes"]) == 6
    assert (stats["shorter_side"]["0.0"], stats["shorter_side"]["1.0"]) == (24, 29)
    assert "40 × 29" in text_of(html)


def test_a_subset_of_a_large_dataset_is_spread_over_its_shards(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, {"clip": list(range(10))}, shards=5)

    html, record = page_of(folder, max_samples=3)

    assert not record["sample_stats"]["complete"]
    assert record["sample_stats"]["sizes"] == {"40 × 24": 1, "40 × 26": 1, "40 × 30": 1}
    assert "Of 3 samples, the first ones of shards spread over the dataset" in text_of(html)
    assert record["rewards"][0]["scored"] == 10


def test_rewards_without_or_with_constant_scores_have_no_plot_and_no_sheets(tmp_path: Path) -> None:
    scores = {"clip": [0.25] * 10, "vqa": [NAN] * 10, "hpsv2": list(range(10))}

    html, record = page_of(make_dataset(tmp_path, scores))

    assert "every score is 0.25" in text_of(html)
    assert "All scores are missing." in text_of(html)
    assert html.count("<svg") == 1
    assert {sheet["reward"] for sheet in record["sheets"]} == {"hpsv2"}
    constant, missing, _ = record["rewards"]
    assert (constant["distinct"], constant["bins_used"], constant["mean"]) == (1, 1, 0.25)
    assert (missing["scored"], missing["missing"], missing["mean"]) == (0, 10, None)
    assert record["correlation"]["values"][0] == [None, None, None]


def test_rejected_lines_are_counted_by_reason_without_names_and_numbers(tmp_path: Path) -> None:
    lines = [
        {"source": "a/cat.jpg", "field": "caption", "reason": "cat.txt is missing"},
        {"source": "a/dog.jpg", "field": "caption", "reason": "dog.txt is missing"},
        {"source": "t.tar:7", "field": "image", "reason": "12 x 9 pixels, more than 64,000,000"},
        {"source": "t.tar:8", "field": "image", "reason": "7 x 1 pixels, more than 64,000,000"},
        {"source": "t.tar:9", "field": "image", "reason": "not known (b'\\x00a'…)"},
        {"source": "empty.jpg", "field": "caption", "reason": "the caption is empty"},
    ]
    path = tmp_path / "rejected.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"source": "torn')

    rejected = read_rejected(path)

    assert rejected is not None
    assert (rejected.lines, rejected.invalid) == (7, 1)
    assert rejected.reasons == (
        ("caption", "….txt is missing", 2),
        ("image", "… x … pixels, more than …", 2),
        ("image", "not known (…)", 1),
        ("caption", "the caption is empty", 1),
    )
    assert rejected.examples[0] == ("a/cat.jpg", "caption", "cat.txt is missing")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_900, "1.0 MB"), (5.2e12, "5.2 TB")],
)
def test_sizes_are_formatted_with_units(count: int, text: str) -> None:
    assert size_text(count) == text
