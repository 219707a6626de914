"""rejected.jsonl in numbers: how many lines of each reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from miro.inspect.summary import Rejected

EXAMPLES = 12
SHOWN = 200  # characters of a text from a stranger's file
MOST_REASONS = 1000  # more are counted together, so that no file can fill the memory
# What differs from sample to sample: bytes of a file, addresses in memory, numbers.
_PARTICULAR = re.compile(r"b'[^']*'…?|b\"[^\"]*\"|\b0x[0-9a-f]+\b|\d+(?:[.,]\d+)*")


def read_rejected(path: Path) -> Rejected | None:
    """The log in numbers, or None where the file does not exist."""
    if not path.is_file():
        return None
    lines = unreadable = 0
    reasons: Counter[tuple[str, str]] = Counter()
    examples: list[tuple[str, str, str]] = []
    with open(path, "rb") as file:
        for line in file:
            lines += 1
            try:
                content = json.loads(line)
                source, field, reason = (str(content[k]) for k in ("source", "field", "reason"))
            except (ValueError, KeyError, TypeError, RecursionError):
                unreadable += 1
                continue
            group = field[:SHOWN], _general(source, reason)
            if group not in reasons and len(reasons) >= MOST_REASONS:
                group = "", "other reasons"
            reasons[group] += 1
            if len(examples) < EXAMPLES:
                examples.append((source[-SHOWN:], field[:SHOWN], reason[:SHOWN]))
    most = tuple((field, reason, count) for (field, reason), count in reasons.most_common())
    return Rejected(lines, unreadable, most, tuple(examples))


def _general(source: str, reason: str) -> str:
    """A reason without what is its sample's own: "cat7.txt is missing" is "….txt is missing"."""
    stem = PurePosixPath(source).stem
    reason = re.sub(rf"(?<!\w){re.escape(stem)}(?=\.\w)", "…", reason) if stem else reason
    return _PARTICULAR.sub("…", reason[: 10 * SHOWN])[:SHOWN]
