"""The fourth question of the page: images per GPU-hour."""

from __future__ import annotations

from collections.abc import Sequence

from miro.report.render import number
from page.charts import bars
from page.questions import COMPILE, assumptions
from page.result_files import Result
from page.result_plots import GPU_STEP_BATCH, Plot, best_plans, projected, step_rates
from page.sections import Provenance, Section, Table, percent

# The released training: 500 thousand steps of 1024 images, in 52 hours on 16 H100 (README of
# github.com/nicolas-dufour/miro, arXiv 2510.25897).
IMAGES, RELEASED_HOURS = 512e6, 832
PUBLISHED = Provenance(
    "PUBLISHED", "500 k steps of 1024 images in 52 h on 16 H100, README of nicolas-dufour/miro"
)


def gpu_hour(results: Sequence[Result]) -> Section:
    """Images per GPU-hour: measured, projected for other devices, and published."""
    section = Section("gpu-hour", "What should a GPU-hour yield?")
    gpu = section.latest(results, "GPU check")
    budget = section.latest(results, "step budget")
    rates: list[tuple[str, str, float, Provenance]] = []  # step, device, images/s, provenance
    if gpu:
        rates += [
            (name, gpu.device, rate, Provenance("MEASURED", gpu.origin))
            for name, rate in step_rates(gpu).items()
            if name in ("fused", COMPILE, "eager")
        ]
    if budget:
        batch = budget.record["settings"]["batch"]
        for name in budget.record["assumptions"]:
            rate = batch / projected(budget, "fused", name)["seconds"].sum()
            rates.append(("fused", name, rate, assumptions(budget, name)))
    if rates:
        _images_per_hour(section, gpu, rates)
    plan = section.latest(results, "scale plan")
    if plan is not None:
        _many_gpus(section, plan)
    return section


def _images_per_hour(
    section: Section, gpu: Result | None, rates: list[tuple[str, str, float, Provenance]]
) -> None:
    published = IMAGES / RELEASED_HOURS / 3600
    rates.append(("released, whole training", "16 × H100", published, PUBLISHED))
    best = step_rates(gpu).get("fused") if gpu else None
    if gpu and best:
        hours = IMAGES / best / 3600
        section.text.append(
            f"A fused step on {gpu.device}, batch {GPU_STEP_BATCH}, yields "
            f"{3600 * best / 1e6:.2f} M images per GPU-hour, so {IMAGES / 1e6:g} M images take "
            f"{number(hours)} GPU-hours of steps; the released training took {RELEASED_HOURS}, "
            f"{number(RELEASED_HOURS / hours)} × as many."
        )
        text = f"for {IMAGES / 1e6:g} M images at the rate measured on {gpu.device}, steps alone"
        section.headline = f"{number(hours)} h", text
    planned = [
        f"{device} {3600 * rate / 1e6:.2f} M"
        for _, device, rate, provenance in rates
        if provenance.label == "PROJECTION"
    ]
    if planned:
        section.text.append(
            f"Projected for a fused step, images per GPU-hour: {', '.join(planned)}."
        )
    section.text.append(
        f"The two are not comparable directly: ours are steps alone, with latents on the device; "
        f"the {RELEASED_HOURS} hours include loading, validation and communication of 16 GPUs."
    )
    values = {
        f"{name}, {device}": {provenance.label.lower(): 3600 * rate / 1e6}
        for name, device, rate, provenance in rates
    }
    chart = bars(values, "million images per GPU-hour")
    sources = ", ".join(result.path.name for result in section.sources)
    section.plots.append(Plot("yield", "Images per GPU-hour", "", chart, sources))
    rows: list[list[str | Provenance]] = [
        [name, device, number(rate), f"{3600 * rate / 1e6:.2f}", number(IMAGES / rate / 3600), p]
        for name, device, rate, p in rates
    ]
    head = ["step", "device", "images/s", "M images per hour", f"GPU-hours for {IMAGES / 1e6:g} M",
            "provenance"]  # fmt: skip
    section.tables.append(Table(head, rows))


def _many_gpus(section: Section, plan: Result) -> None:
    given, texts = plan.record["assumptions"], []
    for preset, rates in best_plans(plan).groupby("preset", sort=False):
        rates = rates.droplevel("preset").sort_index()
        few, many = rates.index[0], rates.index[-1]
        texts.append(
            f"{preset} trains {number(rates[many])} images/s on each of {many:g} GPUs, "
            f"{percent(rates[many] / rates[few])} of the rate on {few:g}"
        )
    section.text.append(
        f"Projected, with a preset’s batch divided among all GPUs: {'; '.join(texts)}."
    )
    section.cite(
        "PROJECTION",
        f"many GPUs: {given['gpu']}, {percent(given['utilisation'])} of "
        f"{given['peak'] / 1e12:,.0f} TFLOP/s, {given['intra_node_bandwidth'] / 1e9:g} GB/s inside "
        f"a machine and {given['inter_node_bandwidth'] / 1e9:g} between machines, "
        f"{percent(given['overlap'])} of communication overlapped ({plan.path.name})",
    )
    section.add_plots(plan)
