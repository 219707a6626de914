"""What every kernel moves, computes and compiles to, found without a GPU: one table.

    python profiling/kernel_report.py [--out profiling/results] [--ops adaln swiglu]

Bytes are counted in Triton's interpreter at the shapes of the 0.36 B preset, on a few samples and
extrapolated to its batch, in sectors of 32 bytes of every load and store, nothing
cached (`distinct`: each sector of a launch once); over the least
possible, over what eager torch moves and over what Inductor would. Errors are the largest of the
results' against an fp64 oracle, over eager's. Resources are those of the shipped tiles: the worst
kernel's registers, shared memory and occupancy, the sums of the rest.

Writes kernels.json, kernels.md and the figures of kernels/README.md, unless only some ops are asked
for; exits 1 where a bar is missed that lab.cases.SHORTFALLS does not explain.
"""

from __future__ import annotations

import argparse
import datetime
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

from miro_kernels.lab import case_metrics, testing
from miro_kernels.lab.cases import CASES, MOST_BYTES, MOST_OVER_INDUCTOR, SHORTFALLS, Case
from miro_kernels.lab.interpreter import interpreting
from miro_kernels.lab.resources import MACHINES, Compiled

ROOT = Path(__file__).parent.parent
README = ROOT / "kernels" / "README.md"
DTYPE = torch.bfloat16
HEADINGS = (
    "op", "direction", "bytes/least", "distinct/least", "bytes/eager", "bytes/Inductor",
    "error/eager", "target", "registers", "spills", "shared", "occupancy", "wide", "narrow", "mma",
    "atomics",
)  # fmt: skip


def interpreted(case: Case) -> dict[str, dict[str, float]]:
    """Bytes and errors of each direction; for a process with TRITON_INTERPRET=1."""
    print(f"{case.op}: interpreting", file=sys.stderr)
    errors = case_metrics.errors(case, DTYPE)
    return {
        direction: asdict(moved) | {"error_over_eager": errors[direction]}
        for direction, moved in case_metrics.bytes_moved(case, DTYPE).items()
    }


def in_interpreter(ops: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """`interpreted` of each op, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interpreted.json"
        command = [sys.executable, __file__, "--interpreted", str(path), "--ops", *ops]
        subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return json.loads(path.read_text())


def resources(kernels: list[Compiled]) -> dict[str, float]:
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
    print(f"{case.op}: compiling", file=sys.stderr)
    inductor = case_metrics.inductor_bytes(case, DTYPE)
    compiled = {target: case_metrics.compiled(case, DTYPE, target) for target in MACHINES}
    rows = []
    for direction in case.directions:
        found = moved[direction]
        over_least = found["kernels"] / found["least"]
        rival, least = inductor[direction]
        rows.append(
            {
                "op": case.op,
                "direction": direction,
                "shape": case.shape,
                "dtype": str(DTYPE).removeprefix("torch."),
                "bytes_over_least": round(over_least, 4),
                "distinct_over_least": round(found["distinct"] / found["least"], 4),
                "bytes_over_eager": round(found["kernels"] / found["eager"], 4),
                "bytes_over_inductor": round(over_least / (rival / least), 4),
                "error_over_eager": round(found["error_over_eager"], 4),
                "compiled": {t: resources(kernels[direction]) for t, kernels in compiled.items()},
            }
        )
    return rows


def missed(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a row that fall short of their bar, and by what."""
    key = (row["op"], row["direction"])
    most = {
        "bytes_over_least": MOST_BYTES.get(key),
        "bytes_over_inductor": MOST_OVER_INDUCTOR.get(key),
        "error_over_eager": testing.BAR,
    }
    short = [
        (name, f"{row[name]:.3f} > {bar}")
        for name, bar in most.items()
        if bar is not None and row[name] > bar
    ]
    for target, found in row["compiled"].items():
        machine = MACHINES[target]
        none = ("spills", "narrow", "atomics") if machine.vendor == "cuda" else ("atomics",)
        short += [(f"{name} {target}", str(found[name])) for name in none if found[name]]
        if found["shared"] > machine.shared_per_program:
            short.append((f"shared {target}", f"{found['shared']} bytes"))
        if row["op"] == "attention" and not found["mma"]:
            short.append((f"mma {target}", "no matrix instruction"))
    return short


def cells(row: dict[str, Any]) -> list[list[str]]:
    """One line of the table a target; what belongs to all targets stands in the first."""
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
    """Lines of cells as Markdown that is also readable as it is."""
    lines = [list(HEADINGS), *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *texts[1:]])


def page(rows: list[dict[str, Any]], body: str, short: list[str]) -> str:
    shapes = "\n".join(
        f"- {op}: {shape}" for op, shape in {r["op"]: r["shape"] for r in rows}.items()
    )
    return f"""# Kernels, measured without a GPU

`python profiling/kernel_report.py` on {datetime.date.today().isoformat()}, torch \
{torch.__version__}, triton {triton.__version__}, {rows[0]["dtype"]}. What the columns mean, and
how they are found, the script says. No figure here is a time.

{body}

Shapes:

{shapes}

Short of a bar: {"none." if not short else ""}
{chr(10).join(f"- {line}" for line in short)}
"""


def summary(rows: list[dict[str, Any]]) -> str:
    """The table of kernels/README.md."""
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


def with_figures(text: str, rows: list[dict[str, Any]]) -> str:
    """The README's text with its figures replaced."""
    before, rest = text.split("-->\n", 1)
    after = rest[rest.index("<!-- end") :]
    return f"{before}-->\n\n{summary(rows)}\n\n{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [case.op for case in CASES]
    parser.add_argument("--ops", nargs="*", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument("--interpreted", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if case.op in options.ops]
    torch.set_num_threads(1)
    if options.interpreted:
        assert interpreting()
        options.interpreted.write_text(json.dumps({case.op: interpreted(case) for case in cases}))
        return 0
    moved = in_interpreter(options.ops)
    rows = [row for case in cases for row in rows_of(case, moved[case.op])]
    body = table([line for row in rows for line in cells(row)])
    print(body)
    short, unexplained = [], 0
    for row in rows:
        for name, value in missed(row):
            reason = SHORTFALLS.get((row["op"], row["direction"], name))
            unexplained += reason is None
            short.append(
                f"{row['op']} {row['direction']}, {name} {value}: {reason or 'UNEXPLAINED'}"
            )
    print("\n".join(short) if short else "every bar is met")
    if len(cases) == len(CASES):
        options.out.mkdir(parents=True, exist_ok=True)
        kept = [{k: v for k, v in row.items() if k != "distinct_over_least"} for row in rows]
        (options.out / "kernels.json").write_text(json.dumps({"rows": kept}, indent=1) + "\n")
        (options.out / "kernels.md").write_text(page(rows, body, short))
        README.write_text(with_figures(README.read_text(), rows))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
