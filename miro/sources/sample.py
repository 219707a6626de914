"""One captioned image as others keep it: its captions, its JSON, and why it cannot be used."""

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
MAX_JSON_DEPTH = 100  # lists in lists; Python itself gives up at some hundreds, wherever it stands

NAME = re.compile(r"\s*<PERSON>", re.IGNORECASE)
ABSENT = "is missing"


@dataclass(frozen=True)
class RawSample:
    """An image (not decoded yet) with at least one caption. `extra`: what else its JSON says."""

    origin: str
    key: str
    extension: str
    image: bytes
    captions: dict[str, str]
    extra: dict[str, Any]


@dataclass(frozen=True)
class RejectedSample:
    """A line of rejected.jsonl. `whole`: a sample was lost, not just one caption of several."""

    source: str
    field: str
    reason: str
    whole: bool = True

    @property
    def line(self) -> tuple[str, str, str]:
        """As RejectedLog.add takes it."""
        return self.source, self.field, self.reason


def read_sample(
    origin: str, key: str, members: dict[str, bytes]
) -> Iterator[RawSample | RejectedSample]:
    """A sample by its members {extension: bytes}, or why not: an image and .txt, .json or both.

    Of two original captions that of the .json counts. Besides "caption" and "captions", which is
    {kind: text} or a list, the .json may hold texts under names like "synthetic_caption".
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
        found = _take_captions(extra)
    if "txt" in members and "original" not in found:
        found = {"original": members["txt"], **found}
    captions, problems = check_captions(origin, found, "no .txt, and no caption in a .json")
    yield from problems
    if captions:
        yield RawSample(origin, key, extension, members[extension], captions, extra)


def check_captions(
    origin: str, found: dict[str, Any], none: str
) -> tuple[dict[str, str], list[RejectedSample]]:
    """The captions of one sample that can be used, and what is wrong with the others.

    A bad caption among good ones is set aside alone. Without a good one the sample is lost: the
    reason is that of its first caption, or `none` where there was none.
    """
    captions: dict[str, str] = {}
    problems: dict[str, str] = {}
    for kind, value in found.items():
        caption = read_caption(value)
        if caption.problem:
            problems[kind] = caption.problem
        else:
            captions[kind] = caption.text
    if not captions:
        return {}, [RejectedSample(origin, "caption", next(iter(problems.values()), none))]
    rejections = [
        RejectedSample(origin, f"captions.{kind}", reason, whole=False)
        for kind, reason in problems.items()
    ]
    return captions, rejections


@dataclass(frozen=True)
class Caption:
    """A caption that can be used, or the problem it has."""

    text: str = ""
    problem: str = ""


def read_caption(value: Any) -> Caption:
    """A caption as a `.txt` (bytes) or a `.json` (a string) holds it, without outer white space.

    "<PERSON>", by which CC12M replaces names, is left out, as the released code does. A string
    decoded with "surrogateescape" has the problem of the bytes it came from.
    """
    if isinstance(value, bytes):
        if len(value) > MAX_CAPTION_BYTES:
            return Caption(problem=f"the caption has {len(value):,} bytes, more than 1 MB")
        value = value.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        return Caption(problem=f"the caption is not text but {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if not 0xDC80 <= code <= 0xDCFF:
            return Caption(
                problem="the caption is not Unicode text (it holds half a surrogate pair)"
            )
        before = len(value[: error.start].encode())
        byte = f"byte 0x{code - 0xDC00:02x} at {before}"
        return Caption(problem=f"the caption is not UTF-8 ({byte})")
    if size > MAX_CAPTION_BYTES:
        return Caption(problem=f"the caption has {size:,} bytes, more than 1 MB")
    if "\0" in value:
        return Caption(problem="the caption holds a zero byte; is it UTF-16?")
    text = NAME.sub("", value).strip()
    if text:
        return Caption(text)
    return Caption(problem="the caption is empty" + (" without <PERSON>" if value.strip() else ""))


def captions_of(value: Any, kind: str = "original") -> dict[str, Any]:
    """{kind: caption} of a text, a list of texts, or {kind: text}; nothing of anything else."""
    if isinstance(value, dict):
        return dict(zip(unique_keys(map(str, value)), value.values(), strict=True))
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return {kind if i == 0 else f"{kind}_{i}": text for i, text in enumerate(texts)}


def kind_of(name: str) -> str:
    """The kind of caption that a name like "caption_long" or "long_caption" says, or ""."""
    match = re.fullmatch(r"(?:caption_(.+)|(.+)_caption)", name, re.IGNORECASE)
    return next(unique_keys([match[1] or match[2]])) if match else ""


def is_caption(name: str, value: Any) -> bool:
    """Whether an entry of a sample's JSON is read as a caption."""
    named = kind_of(name) and isinstance(value, str) and is_prose(value)
    return name in ("caption", "captions") or bool(named)


def is_prose(value: Any) -> bool:
    """Whether a value may be a caption, and not a score or a length of one."""
    if isinstance(value, list | dict):
        return any(map(is_prose, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and re.fullmatch(r"[-+\d\s.,eE]+", value) is None


def unique_keys(names: Iterable[str], prefix: str = "") -> Iterator[str]:
    """A sample key for each name: ASCII, at most 64 characters of its end, no "." and no "/"."""
    taken: set[str] = set()
    repeats: dict[str, int] = {}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]", "_", name)[-64:] or "sample"
        key = base
        while key in taken:
            repeats[base] = repeats.get(base, 1) + 1
            key = f"{base}-{repeats[base]}"
        taken.add(key)
        yield prefix + key


def read_file(path: str, limit: int) -> bytes | str:
    """The bytes of a plain file, or why it cannot be read; `ABSENT` where there is none."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a plain file"
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
    """A JSON object; ValueError says what is wrong with it."""
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
        raise ValueError(f"holds no object but {type(content).__name__}")
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and _is_deep(content):
        raise ValueError(f"is nested too deeply, more than {MAX_JSON_DEPTH} levels")
    return content


def fingerprint(parts: list[str]) -> str:
    """SHA-256 in hex of the parts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()


def _take_captions(content: dict[str, Any]) -> dict[str, Any]:
    """Takes the captions out of a sample's JSON: {kind: caption}, kinds fit for a member's name."""
    several, single = content.pop("captions", None), content.pop("caption", None)
    found = {} if several is None else captions_of(several)
    if single is not None and "original" not in found:
        found = {"original": single, **found}
    for name in [name for name, value in content.items() if is_caption(name, value)]:
        kind, text = kind_of(name), content.pop(name)
        found.setdefault(name if kind in found else kind, text)
    return found


def _is_deep(content: dict[str, Any]) -> bool:
    """Whether lists and objects are nested to more than MAX_JSON_DEPTH levels."""
    level: list[Any] = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)
