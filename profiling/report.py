"""One page of what was measured, counted and projected: profiling/results/report.html.

    python profiling/report.py [--results profiling/results] [--out REPORT.html]

Made from the JSON files of results/ alone; nothing is timed. It answers what bounds a step, what
fusion bought, what the released code wastes and what a GPU-hour should yield, then shows data,
rewards, sampling, the demo, and the history of every quantity. Each number is labelled MEASURED,
COUNTED, PROJECTION or PUBLISHED. Where a file is absent the page says which command makes it; one
that is not understood is an error. Equal files give an equal page.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib
from answers import bound, fusion, released
from charts import markup
from gpu_hours import gpu_hours
from markupsafe import Markup
from result_files import read_folder
from sections import data, demo, past, rewards, sampling

from miro.report.render import write_page

HERE = Path(__file__).parent
QUESTIONS = (bound, fusion, released, gpu_hours)
REST = (data, rewards, sampling, demo, past)


def unbroken(sentence: str) -> str:
    """A sentence whose numbers stay with their signs and units where a line ends."""
    return re.sub(r"(?<=\d) (?=(?:×|%|ms|GB|M|h)\b|×|%)", "\u00a0", sentence)


def write_report(results: Path, path: Path) -> Path:
    """Write the page of a folder of results to `path`.

    Raises:
        ValueError: a file is not understood; names it and what makes it again.
    """
    found = read_folder(results)
    sections = [make(found) for make in (*QUESTIONS, *REST)]
    plots = {
        section.name: [
            (picture, Markup(markup(picture.figure, f"{section.name} {place}")))
            for place, picture in enumerate(section.pictures)
        ]
        for section in sections
    }
    return write_page(
        path,
        "report.html",
        [HERE],
        sections=sections,
        unbroken=unbroken,
        plots=plots,
        files=len(found),
        newest=max((result.date for result in found), default=""),
        matplotlib=matplotlib.__version__,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of JSON files"
    )
    parser.add_argument(
        "--out", type=Path, help="the page; report.html among the results if not said"
    )
    given = parser.parse_args()
    try:
        print(write_report(given.results, given.out or given.results / "report.html"))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
