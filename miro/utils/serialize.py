"""Configurations (frozen dataclasses) to and from JSON, their differences, and unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def unknown_name(kind: str, name: str, options: Iterable[str]) -> ValueError:
    """Return the error for a name that does not exist: it suggests the nearest and lists all."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}; {hint}Known: {', '.join(known)}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain JSON types, paths to strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(kind: type[T], record: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from what `to_dict` returned; `where` prefixes keys in errors.

    Raises:
        ValueError: a key is unknown (the message suggests the nearest), a required key is missing,
            or a value is invalid.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in record.items():
        if key not in fields:
            raise unknown_name("configuration key", f"{where}{key}", [where + f for f in fields])
        values[key] = _value(hints[key], value, f"{where}{key}.")
    for name, field in fields.items():
        required = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
        if required and name not in values:
            raise ValueError(f"the configuration lacks {where}{name}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _value(options[0], value, where)
    if origin is typing.Literal and value not in arguments:
        raise unknown_name(f"value of {where[:-1]}", str(value), map(str, arguments))
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if hint is Path and value is not None:
        return Path(value)
    return value


def differences(ours: dict[str, Any], theirs: dict[str, Any], where: str = "") -> list[str]:
    """List the keys in which two nested records differ, each with both values, for messages."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key}: {a!r} here, {b!r} there")
    return found
