"""The verifier: verdicts by category on hand-made findings, and fitting, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openmoji.compositions import CATEGORIES, MIN_DISTANCE, Statement, holds
from openmoji.scenes import SceneStream
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS
from openmoji.verifier import (
    Findings,
    Verifier,
    VerifierConfig,
    accuracy_by_category,
    fit_verifier,
    judge,
    load_verifier,
    verdicts,
)
from torch import Tensor

TINY = VerifierConfig(
    steps=6, batch_size=8, width=4, scenes=24, warmup_steps=2, test_scenes=24, seed=3
)
StepRecord = tuple[str, str | None, float, float]  # concept, tint, x, y


def findings(*seen: StepRecord, background: str = "white") -> Findings:
    """What a perfect network would see in one picture of these objects."""
    looks = [None, *TINTS]
    number = torch.zeros(1, len(CONCEPTS), 5)
    look = torch.zeros(1, len(CONCEPTS), len(looks))
    centre = torch.zeros(1, len(CONCEPTS), 2)
    backgrounds = torch.zeros(1, len(BACKGROUNDS))
    for concept in CONCEPTS:
        k = CONCEPTS.index(concept)
        mine = [s for s in seen if s[0] == concept]
        number[0, k, len(mine)] = 1
        for _, tint, x, y in mine:
            look[0, k, looks.index(tint)] = 1
            centre[0, k] += torch.tensor([x, y]) / len(mine)
    backgrounds[0, list(BACKGROUNDS).index(background)] = 1
    return Findings(number, look, centre, backgrounds)


def verdict(said: Statement, *seen: StepRecord, **options: bool) -> bool:
    return bool(judge(findings(*seen), [said], **options))


FROG: StepRecord = ("frog", None, 0.25, 0.5)
APPLE: StepRecord = ("apple", None, 0.75, 0.5)
RED_FROG: StepRecord = ("frog", "red", 0.25, 0.5)
BLUE_APPLE: StepRecord = ("apple", "blue", 0.75, 0.5)


def test_single_object_needs_the_object() -> None:
    said = Statement("single_object", ("frog",))
    assert verdict(said, FROG)
    assert verdict(said, RED_FROG, APPLE)  # more than was asked for is no fault
    assert not verdict(said, APPLE)
    assert not verdict(said)


def test_two_objects_need_both() -> None:
    said = Statement("two_objects", ("frog", "apple"))
    assert verdict(said, FROG, APPLE)
    assert not verdict(said, FROG)
    assert not verdict(said, APPLE)
    assert not verdict(said, FROG, ("frog", None, 0.75, 0.5))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_counting_needs_exactly_that_many(count: int) -> None:
    said = Statement("counting", ("frog",), count=count)
    for there in range(5):
        assert verdict(said, *[FROG] * there) == (there == count)
    assert not verdict(said, *[APPLE] * count)


def test_colours_need_the_tint_on_the_object() -> None:
    said = Statement("colours", ("frog",), tints=("red",))
    assert verdict(said, RED_FROG)
    assert not verdict(said, FROG)
    assert not verdict(said, ("frog", "blue", 0.5, 0.5))
    assert not verdict(said, FROG, ("apple", "red", 0.75, 0.5))
    assert not verdict(said, ("apple", "red", 0.5, 0.5))


@pytest.mark.parametrize(
    ("relation", "step"),
    [("left of", (1, 0)), ("right of", (-1, 0)), ("above", (0, 1)), ("below", (0, -1))],
)
def test_position_needs_both_objects_that_way_round(relation: str, step: tuple[int, int]) -> None:
    said = Statement("position", ("frog", "apple"), relation=relation)

    def apple(distance: float) -> StepRecord:
        return ("apple", None, 0.5 + distance * step[0], 0.5 + distance * step[1])

    frog: StepRecord = ("frog", None, 0.5, 0.5)
    assert verdict(said, frog, apple(MIN_DISTANCE + 0.01))
    assert not verdict(said, frog, apple(MIN_DISTANCE - 0.01))
    assert not verdict(said, frog, apple(-0.5))
    assert not verdict(said, frog)
    assert not verdict(replace(said, concepts=("apple", "frog")), frog, apple(0.5))


def test_colour_attribution_needs_each_tint_on_its_own_object() -> None:
    said = Statement("colour_attribution", ("frog", "apple"), tints=("red", "blue"))
    assert verdict(said, RED_FROG, BLUE_APPLE)
    assert not verdict(said, ("frog", "blue", 0.25, 0.5), ("apple", "red", 0.75, 0.5))
    assert not verdict(said, RED_FROG, APPLE)
    assert not verdict(said, FROG, BLUE_APPLE)
    assert not verdict(said, RED_FROG)


def test_the_background_counts_only_when_asked_for_and_said() -> None:
    said = Statement("single_object", ("frog",), background="pink")
    assert verdict(said, FROG)  # on white
    assert not verdict(said, FROG, background=True)
    assert verdict(replace(said, background="white"), FROG, background=True)
    assert verdict(replace(said, background=None), FROG, background=True)


def test_a_batch_is_judged_picture_by_picture() -> None:
    batch: Sequence[tuple[Findings, Statement, bool]] = [
        (findings(FROG), Statement("single_object", ("frog",)), True),
        (findings(FROG), Statement("two_objects", ("frog", "apple")), False),
        (findings(FROG, FROG), Statement("counting", ("frog",), count=2), True),
        (findings(FROG, APPLE), Statement("position", ("apple", "frog"), (), "left of"), False),
        (findings(RED_FROG), Statement("colours", ("frog",), ("red",)), True),
    ]
    whole = Findings(*(torch.cat(parts) for parts in zip(*(f for f, _, _ in batch), strict=True)))
    said = [s for _, s, _ in batch]
    found = judge(whole, said)
    assert found.tolist() == [expected for _, _, expected in batch]
    accuracy = accuracy_by_category(found, said)
    assert accuracy == {
        "single_object": 1, "two_objects": 0, "counting": 1, "position": 0, "colours": 1,
    }  # fmt: skip


def test_a_perfect_network_judges_as_the_scenes_themselves_do() -> None:
    samples = SceneStream(0, "all", wrong_captions=0.5).samples(0, 400)
    for sample in samples:
        seen = [(t.concept, t.tint, t.x, t.y) for t in sample.scene.things]
        found = judge(
            findings(*seen, background=sample.scene.background), [sample.said], background=True
        )
        assert found.item() == holds(sample.said, sample.scene), sample
    assert 100 < sum(holds(s.said, s.scene) for s in samples) < 300


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verifier]:
    folder = tmp_path_factory.mktemp("verifier")
    return folder, fit_verifier(folder, TINY)


def pictures_of_noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_a_loaded_verifier_sees_the_same(fitted: tuple[Path, Verifier]) -> None:
    folder, verifier = fitted
    images = pictures_of_noise(3)
    with torch.inference_mode():
        pairs = zip(verifier(images), load_verifier(folder)(images), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_seed_gives_the_same_verifier(fitted: tuple[Path, Verifier], tmp_path: Path) -> None:
    folder, _ = fitted
    state = torch.get_rng_state()
    fit_verifier(tmp_path / "again", TINY)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the caller's randomness alone
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "again")]
    assert weights[0] == weights[1]
    fit_verifier(tmp_path / "other", replace(TINY, seed=4))
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights[0]


def test_training_lowers_the_error(fitted: tuple[Path, Verifier], tmp_path: Path) -> None:
    # 150 tiny steps do not make a judge, but they find out that most concepts are absent.
    config = replace(TINY, steps=150, scenes=200, batch_size=32, width=8, degraded_share=0)
    fit_verifier(tmp_path, config)
    more = json.loads((tmp_path / "metrics.json").read_text())["clean"]
    less = json.loads((fitted[0] / "metrics.json").read_text())["clean"]
    assert sum(more.values()) > sum(less.values())


def test_metrics_cover_every_category(fitted: tuple[Path, Verifier]) -> None:
    metrics = json.loads((fitted[0] / "metrics.json").read_text())
    assert set(metrics) == {"clean", "clean_with_background", "degraded", "wrong_accepted"}
    for name in ("clean", "degraded"):
        assert set(metrics[name]) == set(CATEGORIES)
        assert all(0 <= share <= 1 for share in metrics[name].values())


def test_verdicts_judge_more_pictures_than_fit_at_once(fitted: tuple[Path, Verifier]) -> None:
    _, verifier = fitted
    images = pictures_of_noise(3).repeat(200, 1, 1, 1)
    said = [Statement("single_object", (CONCEPTS[i % 3],)) for i in range(600)]
    found = verdicts(verifier, images, said)
    assert found.shape == (600,) and found.dtype == torch.bool
    assert torch.equal(found[:3], verdicts(verifier, images[:3], said[:3]))
    assert verdicts(verifier, images[:0], []).shape == (0,)


def test_images_and_statements_must_fit(fitted: tuple[Path, Verifier]) -> None:
    _, verifier = fitted
    said = [Statement("single_object", ("frog",))]
    with pytest.raises(ValueError, match="2 pictures but 1 statements"):
        verdicts(verifier, pictures_of_noise(2), said)
    with pytest.raises(ValueError, match="must be uint8.*float32"):
        verdicts(verifier, torch.zeros(1, 3, 32, 32), said)


def test_a_folder_without_a_complete_verifier_is_refused(
    fitted: tuple[Path, Verifier], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"verifier\.json: no such file.*fit it again"):
        load_verifier(tmp_path)
    content = json.loads((fitted[0] / "verifier.json").read_text())
    content["words"]["concepts"][0] = "unicorn"
    (tmp_path / "verifier.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unicorn"):
        load_verifier(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("width", -1), ("degraded_share", 1.5)])
def test_an_impossible_configuration_is_refused(field: str, value: float) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        VerifierConfig(**options)
