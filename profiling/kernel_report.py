"""Memory traffic, errors and compiled resources of every kernel, without a GPU.

    python profiling/kernel_report.py [--out profiling/results] [--ops adaln swiglu]

Bytes are counted in Triton's interpreter at the shapes of the 0.36 B preset, on a few samples and
extrapolated to its batch (lab/case_metrics.py), in sectors of 32 bytes of every load and store,
without caches (`distinct`: each sector once per launch). They are relative to the minimal bytes, to
eager torch and to Inductor. Errors are the largest against an fp64 reference, relative to eager.
Resources are those of the shipped tiles: the maximal registers and shared memory and the minimal
occupancy of all kernels, and sums of the rest.

Writes kernels.json, kernels.md and the table of kernels/README.md, unless --ops selects some; exits
1 if a limit is exceeded that lab.cases.SHORTFALLS does not explain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from bench_utils import ROOT, argument_parser, metadata, write_json

from miro_kernels.lab import case_metrics, testing
from miro_kernels.lab.cases import CASES, MOST_BYTES, MOST_OVER_INDUCTOR, SHORTFALLS, Case
from miro_kernels.lab.interpreter import interpreting
from miro_kernels.lab.resources import MACHINES, Compiled

README = ROOT / "kernels" / "README.md"
DTYPE = torch.bfloat16
HEADINGS = (
    "op", "direction", "bytes/least", "distinct/least", "bytes/eager", "bytes/Inductor",
    "error/eager", "target", "registers", "spills", "shared", "occupancy", "wide", "narrow", "mma",
    "atomics",
)  # fmt: skip


def interpreted(case: Case) -> dict[str, dict[str, float]]:
    """Bytes and errors of each direction, in a process with TRITON_INTERPRET=1."""
    print(f"{case.op}: interpreting", file=sys.stderr)
    errors = case_metrics.errors(case, DTYPE)
    return {
        direction: asdict(moved) | {"error_over_eager": errors[direction]}
        for direction, moved in case_metrics.bytes_moved(case, DTYPE).items()
    }


def in_interpreter(ops: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Run `interpreted` for each op in a subprocess."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interpreted.json"
        command = [sys.executable, __file__, "--interpreted", str(path), "--ops", *ops]
        subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return json.loads(path.read_text())


def resources(kernels: list[Compiled]) -> dict[str, float]:
    """Resources of all kernels of an op together."""
    return {
        "registers": max(kernel.registers for kernel in kernels),
        "spills": sum(kernel.spills for kernel in kernels),
        "shared": max(kernel.shared for kernel in kernels),
        "occupancy": min(kernel.occupancy for kernel in kernels),
        "wide": sum(kernel.wide for kernel in kernels),
        "narrow": sum(kernel.narrow for kernel in kernels),
        "mma": sum(kernel.mma for kernel in kernels),
        "atomics": sum(kernel.atomics for kernel in kernels),
    }


def rows_of(case: Case, moved: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of an op by direction."""
    print(f"{case.op}: compiling", file=sys.stderr)
    inductor = case_metrics.inductor_bytes(case, DTYPE)
    compiled = {target: case_metrics.compiled(case, DTYPE, target) for target in MACHINES}
    rows = []
    for direction in case.directions:
        found = moved[direction]
        over_least = found["kernels"] / found["least"]
        inductor_bytes, minimal_bytes = inductor[direction]
        rows.append(
            {
                "op": case.op,
                "direction": direction,
                "shape": case.shape,
                "dtype": str(DTYPE).removeprefix("torch."),
                "bytes_over_least": round(over_least, 4),
                "distinct_over_least": round(found["distinct"] / found["least"], 4),
                "bytes_over_eager": round(found["kernels"] / found["eager"], 4),
                "bytes_over_inductor": round(over_least / (inductor_bytes / minimal_bytes), 4),
                "error_over_eager": round(found["error_over_eager"], 4),
                "compiled": {t: resources(kernels[direction]) for t, kernels in compiled.items()},
            }
        )
    return rows


def exceeded(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a row that exceed their limit."""
    key = (row["op"], row["direction"])
    most = {
        "bytes_over_least": MOST_BYTES.get(key),
        "bytes_over_inductor": MOST_OVER_INDUCTOR.get(key),
        "error_over_eager": testing.BAR,
    }
    failures = [
        (name, f"{row[name]:.3f} > {limit}")
        for name, limit in most.items()
        if limit is not None and row[name] > limit
    ]
    for target, found in row["compiled"].items():
        machine = MACHINES[target]
        zero = ("spills", "narrow", "atomics") if machine.vendor == "cuda" else ("atomics",)
        failures += [(f"{name} {target}", str(found[name])) for name in zero if found[name]]
        if found["shared"] > machine.shared_per_program:
            failures.append((f"shared {target}", f"{found['shared']} bytes"))
        if row["op"] == "attention" and not found["mma"]:
            failures.append((f"mma {target}", "no matrix instruction"))
    return failures


def cells(row: dict[str, Any]) -> list[list[str]]:
    """Cells of a row, one line per target; the figures of all targets are in the first."""
    figures = [f"{row[key]:.3f}" for key in row if "_over_" in key]
    lines, left = [], [row["op"], row["direction"], *figures]
    for target, found in row["compiled"].items():
        limit = MACHINES[target].shared_per_program / 1024
        shown = found | {
            "shared": f"{found['shared'] / 1024:.1f} of {limit:.0f} KiB",
            "occupancy": f"{found['occupancy']:.2f}",
        }
        lines.append([*left, target, *(str(shown[heading]) for heading in HEADINGS[8:])])
        left = [""] * len(left)
    return lines


def table(lines: list[list[str]]) -> str:
    """Format cells as an aligned Markdown table."""
    lines = [list(HEADINGS), *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *texts[1:]])


def markdown(rows: list[dict[str, Any]], body: str, short: list[str]) -> str:
    """Format kernels.md."""
    shapes = "\n".join(
        f"- {op}: {shape}" for op, shape in {r["op"]: r["shape"] for r in rows}.items()
    )
    return f"""# Kernels, measured without a GPU

`python profiling/kernel_report.py` on {metadata("cpu")["date"]}, torch {torch.__version__}, \
triton {triton.__version__}, {rows[0]["dtype"]}. The script explains the columns.
No figure is a time.

{body}

Shapes:

{shapes}

Limits exceeded: {"none." if not short else ""}
{chr(10).join(f"- {line}" for line in short)}
"""


def summary(rows: list[dict[str, Any]]) -> str:
    """Format the table of kernels/README.md."""
    figures = ("bytes_over_least", "bytes_over_eager", "bytes_over_inductor", "error_over_eager")
    lines = [
        "| op | direction | bytes/least | /eager | /Inductor | error | registers | occupancy |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        found = [row["compiled"][target] for target in ("sm_80", "sm_90", "sm_100")]
        cells = [row["op"], row["direction"], *(f"{row[name]:.2f}" for name in figures)]
        cells.append(" / ".join(str(f["registers"]) for f in found))
        cells.append(" / ".join(f"{f['occupancy']:.2f}" for f in found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_table(text: str, rows: list[dict[str, Any]]) -> str:
    """Replace the table in the text of the README."""
    before, rest = text.split("-->\n", 1)
    after = rest[rest.index("<!-- end") :]
    return f"{before}-->\n\n{summary(rows)}\n\n{after}"


def main() -> int:
    """Measure the kernels without a GPU, and write the table."""
    parser = argument_parser(__doc__)
    names = [case.op for case in CASES]
    parser.add_argument("--ops", nargs="*", choices=names, default=names)
    parser.add_argument("--interpreted", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [case for case in CASES if case.op in args.ops]
    torch.set_num_threads(1)
    if args.interpreted:
        assert interpreting()
        args.interpreted.write_text(json.dumps({case.op: interpreted(case) for case in cases}))
        return 0
    moved = in_interpreter(args.ops)
    rows = [row for case in cases for row in rows_of(case, moved[case.op])]
    body = table([line for row in rows for line in cells(row)])
    print(body)
    failures, unexplained = [], 0
    for row in rows:
        for name, value in exceeded(row):
            reason = SHORTFALLS.get((row["op"], row["direction"], name))
            unexplained += reason is None
            failures.append(
                f"{row['op']} {row['direction']}, {name} {value}: {reason or 'UNEXPLAINED'}"
            )
    print("\n".join(failures) if failures else "no limit is exceeded")
    if len(cases) == len(CASES):
        written = [{k: v for k, v in row.items() if k != "distinct_over_least"} for row in rows]
        write_json({**metadata("cpu"), "rows": written}, args.out / "kernels.json")
        (args.out / "kernels.md").write_text(markdown(rows, body, failures))
        README.write_text(replace_table(README.read_text(), rows))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
