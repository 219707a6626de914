"""The fourth question of the page: how many images a GPU-hour should yield."""

from __future__ import annotations

from collections.abc import Sequence

from answers import COMPILE, assumed
from charts import bars
from pictures import GPU_STEP_BATCH, Picture, best_plans, device, operations, step_rates
from result_files import Quantity, Result
from roofline import projected
from sections import Basis, Section, Table, measured, percent

from miro.report.render import number

# What was published of the released training: 500 thousand steps of 1024 images, in 52 hours of 16
# H100 (README of github.com/nicolas-dufour/miro, arXiv 2510.25897).
IMAGES, RELEASED_HOURS = 512e6, 832
PUBLISHED = Basis(
    "PUBLISHED", "500 k steps of 1024 images in 52 h on 16 H100, README of nicolas-dufour/miro"
)


def gpu_hours(results: Sequence[Result]) -> Section:
    """Images in a GPU-hour: measured, projected for other devices, published."""
    section = Section("gpu-hour", "What should a GPU-hour yield?")
    gpu = section.take(results, "GPU check")
    budget = section.take(results, "step budget")
    rates: list[tuple[str, str, float, Basis]] = []
    if gpu:
        rates += [
            (name, gpu.place, rate, measured(gpu))
            for name, rate in step_rates(gpu).items()
            if name in ("fused", COMPILE, "eager")
        ]
    if budget:
        fused, batch = operations(budget, "fused"), budget.record["settings"]["batch"]
        for name in budget.record["assumptions"]:
            given = device(budget, name)
            rates.append(("fused", name, batch / projected(fused, given), assumed(name, given)))
    if rates:
        _yields(section, gpu, rates)
    _among_many(section, results)
    return section


def _yields(
    section: Section, gpu: Result | None, rates: list[tuple[str, str, float, Basis]]
) -> None:
    """Sentences, plot and table of images/s: of which step, on what, and what they rest on."""
    published = IMAGES / RELEASED_HOURS / 3600
    rates.append(("released, whole training", "16 × H100", published, PUBLISHED))
    best = step_rates(gpu).get("fused") if gpu else None
    if gpu and best:
        hours = IMAGES / best / 3600
        section.text.append(
            f"A fused step on {gpu.place}, batch {GPU_STEP_BATCH}, yields "
            f"{3600 * best / 1e6:.2f} M images in a GPU-hour, so {IMAGES / 1e6:g} M images take "
            f"{number(hours)} GPU-hours of steps; the released training took {RELEASED_HOURS}, "
            f"{number(RELEASED_HOURS / hours)} × as many."
        )
        what = f"for {IMAGES / 1e6:g} M images at the rate measured on {gpu.place}, steps alone"
        section.headline = f"{number(hours)} h", what
    planned = [(name, rate) for _, name, rate, basis in rates if basis.word == "PROJECTION"]
    if planned:
        said = ", ".join(f"{name} {3600 * rate / 1e6:.2f} M" for name, rate in planned)
        section.text.append(f"Projected for a fused step, images in a GPU-hour: {said}.")
    section.text.append(
        f"Not like for like: ours are steps alone, on latents already on the device; the "
        f"{RELEASED_HOURS} hours hold loading, validation and what 16 GPUs send each other."
    )
    drawn: dict[str, dict[str, Quantity]] = {
        f"{name}, {place}": {basis.word.lower(): 3600 * rate / 1e6}
        for name, place, rate, basis in rates
    }
    figure = bars(drawn, "million images in a GPU-hour")
    sources = ", ".join(result.path.name for result in section.sources)
    section.pictures.append(Picture("yield", "Images in a GPU-hour", "", figure, sources))
    rows: list[list[str | Basis]] = [
        [name, place, number(rate), f"{3600 * rate / 1e6:.2f}", number(IMAGES / rate / 3600), basis]
        for name, place, rate, basis in rates
    ]
    head = ["step", "device", "images/s", "M images an hour", f"GPU-hours for {IMAGES / 1e6:g} M",
            "what it rests on"]  # fmt: skip
    section.tables.append(Table(head, rows))


def _among_many(section: Section, results: Sequence[Result]) -> None:
    """What is left of it where many GPUs train one network."""
    plan = section.take(results, "scale plan")
    if plan is None:
        return
    given = plan.record["assumptions"]
    said = []
    for preset, rows in best_plans(plan).items():
        few, many = min(rows), max(rows)
        each = [rows[n]["images_per_second"] / n for n in (few, many)]
        said.append(
            f"{preset} trains {number(each[1])} images/s on each of {many:g} GPUs, "
            f"{percent(each[1] / each[0])} of what it does on {few:g}"
        )
    section.text.append(
        f"Projected, with a preset’s batch shared among all GPUs: {'; '.join(said)}."
    )
    section.basis.append(
        Basis(
            "PROJECTION",
            f"many GPUs: {given['gpu']}, {percent(given['utilisation'])} of "
            f"{given['peak'] / 1e12:,.0f} TFLOP/s, {given['inside'] / 1e9:g} GB/s inside a "
            f"machine and {given['between'] / 1e9:g} beyond, {percent(given['hidden'])} of what is "
            f"sent hidden ({plan.path.name})",
        )
    )
    section.draw(plan)
