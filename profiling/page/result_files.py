"""Result files of profiling/results: their types, required fields, and loading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from compare import quantities


class Spread(NamedTuple):
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


Quantity = Spread | float


@dataclass(frozen=True)
class ResultType:
    """The results of one script.

    keys: fields of the record, its first row or its first variant that identify the type.
    fields: required fields as dotted paths; `*` is each item of a list or an object, and braces
    expand as in a shell. They are positive numbers unless `:number`, `:nullable`, `:str` or
    `:spread` (a `Spread`) follows.
    flatten: replaces row numbers by names, for `compare.quantities`.
    """

    name: str
    pattern: str
    command: str
    keys: frozenset[str]
    fields: str
    flatten: Callable[[Any], Any] = lambda record: record


def _named(rows: Sequence[Any], keys: str, fields: str = "") -> dict[str, Any]:
    """Rows by the values of `keys`, reduced to `fields`."""
    wanted = fields.split()
    return {
        ", ".join(str(row[key]) for key in keys.split()): {
            key: value for key, value in row.items() if key in wanted or not wanted
        }
        for row in rows
    }


def _flatten_demo(record: Any) -> Any:
    verifier = {
        setting: {model: scores.get("verifier") for model, scores in models.items()}
        for setting, models in record["final"].items()
    }
    return {"counted": {"data efficiency": record["data_efficiency"], "verifier": verifier}}


_RUN = "{device,date,commit}:str "
_FLOPS = "parameters forward training sampling"
_OVER = "bytes_over_least bytes_over_eager bytes_over_inductor error_over_eager"
RESULT_TYPES = (
    ResultType(
        "step budget", "budget-*.json", "python profiling/step_budget.py",
        frozenset({"assumptions", "projected_seconds"}),
        "{date,settings.preset}:str settings.batch settings.text:number useful_flops "
        "assumptions.*.{flops,bandwidth,gemm,attention,memory} assumptions.*.launch:number "
        "variants.{eager,fused}.operations.*.{op,group}:str "
        "variants.*.operations.*.{calls,launches,flops,bytes}:number",
    ),
    ResultType(
        "GPU check", "gpu-*.json", "make gpu-check", frozenset({"peaks", "steps"}),
        _RUN + "peaks.{gigabytes,teraflops} steps.*.{milliseconds,gigabytes} rows.*:spread "
        "rows.*.{op,direction,variant}:str rows.*.{bytes,flops}:number",
        lambda record: {
            "milliseconds": _named(record["rows"], "op direction variant"),
            "steps": {"counted": record["steps"]},
        },
    ),
    ResultType(
        "tiles", "tiles-*.json", "python profiling/search_tiles.py", frozenset({"kernel"}),
        "{device,date}:str rows.*.kernel:str rows.*:spread", lambda record: {},
    ),
    ResultType(
        "kernels", "kernels.json", "python profiling/kernel_report.py",
        frozenset({"bytes_over_least"}),
        "rows.*.{op,direction}:str rows.*.bytes_over_{least,eager,inductor}",
        lambda record: {"counted": _named(record["rows"], "op direction", _OVER)},
    ),
    ResultType(
        "step", "step-*.json", "python profiling/bench_step.py --released FOLDER",
        frozenset({"ratio", "peak_bytes"}),
        _RUN + "settings.{scale,batch} variants.*.{peak_bytes,counted.*} "
        "{ratio.*,variants.*.images_per_second,variants.*.milliseconds.*}:spread",
    ),
    ResultType(
        "FLOPs", "flops.json", "python profiling/count_flops.py --released FOLDER",
        frozenset({"derived"}),
        "{date,rows.*.model}:str rows.*.{pixels,text,steps,calls}:number "
        "rows.*.{parameters,forward,training,sampling}",
        lambda record: {"counted": _named(record["rows"], "model pixels text", _FLOPS)},
    ),
    ResultType(
        "scale plan", "scale_plan.json", "python profiling/scale_plan.py",
        frozenset({"gpus", "gpu_bytes"}),
        "{assumptions.gpu,rows.*.preset}:str {assumptions.overlap,rows.*.stage}:number "
        "assumptions.{peak,utilisation,intra_node_bandwidth,inter_node_bandwidth} "
        "rows.*.{gpus,images_per_second,gpu_bytes}",
        lambda record: {},
    ),
    ResultType(
        "sampling", "sample-*.json", "python profiling/bench_sample.py",
        frozenset({"variants", "seconds"}),
        _RUN + "settings.{preset,precision}:str settings.steps "
        "variants.*.{seconds,images_per_second,ratio.eager}:spread",
    ),
    ResultType(
        "precision", "precision-*.json", "python profiling/bench_precision.py",
        frozenset({"ratio_to_eager_fp32"}),
        "date:str variants.*.images_per_second:spread variants.*.ratio_to_eager_fp32.*",
    ),
    ResultType(
        "demo", "demo-*.json", "make demo", frozenset({"data_efficiency", "final"}),
        "{date,commit}:str data_efficiency.*.*:nullable final.*.*.*:number", _flatten_demo,
    ),
    ResultType(
        "data", "data-*.json", "python profiling/bench_data.py",
        frozenset({"decoding", "loading"}),
        _RUN + "decoding.*.task:str decoding.*.{pixels.*,bytes_per_pixel}:number loading.batch "
        "decoding.*.{images_per_second,ratio_to_pillow}.*:spread "
        "loading.{loader,step}_images_per_second:spread loading.share_of_time_waiting:number",
        lambda record: record | {"decoding": _named(record["decoding"], "task pixels")},
    ),
    ResultType(
        "rewards", "rewards-cpu-*.json", "python profiling/bench_rewards.py",
        frozenset({"scoring", "projection"}),
        _RUN + "scoring.pixels.*:number projection.rewards.*.projected_h100_hours:number "
        "scoring.{images_per_second.*,ratio_to_separate_passes}:spread projection."
        "{images,assumed_share_of_peak,projected_h100_hours,released_gpu_hours}",
    ),
    ResultType(
        "rewards on a GPU", "rewards-cuda-*.json",
        "python profiling/bench_rewards.py --device cuda", frozenset({"networks"}),
        _RUN + "networks.gpu_hours networks.rewards.*.{images_per_second,gpu_hours}",
    ),
)  # fmt: skip
TYPE_BY_NAME = {type_.name: type_ for type_ in RESULT_TYPES}
_COUNTED = {"step budget", "FLOPs", "kernels"}  # the same on any machine


@dataclass(frozen=True)
class Result:
    """A loaded result file."""

    path: Path
    type: ResultType
    record: dict[str, Any]

    @property
    def date(self) -> str:
        """Date of the run; empty if the file has none."""
        return self.record.get("date", "")

    @property
    def device(self) -> str:
        """Device or machine that it ran on."""
        return self.record.get("device") or self.record.get("machine") or ""

    @property
    def origin(self) -> str:
        """Date, device, commit and file."""
        commit = self.record.get("commit")
        parts = (self.date or "undated", self.device, commit and f"commit {commit}")
        return f"{', '.join(filter(None, parts))} ({self.path.name})"

    @property
    def command(self) -> str:
        """Command that writes such a file."""
        return self.record.get("command", self.type.command)

    @property
    def series(self) -> str:
        """Type, device and settings, which are equal in comparable files."""
        keys = ("seed",) if self.type.name in _COUNTED else ("device", "threads", "seed")
        parts = [f"{key} {self.record[key]}" for key in keys if key in self.record]
        if self.type.name != "demo":
            settings = self.record.get("settings", {})
            parts += [f"{key} {_short(value)}" for key, value in settings.items()]
        return ", ".join([self.type.name, *parts])

    @property
    def quantities(self) -> dict[str, Quantity]:
        """Every counted and timed quantity by its name."""
        return {
            ": ".join(part for part in path if part != "counted"): spread(value)
            if isinstance(value, dict)
            else float(value)
            for path, value in quantities(self.type.flatten(self.record))
        }


def _short(setting: Any) -> str:
    if isinstance(setting, list) and len(set(map(str, setting))) == 1:
        return f"{len(setting)} × {setting[0]}"
    return str(setting)


def spread(row: dict[str, float]) -> Spread:
    """Median, p20 and p80 of a timed row."""
    return Spread(*(row[key] for key in Spread._fields))


def load(path: Path) -> Result:
    """Load and validate a result file.

    Raises:
        ValueError: it does not exist, is not JSON, has an unknown type or lacks a field.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    keys = _keys(record)
    type_ = next((type_ for type_ in RESULT_TYPES if type_.keys <= keys), None)
    if type_ is None:
        raise ValueError(
            f"{path}: no script of profiling/ writes such a result; remove the file, or add its "
            "type to profiling/page/result_files.py"
        )
    try:
        for field in type_.fields.split():
            for path_ in _expand(field.partition(":")[0]):
                _check(record, path_, field.partition(":")[2])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; regenerate it with `{type_.command}`") from None
    return Result(path, type_, record)


def load_folder(folder: Path) -> list[Result]:
    """Load all JSON files of a folder, by date.

    Raises:
        ValueError: the folder does not exist, or a file is invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return by_date(load(path) for path in sorted(folder.glob("*.json")))


def by_date(results: Iterable[Result]) -> list[Result]:
    """Sort by date, then by file name."""
    return sorted(results, key=lambda result: (result.date, result.path.stem))


def histories(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Group comparable results."""
    series: dict[str, list[Result]] = {}
    for result in results:
        if result.quantities:
            series.setdefault(result.series, []).append(result)
    return series


def _keys(record: Any) -> set[str]:
    """The fields of a record, of its first row and of its first variant."""
    if not isinstance(record, dict):
        return set()
    rows, variants = record.get("rows"), record.get("variants")
    first = rows[:1] if isinstance(rows, list) else []
    first += list(variants.values())[:1] if isinstance(variants, dict) else []
    return set(record).union(*(row for row in first if isinstance(row, dict)))


def _expand(path: str) -> list[str]:
    """Expand braces: a.{b,c} gives a.b and a.c."""
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    return [p for choice in match[1].split(",") for p in _expand(path.replace(match[0], choice, 1))]


def _check(record: Any, path: str, constraint: str) -> None:
    """Raise ValueError unless every value at `path` meets the constraint."""
    if constraint == "spread":
        for key in Spread._fields:
            _check(record, f"{path}.{key}", "")
        return
    for name, value in _values(record, path.split("."), ""):
        if constraint == "str":
            if not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}, not a string")
        elif value is not None or constraint != "nullable":
            if isinstance(value, bool) or not isinstance(value, int | float):
                valid = False
            else:
                valid = math.isfinite(value) and (constraint != "" or value > 0)
            if not valid:
                expected = "a number" if constraint else "a positive number"
                raise ValueError(f"{name} is {value!r}, not {expected}")


def _values(value: Any, path: Sequence[str], name: str) -> Iterator[tuple[str, Any]]:
    """The values at a path with their names."""
    if not path:
        yield name, value
    elif path[0] != "*":
        inner = f"{name}.{path[0]}".lstrip(".")
        if not isinstance(value, dict) or path[0] not in value:
            raise ValueError(f"{inner} is missing")
        yield from _values(value[path[0]], path[1:], inner)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, path[1:], f"{name}.{key}")
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from _values(item, path[1:], f"{name}.{position}")
    else:
        raise ValueError(f"{name} is {value!r}, not an object or a non-empty list")
