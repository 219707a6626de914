"""Sections of the page, and those on data, rewards, sampling, the demo and history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from compare import judge

from miro.report.render import label, number
from page.result_files import TYPE_BY_NAME, Quantity, Result, ResultType, Spread, histories, spread
from page.result_plots import Plot, history_plot, plots_of


class Provenance(NamedTuple):
    """MEASURED, COUNTED, PROJECTION or PUBLISHED, and from what."""

    label: str
    text: str


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells."""

    head: list[str]
    rows: list[list[str | Provenance]]
    title: str = ""
    folded: bool = False


@dataclass
class Section:
    """A question and its answer: sentences, tables, plots and their provenance.

    headline: a number for the top of the page, and what it is.
    """

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sources: list[Result] = field(default_factory=list)
    missing: list[ResultType] = field(default_factory=list)
    headline: tuple[str, str] | None = None

    def latest(self, results: Sequence[Result], name: str) -> Result | None:
        """The latest result of a type, added to `sources`; its type to `missing` without any."""
        result = next((r for r in reversed(results) if r.type.name == name), None)
        if result is None:
            self.missing.append(TYPE_BY_NAME[name])
        else:
            self.sources.append(result)
        return result

    def cite(self, label: str, text: str | Result) -> None:
        """Add a provenance."""
        self.provenance.append(Provenance(label, text if isinstance(text, str) else text.origin))

    def add_plots(self, result: Result, *names: str) -> None:
        """Add the plots of a result, all by default."""
        self.plots += [plot for plot in plots_of(result) if plot.name in names or not names]


def with_range(value: Quantity) -> str:
    """Format a number, with p20 and p80 if it has them."""
    if isinstance(value, Spread):
        median, low, high = value
        return f"{number(median)} ({number(low, median)}–{number(high, median)})"
    return f"{value:,.0f}" if value == int(value) else number(value)


def percent(share: float) -> str:
    """Format a share of 1 in whole percent."""
    return f"{100 * share:.0f} %"


def data(results: Sequence[Result]) -> Section:
    """Decoding against Pillow, and the time that training waits for the loader."""
    section = Section("data", "Data: decoding and loading")
    result = section.latest(results, "data")
    if result is None:
        return section
    loading = result.record["loading"]
    loader, step = (loading[f"{name}_images_per_second"]["median"] for name in ("loader", "step"))
    section.text.append(
        f"The loader alone reaches {number(loader)} images/s. A training step of the demo behind "
        f"it consumes {number(step)} and waits for data "
        f"{100 * loading['share_of_time_waiting']:.1f} % of the time."
    )
    rows: list[list[str | Provenance]] = []
    for row in result.record["decoding"]:
        size = " × ".join(f"{side:g}" for side in row["pixels"])
        for name, rate in row["images_per_second"].items():
            ratio = row["ratio_to_pillow"].get(name, {}).get("median")
            rows.append([row["task"], size, name, number(rate["median"]), number(ratio)])
    head = ["task", "pixels", "decoder", "images/s", "/ Pillow"]
    section.tables.append(Table(head, rows, "All decoders", folded=True))
    section.cite("MEASURED", result)
    section.add_plots(result)
    return section


def rewards(results: Sequence[Result]) -> Section:
    """One pass over the images against one per reward, and the cost of scoring a dataset."""
    section = Section("rewards", "Rewards: scoring a dataset")
    result = section.latest(results, "rewards")
    if result is not None:
        ratio = spread(result.record["scoring"]["ratio_to_separate_passes"])
        plan = result.record["projection"]
        share = percent(plan["assumed_share_of_peak"])
        section.text += [
            f"Seven rewards in one pass over the images reach {number(ratio.median)} × the "
            f"images/s of seven passes ({number(ratio.p20)} to {number(ratio.p80)}), with stub "
            "networks that each take as long as decoding.",
            f"Scoring {plan['images'] / 1e6:g} M images is projected to take "
            f"{plan['projected_h100_hours']:.0f} H100-hours at {share} of peak; the released code "
            f"took {plan['released_gpu_hours']:.0f}.",
        ]
        section.cite("MEASURED", result)
        section.cite("PROJECTION", f"{share} of an H100’s peak in the networks; no other cost")
        section.add_plots(result)
    on_gpu = section.latest(results, "rewards on a GPU")
    if on_gpu is not None:
        section.text.append(
            f"Timed on {on_gpu.device}, random networks of the published sizes take "
            f"{on_gpu.record['networks']['gpu_hours']:.0f} GPU-hours for the same."
        )
        section.cite("MEASURED", on_gpu)
        section.add_plots(on_gpu)
    return section


def sampling(results: Sequence[Result]) -> Section:
    """Latency and throughput of sampling, and of bf16 and compilation on a CPU."""
    section = Section("sampling", "Sampling, and precision on a CPU")
    result = section.latest(results, "sampling")
    if result is not None:
        variants = result.record["variants"]
        most = max(variants, key=lambda name: variants[name]["images_per_second"]["median"])
        least = min(variants, key=lambda name: variants[name]["seconds"]["median"])
        section.text.append(
            f"The {result.record['settings']['preset']} preset samples up to "
            f"{number(variants[most]['images_per_second']['median'])} images/s ({most}); the "
            f"lowest latency is {number(variants[least]['seconds']['median'])} s ({least})."
        )
        rows: list[list[str | Provenance]] = [
            [name, with_range(spread(row["seconds"])),
             number(row["images_per_second"]["median"]), number(row["ratio"]["eager"]["median"])]
            for name, row in variants.items()
        ]  # fmt: skip
        section.tables.append(Table(["", "s (p20–p80)", "images/s", "/ eager"], rows))
    for source in (result, section.latest(results, "precision")):
        if source is not None:
            section.cite("MEASURED", source)
            section.add_plots(source)
    return section


def demo(results: Sequence[Result]) -> Section:
    """Data efficiency of reward conditioning in all runs of the demo."""
    section = Section("demo", "The demo: does reward conditioning still train faster?")
    last = section.latest(results, "demo")
    if last is None:
        return section
    runs = [result for result in results if result.type is last.type]
    section.sources[:] = runs
    settings = list(dict.fromkeys(s for run in runs for s in run.record["data_efficiency"]))
    head = ["run", "seed", "commit"]
    rows: list[list[str | Provenance]] = [
        [run.path.stem, str(run.record.get("seed", "–")), run.record["commit"]] for run in runs
    ]
    for setting in settings:
        factors = [run.record["data_efficiency"].get(setting, {}).get("verifier") for run in runs]
        reached = [factor for factor in factors if factor is not None]
        span = f", on {number(min(reached))} to {number(max(reached))} × fewer images"
        section.text.append(
            f"{label(setting)}: in {len(reached)} of {len(runs)} runs MIRO reached the baseline’s "
            f"final verifier score earlier{span if reached else ''}."
        )
        head += [f"data efficiency, {label(setting).lower()}", "verifier: baseline / MIRO"]
        for run, row, factor in zip(runs, rows, factors, strict=True):
            scores = run.record["final"].get(setting, {})
            pair = (scores.get(model, {}).get("verifier") for model in ("baseline", "miro"))
            row += [number(factor), " / ".join(map(number, pair))]
    section.text.append(
        "The largest factor of a run, where several scores share it, is reached at the first "
        "evaluation and so is a lower bound."
    )
    section.tables.append(Table(head, rows))
    section.cite("MEASURED", last)
    section.add_plots(last)
    return section


def history(results: Sequence[Result]) -> Section:
    """All counted and timed quantities of comparable files by date."""
    section = Section("history", "History of every counted and timed quantity")
    series = histories(results)
    repeated = sum(len(files) > 1 for files in series.values())
    section.text.append(
        f"{len(series)} series of files with equal device and settings, {repeated} of them with "
        "more than one date. The verdict is that of compare.py: timed quantities differ where "
        "their ranges from p20 to p80 do not overlap."
    )
    for name, files in series.items():
        if len(files) > 1 and (plot := history_plot(files)):
            section.plots.append(plot)
        columns = [file.quantities for file in files]
        rows: list[list[str | Provenance]] = []
        for quantity in dict.fromkeys(name for column in columns for name in column):
            values = [column.get(quantity) for column in columns]
            cells = ["–" if value is None else with_range(value) for value in values]
            rows.append(
                [quantity, *cells, _verdict(quantity, [v for v in values if v is not None])]
            )
        dates = [
            f"{file.date or 'undated'}, {file.record.get('commit', 'no commit')}" for file in files
        ]
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}, {len(rows)} quantities"
        head = ["", *dates, "last change"]
        section.tables.append(Table(head, rows, f"{name} ({count})", folded=True))
    return section


def _verdict(name: str, values: Sequence[Quantity]) -> str:
    if len(values) < 2:
        return ""
    before, after = (v._asdict() if isinstance(v, Spread) else v for v in values[-2:])
    return judge(tuple(name.split(": ")), before, after).verdict
