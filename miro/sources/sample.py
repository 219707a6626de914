"""Parse and validate one captioned image: its captions, its JSON, and the reason if unusable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from miro.images.pillow import IMAGE_EXTENSIONS

MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20
MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 100  # nested lists and objects; far below the recursion limit of Python's json

PERSON = re.compile(r"\s*<PERSON>", re.IGNORECASE)
ABSENT = "is missing"


@dataclass(frozen=True)
class RawSample:
    """An image file, not decoded, with at least one caption."""

    origin: str  # file, member or row it was read from, for messages
    key: str  # unique in its source
    extension: str  # of the image file, lower case without the dot
    image: bytes
    captions: dict[str, str]  # by caption type
    extra: dict[str, Any]  # further fields of its JSON or table row


@dataclass(frozen=True)
class RejectedSample:
    """A line of rejected.jsonl; `whole` is False if only one caption of several is rejected."""

    source: str
    field: str
    reason: str
    whole: bool = True


Samples = Iterator[RawSample | RejectedSample]


def read_sample(origin: str, key: str, members: dict[str, bytes]) -> Samples:
    """Read a sample from its members, {extension: bytes}, and yield what is rejected of it.

    A sample has an image and a .txt, a .json or both; an original caption in the .json takes
    precedence. Captions in the .json are "caption", "captions" ({type: text} or a list), and texts
    under names like "synthetic_caption".
    """
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        yield RejectedSample(origin, "image", f"no image among the members {sorted(members)}")
        return
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if "json" in members:
        try:
            extra = read_json(members["json"])
        except ValueError as error:
            yield RejectedSample(origin, "caption", f"the .json {error}")
            return
        found = _pop_captions(extra)
    if "txt" in members and "original" not in found:
        found = {"original": members["txt"], **found}
    captions, problems = check_captions(origin, found, "no .txt, and no caption in a .json")
    yield from problems
    if captions:
        yield RawSample(origin, key, extension, members[extension], captions, extra)


def check_captions(
    origin: str, found: dict[str, Any], if_none: str
) -> tuple[dict[str, str], list[RejectedSample]]:
    """Split the captions of a sample into valid ones and rejections.

    An invalid caption among valid ones is rejected alone. Without a valid one the whole sample is
    rejected, with the problem of its first caption, or `if_none` if it has no caption at all.
    """
    captions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name, value in found.items():
        caption = read_caption(value)
        if caption.problem:
            problems[name] = caption.problem
        else:
            captions[name] = caption.text
    if not captions:
        return {}, [RejectedSample(origin, "caption", next(iter(problems.values()), if_none))]
    rejections = [
        RejectedSample(origin, f"captions.{name}", reason, whole=False)
        for name, reason in problems.items()
    ]
    return captions, rejections


@dataclass(frozen=True)
class Caption:
    """A valid caption, or the problem of an invalid one."""

    text: str = ""
    problem: str = ""


def read_caption(value: Any) -> Caption:
    """Validate a caption from a .txt (bytes) or a .json (str), and strip white space.

    "<PERSON>", which replaces names in CC12M, is removed as in the released MIRO code. A string
    that was decoded with "surrogateescape" is reported as the invalid UTF-8 it came from.
    """
    if isinstance(value, bytes):
        if len(value) > MAX_CAPTION_BYTES:
            return Caption(problem=f"the caption has {len(value):,} bytes, more than 1 MB")
        value = value.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        return Caption(problem=f"the caption must be text, got {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if not 0xDC80 <= code <= 0xDCFF:
            return Caption(
                problem="the caption is not Unicode text (it contains half a surrogate pair)"
            )
        before = len(value[: error.start].encode())
        byte = f"byte 0x{code - 0xDC00:02x} at {before}"
        return Caption(problem=f"the caption is not UTF-8 ({byte})")
    if size > MAX_CAPTION_BYTES:
        return Caption(problem=f"the caption has {size:,} bytes, more than 1 MB")
    if "\0" in value:
        return Caption(problem="the caption contains a zero byte; is it UTF-16?")
    text = PERSON.sub("", value).strip()
    if text:
        return Caption(text)
    return Caption(problem="the caption is empty" + (" without <PERSON>" if value.strip() else ""))


def captions_of(value: Any, name: str = "original") -> dict[str, Any]:
    """Return {caption type: caption} of a text, a list of texts or {type: text}, else {}."""
    if isinstance(value, dict):
        return dict(zip(unique_keys(map(str, value)), value.values(), strict=True))
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return {name if i == 0 else f"{name}_{i}": text for i, text in enumerate(texts)}


def caption_type(name: str) -> str:
    """Return the caption type in a name like "caption_long" or "long_caption", else ""."""
    match = re.fullmatch(r"(?:caption_(.+)|(.+)_caption)", name, re.IGNORECASE)
    return next(unique_keys([match[1] or match[2]])) if match else ""


def is_caption(name: str, value: Any) -> bool:
    """Whether a field of a sample's JSON is a caption."""
    if name in ("caption", "captions"):
        return True
    return bool(caption_type(name)) and isinstance(value, str) and is_prose(value)


def is_prose(value: Any) -> bool:
    """Whether a value may be a caption, rather than a score or a length of one."""
    if isinstance(value, list | dict):
        return any(map(is_prose, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and re.fullmatch(r"[-+\d\s.,eE]+", value) is None


def unique_keys(names: Iterable[str], prefix: str = "") -> Iterator[str]:
    """Yield a unique sample key per name: the last 64 characters, all but [A-Za-z0-9_-] as "_"."""
    used: set[str] = set()
    repeats: dict[str, int] = {}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]", "_", name)[-64:] or "sample"
        key = base
        while key in used:
            repeats[base] = repeats.get(base, 1) + 1
            key = f"{base}-{repeats[base]}"
        used.add(key)
        yield prefix + key


def read_file(path: str, limit: int) -> bytes | str:
    """Read a regular file of at most `limit` bytes, or return why not; `ABSENT` if missing."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_size > limit:
            return f"is too large: {status.st_size:,} bytes, the limit is {limit:,}"
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return ABSENT
    except (PermissionError, NotADirectoryError) as error:
        return f"cannot be read: {error.strerror}"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link to itself"
        if error.errno == errno.ENAMETOOLONG:
            return "has a name that is too long"
        raise


def read_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError if it is too large, too deep or no object."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has {len(data):,} bytes, more than {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {type(content).__name__}")
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and _is_deep(content):
        raise ValueError(f"is nested too deeply, more than {MAX_JSON_DEPTH} levels")
    return content


def fingerprint(parts: list[str]) -> str:
    """Return the SHA-256, in hex, of the parts, each terminated by a zero byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()


def _pop_captions(content: dict[str, Any]) -> dict[str, Any]:
    """Remove the captions from a sample's JSON and return them by type."""
    several, single = content.pop("captions", None), content.pop("caption", None)
    found = {} if several is None else captions_of(several)
    if single is not None and "original" not in found:
        found = {"original": single, **found}
    for name in [name for name, value in content.items() if is_caption(name, value)]:
        short, text = caption_type(name), content.pop(name)
        found.setdefault(name if short in found else short, text)
    return found


def _is_deep(content: dict[str, Any]) -> bool:
    """Whether lists and objects are nested more than MAX_JSON_DEPTH levels deep."""
    level: list[Any] = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)
