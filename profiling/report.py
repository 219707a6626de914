"""Write one page of all measurements, counts and projections: profiling/results/report.html.

    python profiling/report.py [RESULT.json ...] [--results FOLDER] [--out REPORT.html]

The page is made from JSON result files alone, so equal files give an equal page: those of the
folder, or only the given ones. Each number is labelled MEASURED, COUNTED, PROJECTION or PUBLISHED.
For a missing file the page names the command that writes it; an invalid file is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from bench_utils import HERE, RESULTS, argument_parser
from markupsafe import Markup
from page.charts import svg
from page.gpu_hours import gpu_hour
from page.questions import bound, fusion, released
from page.result_files import Result, by_date, load, load_folder
from page.sections import data, demo, history, rewards, sampling

from miro.report.render import write_page

SECTIONS = (bound, fusion, released, gpu_hour, data, rewards, sampling, demo, history)


def keep_units(sentence: str) -> str:
    """Put no-break spaces between numbers and their units."""
    return re.sub(r"(?<=\d) (?=(?:×|%|ms|GB|M|h)\b|×|%)", "\u00a0", sentence)


def write_report(results: Sequence[Result], path: Path) -> Path:
    """Write the page of the results, which are sorted by date, to `path`."""
    sections = [build(results) for build in SECTIONS]
    plots = {
        section.name: [
            (plot, Markup(svg(plot.figure, f"{section.name} {number}")))
            for number, plot in enumerate(section.plots)
        ]
        for section in sections
    }
    return write_page(
        path,
        "report.html",
        [HERE],
        sections=sections,
        keep_units=keep_units,
        plots=plots,
        files=len(results),
        newest=max((result.date for result in results), default=""),
        matplotlib=matplotlib.__version__,
    )


def main() -> int:
    """Write the report of the results."""
    parser = argument_parser(__doc__, out=None)
    parser.add_argument("files", type=Path, nargs="*", metavar="RESULT.json", help="only these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder")
    args = parser.parse_args()
    try:
        results = by_date(map(load, args.files)) if args.files else load_folder(args.results)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(write_report(results, args.out or args.results / "report.html"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
