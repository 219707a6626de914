"""Brace ranges, as shells and WebDataset write the names of many shards."""

from __future__ import annotations

import re

MAX_NAMES = 1_000_000


def expand_braces(text: str) -> list[str]:
    """The names that "a/{000..099}.tar" or "{train,val-{0..9}}.tar" stands for, in that order.

    Zeros in front are kept. ValueError for a brace that is not closed or holds neither a range nor
    a list, for a range that ends before it begins, and for more than a million names.
    """
    start = text.find("{")
    if start < 0:
        return [text]
    stop = _closing(text, start)
    body = text[start + 1 : stop]
    parts = _split(body)
    if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", body)) is not None:
        options = _count(text, *ends.groups())
    elif len(parts) > 1:
        options = [option for part in parts for option in expand_braces(part)]
    else:
        raise ValueError(
            f"{text}: {{{body}}} is neither a range like {{000..099}} nor a list like {{a,b}}"
        )
    rest = expand_braces(text[stop + 1 :])
    if len(options) * len(rest) > MAX_NAMES:
        raise ValueError(f"{text}: stands for more than {MAX_NAMES:,} files")
    return [text[:start] + option + end for option in options for end in rest]


def _count(text: str, first: str, last: str) -> list[str]:
    """The numbers of a range, as wide as its ends where one of these begins with a zero."""
    if int(first) > int(last):
        raise ValueError(f"{text}: the range {{{first}..{last}}} ends before it begins")
    if int(last) - int(first) >= MAX_NAMES:
        raise ValueError(f"{text}: stands for more than {MAX_NAMES:,} files")
    padded = any(end != str(int(end)) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise ValueError(f"{text}: the brace {text[start:]!r} is not closed")


def _split(body: str) -> list[str]:
    """The parts of a list, cut at the commas that stand in no inner brace."""
    parts, depth = [""], 0
    for character in body:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
