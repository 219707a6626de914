"""What the page of a dataset shows, as plain values: `miro.survey` finds them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardNumbers:
    """The scores of one reward over all image-caption pairs; unknown are those that are NaN."""

    name: str
    model: str | None  # what gave the scores, where the manifest names it
    known: int
    unknown: int
    distinct: int
    bins_used: int  # bins that hold a pair: equal scores share one
    mean: float | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)  # "0.5" -> score, nearest rank
    bin_edges: tuple[float, ...] = ()  # the inner edges of bins of equal population
    bar_edges: tuple[float, ...] = ()  # of the histogram, one more than bars
    bars: tuple[int, ...] = ()
    below: int = 0  # known scores beyond the bars, at most a thousandth at either end
    above: int = 0


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of rewards, over the pairs of which both scores are known."""

    rewards: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]  # None where fewer than two, or one is constant
    pairs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rejected:
    """What rejected.jsonl holds: counts by field and reason, numbers in a reason left out."""

    lines: int
    unreadable: int  # lines that are not of such a log
    reasons: tuple[tuple[str, str, int], ...]  # (field, reason, lines), most first
    examples: tuple[tuple[str, str, str], ...]  # (source, field, reason), the first of the file


@dataclass(frozen=True)
class Looks:
    """What the samples that were looked at hold; all of the dataset's, or some of each shard."""

    samples: int
    every: bool
    kinds: Mapping[str, int]  # caption kind -> captions
    unusable: int  # samples without a caption that can be read
    captions: int
    distinct: int
    mean_length: float  # characters
    longest: int
    sizes: Mapping[str, int] = field(default_factory=dict)  # "640 x 480" -> images, most first
    shorter_side: Mapping[str, float] = field(default_factory=dict)  # quantile -> pixels
    aspect: Mapping[str, float] = field(default_factory=dict)  # quantile -> width / height
    no_image: int = 0  # images whose header cannot be read


@dataclass(frozen=True)
class Shown:
    """One of the best or worst pairs by a reward."""

    key: str
    kind: str
    caption: str
    score: float


@dataclass(frozen=True)
class Sheet:
    """The best or the worst by a reward: one image for all, or none where none can be shown."""

    reward: str
    end: str  # "best" or "worst"
    shown: tuple[Shown, ...]
    skipped: tuple[str, ...] = ()  # which could not be decoded, and why
    columns: int = 0
    jpeg: bytes = b""


@dataclass(frozen=True)
class Survey:
    """A dataset folder in numbers and images. `pairs`: rows of the score files, None: none."""

    name: str
    kind: str
    samples: int
    shards: int
    bytes: int
    pairs: int | None
    bins: int
    looks: Looks
    rewards: tuple[RewardNumbers, ...] = ()
    correlation: Correlation | None = None
    rejected: Rejected | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    sheets: tuple[Sheet, ...] = ()
    no_images: str = ""  # why no images can be shown

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types, but for the images' bytes."""
        record = asdict(self)
        for sheet in record["sheets"]:
            del sheet["jpeg"], sheet["columns"]
        return record
