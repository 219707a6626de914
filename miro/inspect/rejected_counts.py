"""Counts of rejected.jsonl by reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from miro.inspect.summary import RejectedStats

EXAMPLES = 12
MAX_CHARACTERS = 200  # of a text of the file
MAX_REASONS = 1000  # the rest is counted as "other reasons", which bounds memory
# What differs from sample to sample: bytes of a file, addresses in memory, numbers.
_SPECIFIC = re.compile(r"b'[^']*'…?|b\"[^\"]*\"|\b0x[0-9a-f]+\b|\d+(?:[.,]\d+)*")


def read_rejected(path: Path) -> RejectedStats | None:
    """Count the lines of a log by reason; None if the file does not exist."""
    if not path.is_file():
        return None
    lines = invalid = 0
    reasons: Counter[tuple[str, str]] = Counter()
    examples: list[tuple[str, str, str]] = []
    with open(path, "rb") as file:
        for line in file:
            lines += 1
            try:
                content = json.loads(line)
                source, field, reason = (str(content[k]) for k in ("source", "field", "reason"))
            except (ValueError, KeyError, TypeError, RecursionError):
                invalid += 1
                continue
            group = field[:MAX_CHARACTERS], _generalize(source, reason)
            if group not in reasons and len(reasons) >= MAX_REASONS:
                group = "", "other reasons"
            reasons[group] += 1
            if len(examples) < EXAMPLES:
                texts = source[-MAX_CHARACTERS:], field[:MAX_CHARACTERS], reason[:MAX_CHARACTERS]
                examples.append(texts)
    counts = tuple((field, reason, count) for (field, reason), count in reasons.most_common())
    return RejectedStats(lines, invalid, counts, tuple(examples))


def _generalize(source: str, reason: str) -> str:
    """Replace names and numbers in a reason: "cat7.txt is missing" is "….txt is missing"."""
    stem = PurePosixPath(source).stem
    reason = re.sub(rf"(?<!\w){re.escape(stem)}(?=\.\w)", "…", reason) if stem else reason
    return _SPECIFIC.sub("…", reason[: 10 * MAX_CHARACTERS])[:MAX_CHARACTERS]
