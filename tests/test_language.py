"""The language rule of CONTRIBUTING.md: words that this project once used in a private sense."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A pattern, and the field's word for it.
BANNED = {
    r"\bpictures?\b": "image",
    r"\btold\b": "conditioned on, configured, requested, reported",
    r"\bset aside\b": "skipped",
    r"\b(strata|stratum|stratified)\b": "buckets",
    r"\b(visits?|visited)\b": "sample draw, batch, epoch",
    r"\b(nobody|no one)\b": "name what is unused",
    r"\blets? go\b": "release, free",
    r"\balike\b": "equal, the same",
    r"\b(was|were) \w+ otherwise\b": "with other settings",
    r"\bcrossing factor\b": "data efficiency",
}
# Where a banned word is right: the line must match.
ALLOWED = (
    r"https?://",
    r'"Describe this picture',  # a prompt: other words, other captions
    r'generator_from\(.*"visit"',  # seeds are derived from this string: another one, other noise
    r"generic_visit|visit_\w+\(|def visit\(|[^\w]visit\(name",  # ast.NodeVisitor
)
FOLDERS = ("kernels", "miro", "examples", "launch", "docs", "profiling")
SUFFIXES = {".py", ".sh", ".md", ".html", ".toml"}
GENERATED = ("profiling/results/",)


def lines() -> Iterator[tuple[str, int, str]]:
    """(file, line number, text) of the product's code and documents."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    files += sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in SUFFIXES)
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(GENERATED):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                yield name, number, line


@pytest.mark.parametrize("pattern", BANNED)
def test_no_private_word_is_used(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in lines()
        if re.search(pattern, line, re.IGNORECASE)
        and not any(re.search(allowed, line) for allowed in ALLOWED)
    ]

    assert not found, f"say {BANNED[pattern]!r} instead:\n" + "\n".join(found)
