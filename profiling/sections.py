"""What the page is made of, and the parts that follow its four answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from compare import judge
from pictures import Picture, pictures
from plot import history
from result_files import Quantity, Result, Spread, histories, latest, spread
from result_kinds import KIND, Kind

from miro.report.render import label, number


class Basis(NamedTuple):
    """What a number rests on."""

    word: str
    """MEASURED, COUNTED, PROJECTION or PUBLISHED."""
    said: str


@dataclass(frozen=True)
class Table:
    """Rows of text; a `Basis` among them is shown as its label."""

    head: list[str]
    rows: list[list[str | Basis]]
    title: str = ""
    folded: bool = False


@dataclass
class Section:
    """A question, its answer in sentences, and what they are read from."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    basis: list[Basis] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sources: list[Result] = field(default_factory=list)
    missing: list[Kind] = field(default_factory=list)
    headline: tuple[str, str] | None = None
    """A figure, and what it is, for the head of the page."""

    def take(self, results: Sequence[Result], kind: str) -> Result | None:
        """The latest of a kind, noted as a source, or as missing."""
        found = latest(results, kind)
        if found is None:
            self.missing.append(KIND[kind])
        else:
            self.sources.append(found)
        return found

    def draw(self, result: Result, *names: str) -> None:
        """The plots of a file, all or those of `names`."""
        drawn = pictures(result)
        self.pictures += [picture for picture in drawn if not names or picture.name in names]


def measured(result: Result) -> Basis:
    """The label of what a file timed or scored."""
    return Basis("MEASURED", f"{result.made} ({result.path.name})")


def counted(result: Result) -> Basis:
    """The label of what a file counted."""
    return Basis("COUNTED", f"{result.made} ({result.path.name})")


def shown(value: Quantity) -> str:
    """A number with its spread."""
    if isinstance(value, Spread):
        middle, low, high = value
        return f"{number(middle)} ({number(low, middle)}–{number(high, middle)})"
    return f"{value:,.0f}" if value == int(value) else number(value)


def percent(share: float) -> str:
    """A share of 1 as whole percent."""
    return f"{100 * share:.0f} %"


def data(results: Sequence[Result]) -> Section:
    """Decoding beside Pillow, and whether training waits for the loader."""
    section = Section("data", "Data: decoding and loading")
    found = section.take(results, "data")
    if found is None:
        return section
    loading = found.record["loading"]
    loader, step = (loading[f"{who}_images_per_second"]["median"] for who in ("loader", "step"))
    section.text.append(
        f"The loader alone makes {number(loader)} images/s; a training step of the demo behind it "
        f"takes in {number(step)}, and waits for data "
        f"{100 * loading['share_of_time_waiting']:.1f} % of the time."
    )
    rows: list[list[str | Basis]] = []
    for row in found.record["decoding"]:
        size = " × ".join(f"{side:g}" for side in row["pixels"])
        for name, rate in row["images_per_second"].items():
            ratio = row["ratio_to_pillow"].get(name, {}).get("median")
            rows.append([row["task"], size, name, number(rate["median"]), number(ratio)])
    head = ["task", "pixels", "by", "images/s", "over Pillow"]
    section.tables.append(Table(head, rows, "Every way to decode", folded=True))
    section.basis.append(measured(found))
    section.draw(found)
    return section


def rewards(results: Sequence[Result]) -> Section:
    """Rewards together against one after another, and what scoring a data set takes."""
    section = Section("rewards", "Rewards: scoring a data set")
    found = section.take(results, "rewards")
    if found is not None:
        ratio = found.record["scoring"]["together_to_apart"]
        plan = found.record["projection"]
        section.text += [
            f"Seven rewards in one pass over the pictures do {number(ratio['median'])} × the "
            f"images/s of seven passes ({number(ratio['p20'])} to {number(ratio['p80'])}), with "
            "stand-ins that each take as long as decoding.",
            f"Scoring {plan['pictures'] / 1e6:g} M pictures is projected to take "
            f"{plan['projected_h100_hours']:.0f} H100-hours at "
            f"{percent(plan['share_of_peak_assumed'])} of peak; the released code took "
            f"{plan['released_gpu_hours']:.0f}.",
        ]
        section.basis += [
            measured(found),
            Basis("PROJECTION", f"{percent(plan['share_of_peak_assumed'])} of an H100’s peak, and "
                  "nothing else that takes time"),
        ]  # fmt: skip
        section.draw(found)
    on_gpu = section.take(results, "rewards on a GPU")
    if on_gpu is not None:
        hours = on_gpu.record["networks"]["gpu_hours"]
        section.text.append(
            f"Timed on {on_gpu.place}, random networks of the published sizes take {hours:.0f} "
            "GPU-hours for the same."
        )
        section.basis.append(measured(on_gpu))
        section.draw(on_gpu)
    return section


def sampling(results: Sequence[Result]) -> Section:
    """Latency and images/s of sampling, and what bf16 and compiling bring a step on a CPU."""
    section = Section("sampling", "Sampling, and precision on a CPU")
    found = section.take(results, "sampling")
    if found is not None:
        variants = found.record["variants"]
        best = max(variants, key=lambda name: variants[name]["images_per_second"]["median"])
        quick = min(variants, key=lambda name: variants[name]["seconds"]["median"])
        section.text.append(
            f"The {found.record['settings']['preset']} preset samples at best "
            f"{number(variants[best]['images_per_second']['median'])} images/s ({best}), and one "
            f"sampling takes {number(variants[quick]['seconds']['median'])} s at least ({quick})."
        )
        rows: list[list[str | Basis]] = [
            [name, shown(spread(row["seconds"])),
             number(row["images_per_second"]["median"]), number(row["ratio"]["eager"]["median"])]
            for name, row in variants.items()
        ]  # fmt: skip
        section.tables.append(Table(["", "s (p20–p80)", "images/s", "over eager"], rows))
        section.basis.append(measured(found))
        section.draw(found)
    precision = section.take(results, "precision")
    if precision is not None:
        section.basis.append(measured(precision))
        section.draw(precision)
    return section


def demo(results: Sequence[Result]) -> Section:
    """The effect that training must show, over all runs checked in."""
    section = Section("demo", "The demo: does reward conditioning still train faster?")
    last = section.take(results, "demo")
    runs = [result for result in results if result.kind.name == "demo"]
    if last is None:
        return section
    section.sources[:] = runs
    settings = list(dict.fromkeys(s for run in runs for s in run.record["data_efficiency"]))
    factors = [
        (run, setting, run.record["data_efficiency"].get(setting, {}).get("verifier"))
        for run in runs
        for setting in settings
    ]
    for setting in settings:
        known = [factor for _, of, factor in factors if of == setting]
        met = [factor for factor in known if factor is not None]
        spanned = f", on {number(min(met))} to {number(max(met))} × fewer images" if met else ""
        section.text.append(
            f"{label(setting)}: in {len(met)} of {len(known)} runs MIRO reached the baseline’s "
            f"final verifier score earlier{spanned}."
        )
    section.text.append(
        "The largest factor of a run, where several scores share it, is that of the first mark: at "
        "least so much."
    )
    head = ["run", "seed", "commit", *(f"crossing, {label(s).lower()}" for s in settings)]
    models = ("baseline", "miro")
    head += [f"verifier, {label(s).lower()}: baseline / MIRO" for s in settings]
    rows: list[list[str | Basis]] = []
    for run in runs:
        found, final = run.record, run.record["final"]
        crossing = [found["data_efficiency"].get(s, {}).get("verifier") for s in settings]
        scores = [
            " / ".join(number(final.get(s, {}).get(m, {}).get("verifier")) for m in models)
            for s in settings
        ]
        about = [run.path.stem, str(found.get("seed", "–")), found["commit"]]
        rows.append([*about, *map(number, crossing), *scores])
    section.tables.append(Table(head, rows))
    section.basis.append(measured(last))
    section.draw(last)
    return section


def past(results: Sequence[Result]) -> Section:
    """Every counted and timed quantity by date, of files that can be compared."""
    section = Section("history", "History of every counted and timed quantity")
    series = histories(results)
    repeated = [name for name, files in series.items() if len(files) > 1]
    section.text.append(
        f"{len(series)} series of files with equal device and settings, {len(repeated)} of them "
        "with more than one date. A verdict is that of compare.py: timed quantities differ where "
        "the ranges from p20 to p80 do not touch."
    )
    for name, files in series.items():
        if len(files) > 1 and (picture := history(files)):
            section.pictures.append(picture)
        section.tables.append(_series(name, files))
    return section


def _series(name: str, files: Sequence[Result]) -> Table:
    """A row per quantity, a column per file, and what changed last."""
    known = [file.quantities for file in files]
    rows: list[list[str | Basis]] = []
    for quantity in dict.fromkeys(q for found in known for q in found):
        values = [found.get(quantity) for found in known]
        verdict = _verdict(quantity, [value for value in values if value is not None])
        rows.append([quantity, *("–" if v is None else shown(v) for v in values), verdict])
    columns = [
        f"{file.date or 'no date'}, {file.record.get('commit', 'no commit')}" for file in files
    ]
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}, {len(rows)} quantities"
    return Table(["", *columns, "last change"], rows, f"{name} ({count})", folded=True)


def _verdict(name: str, values: Sequence[Quantity]) -> str:
    if len(values) < 2:
        return ""
    before, after = (v._asdict() if isinstance(v, Spread) else v for v in values[-2:])
    return judge(tuple(name.split(": ")), before, after).verdict
