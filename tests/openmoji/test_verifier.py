"""The verifier: matching of captions by category, fitting, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openmoji.verifier
import pytest
import torch
from openmoji.__main__ import prompts
from openmoji.compositions import (
    CATEGORIES,
    MIN_DISTANCE,
    CaptionSpec,
    held_out,
    is_true,
    specs_by_caption,
)
from openmoji.scenes import SceneStream, heldout_prompts, render_samples
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS
from openmoji.verifier import (
    Detections,
    Verifier,
    VerifierConfig,
    accuracy_by_category,
    fit_verifier,
    load_verifier,
    matches,
    verify,
)
from torch import Tensor

from miro.rewards.registry import build_reward

TINY = VerifierConfig(
    steps=6, batch_size=8, width=4, scenes=24, warmup_steps=2, test_scenes=24, seed=3
)
Object = tuple[str, str | None, float, float]  # concept, tint, x, y


def detections(*objects: Object, background: str = "white") -> Detections:
    """The output of a perfect network for one image of these objects."""
    classes = [None, *TINTS]
    counts = torch.zeros(1, len(CONCEPTS), 5)
    tints = torch.zeros(1, len(CONCEPTS), len(classes))
    centers = torch.zeros(1, len(CONCEPTS), 2)
    backgrounds = torch.zeros(1, len(BACKGROUNDS))
    for concept in CONCEPTS:
        k = CONCEPTS.index(concept)
        group = [o for o in objects if o[0] == concept]
        counts[0, k, len(group)] = 1
        for _, tint, x, y in group:
            tints[0, k, classes.index(tint)] = 1
            centers[0, k] += torch.tensor([x, y]) / len(group)
    backgrounds[0, list(BACKGROUNDS).index(background)] = 1
    return Detections(counts, tints, centers, backgrounds)


def shows(spec: CaptionSpec, *objects: Object, **options: bool) -> bool:
    return bool(matches(detections(*objects), [spec], **options))


FROG: Object = ("frog", None, 0.25, 0.5)
APPLE: Object = ("apple", None, 0.75, 0.5)
RED_FROG: Object = ("frog", "red", 0.25, 0.5)
BLUE_APPLE: Object = ("apple", "blue", 0.75, 0.5)


def test_single_object_needs_the_object() -> None:
    spec = CaptionSpec("single_object", ("frog",))
    assert shows(spec, FROG)
    assert shows(spec, RED_FROG, APPLE)  # additional objects are allowed
    assert not shows(spec, APPLE)
    assert not shows(spec)


def test_two_objects_need_both() -> None:
    spec = CaptionSpec("two_objects", ("frog", "apple"))
    assert shows(spec, FROG, APPLE)
    assert not shows(spec, FROG)
    assert not shows(spec, APPLE)
    assert not shows(spec, FROG, ("frog", None, 0.75, 0.5))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_counting_needs_exactly_that_many(count: int) -> None:
    spec = CaptionSpec("counting", ("frog",), count=count)
    for present in range(5):
        assert shows(spec, *[FROG] * present) == (present == count)
    assert not shows(spec, *[APPLE] * count)


def test_colours_need_the_tint_on_the_object() -> None:
    spec = CaptionSpec("colours", ("frog",), tints=("red",))
    assert shows(spec, RED_FROG)
    assert not shows(spec, FROG)
    assert not shows(spec, ("frog", "blue", 0.5, 0.5))
    assert not shows(spec, FROG, ("apple", "red", 0.75, 0.5))
    assert not shows(spec, ("apple", "red", 0.5, 0.5))


@pytest.mark.parametrize(
    ("relation", "step"),
    [("left of", (1, 0)), ("right of", (-1, 0)), ("above", (0, 1)), ("below", (0, -1))],
)
def test_position_needs_both_objects_that_way_round(relation: str, step: tuple[int, int]) -> None:
    spec = CaptionSpec("position", ("frog", "apple"), relation=relation)

    def apple(distance: float) -> Object:
        return ("apple", None, 0.5 + distance * step[0], 0.5 + distance * step[1])

    frog: Object = ("frog", None, 0.5, 0.5)
    assert shows(spec, frog, apple(MIN_DISTANCE + 0.01))
    assert not shows(spec, frog, apple(MIN_DISTANCE - 0.01))
    assert not shows(spec, frog, apple(-0.5))
    assert not shows(spec, frog)
    assert not shows(replace(spec, concepts=("apple", "frog")), frog, apple(0.5))


def test_colour_attribution_needs_each_tint_on_its_own_object() -> None:
    spec = CaptionSpec("colour_attribution", ("frog", "apple"), tints=("red", "blue"))
    assert shows(spec, RED_FROG, BLUE_APPLE)
    assert not shows(spec, ("frog", "blue", 0.25, 0.5), ("apple", "red", 0.75, 0.5))
    assert not shows(spec, RED_FROG, APPLE)
    assert not shows(spec, FROG, BLUE_APPLE)
    assert not shows(spec, RED_FROG)


def test_the_background_matters_only_on_request_and_if_mentioned() -> None:
    spec = CaptionSpec("single_object", ("frog",), background="pink")
    assert shows(spec, FROG)  # on white
    assert not shows(spec, FROG, background=True)
    assert shows(replace(spec, background="white"), FROG, background=True)
    assert shows(replace(spec, background=None), FROG, background=True)


def test_the_images_of_a_batch_are_independent() -> None:
    batch: Sequence[tuple[Detections, CaptionSpec, bool]] = [
        (detections(FROG), CaptionSpec("single_object", ("frog",)), True),
        (detections(FROG), CaptionSpec("two_objects", ("frog", "apple")), False),
        (detections(FROG, FROG), CaptionSpec("counting", ("frog",), count=2), True),
        (detections(FROG, APPLE), CaptionSpec("position", ("apple", "frog"), (), "left of"), False),
        (detections(RED_FROG), CaptionSpec("colours", ("frog",), ("red",)), True),
    ]
    whole = Detections(*(torch.cat(parts) for parts in zip(*(f for f, _, _ in batch), strict=True)))
    specs = [s for _, s, _ in batch]
    found = matches(whole, specs)
    assert found.tolist() == [expected for _, _, expected in batch]
    accuracy = accuracy_by_category(found, specs)
    assert accuracy == {
        "single_object": 1, "two_objects": 0, "counting": 1, "position": 0, "colours": 1,
    }  # fmt: skip


def test_perfect_detections_agree_with_the_truth_of_the_scenes() -> None:
    samples = SceneStream(0, "all", wrong_captions=0.5).samples(0, 400)
    for sample in samples:
        objects = [(o.concept, o.tint, o.x, o.y) for o in sample.scene.objects]
        found = matches(
            detections(*objects, background=sample.scene.background),
            [sample.caption_spec],
            background=True,
        )
        assert found.item() == is_true(sample.caption_spec, sample.scene), sample
    assert 100 < sum(is_true(s.caption_spec, s.scene) for s in samples) < 300


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verifier]:
    folder = tmp_path_factory.mktemp("verifier")
    return folder, fit_verifier(folder, TINY)


def noise_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_a_loaded_verifier_gives_the_same_output(fitted: tuple[Path, Verifier]) -> None:
    folder, verifier = fitted
    images = noise_images(3)
    with torch.inference_mode():
        pairs = zip(verifier(images), load_verifier(folder)(images), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_seed_gives_the_same_verifier(fitted: tuple[Path, Verifier], tmp_path: Path) -> None:
    folder, _ = fitted
    state = torch.get_rng_state()
    fit_verifier(tmp_path / "again", TINY)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's RNG state is unchanged
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "again")]
    assert weights[0] == weights[1]
    fit_verifier(tmp_path / "other", replace(TINY, seed=4))
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights[0]


def test_training_lowers_the_error(fitted: tuple[Path, Verifier], tmp_path: Path) -> None:
    # 150 small steps are enough to learn that most concepts are absent.
    config = replace(TINY, steps=150, scenes=200, batch_size=32, width=8, degraded_share=0)
    fit_verifier(tmp_path, config)
    more = json.loads((tmp_path / "metrics.json").read_text())["clean"]
    less = json.loads((fitted[0] / "metrics.json").read_text())["clean"]
    assert sum(more.values()) > sum(less.values())


def test_metrics_cover_every_category(fitted: tuple[Path, Verifier]) -> None:
    metrics = json.loads((fitted[0] / "metrics.json").read_text())
    assert set(metrics) == {"clean", "clean_with_background", "degraded", "false_acceptance"}
    for name in ("clean", "degraded"):
        assert set(metrics[name]) == set(CATEGORIES)
        assert all(0 <= share <= 1 for share in metrics[name].values())


def test_more_images_than_one_batch_are_verified(fitted: tuple[Path, Verifier]) -> None:
    _, verifier = fitted
    images = noise_images(3).repeat(200, 1, 1, 1)
    specs = [CaptionSpec("single_object", (CONCEPTS[i % 3],)) for i in range(600)]
    found = verify(verifier, images, specs)
    assert found.shape == (600,) and found.dtype == torch.bool
    assert torch.equal(found[:3], verify(verifier, images[:3], specs[:3]))
    assert verify(verifier, images[:0], []).shape == (0,)


def test_numbers_of_images_and_captions_must_agree(fitted: tuple[Path, Verifier]) -> None:
    _, verifier = fitted
    specs = [CaptionSpec("single_object", ("frog",))]
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        verify(verifier, noise_images(2), specs)
    with pytest.raises(ValueError, match="must be uint8.*float32"):
        verify(verifier, torch.zeros(1, 3, 32, 32), specs)


def test_a_folder_without_a_complete_verifier_is_refused(
    fitted: tuple[Path, Verifier], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"verifier\.json: no such file.*openmoji fit-verifier"):
        load_verifier(tmp_path)
    content = json.loads((fitted[0] / "verifier.json").read_text())
    content["vocabulary"]["concepts"][0] = "unicorn"
    (tmp_path / "verifier.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unicorn"):
        load_verifier(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("width", -1), ("degraded_share", 1.5)])
def test_an_impossible_configuration_is_refused(field: str, value: float) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        VerifierConfig(**options)


def test_the_reward_finds_the_caption_and_scores_nan_for_other_captions(
    fitted: tuple[Path, Verifier],
) -> None:
    folder, verifier = fitted
    images = noise_images(4)
    specs = [
        CaptionSpec("single_object", ("frog",), background="pink"),
        CaptionSpec("position", ("frog", "apple"), relation="right of"),
        CaptionSpec("counting", ("fish",), count=2),
    ]
    captions = [specs[0].caption, specs[1].caption, "a photo of a unicorn", specs[2].caption]

    reward = build_reward(f"openmoji.verifier:VerifierReward={folder}")
    scores = reward.score(list(images), captions)

    assert reward.name == "verifier" and reward.reads_caption
    assert scores[2].isnan()
    expected = verify(verifier, images[[0, 1, 3]], specs).float()
    assert torch.equal(scores[[0, 1, 3]], expected)
    with pytest.raises(ValueError, match="openmoji fit-verifier"):
        build_reward("openmoji.verifier:VerifierReward")


def test_the_reward_agrees_with_the_truth_of_clean_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SceneStream(1, "all", wrong_captions=0.5, strength=0).samples(0, 100)
    perfect = {
        image.tobytes(): detections(*((o.concept, o.tint, o.x, o.y) for o in sample.scene.objects))
        for image, sample in zip(render_samples(samples), samples, strict=True)
    }

    class Perfect(torch.nn.Module):
        """Looks the image up instead of looking at it."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Detections:
            found = [perfect[i.permute(1, 2, 0).numpy().tobytes()] for i in images]
            return Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    monkeypatch.setattr(openmoji.verifier, "load_verifier", lambda folder, device: Perfect())
    reward = build_reward("openmoji.verifier:VerifierReward=unused")
    images = list(torch.from_numpy(render_samples(samples)).permute(0, 3, 1, 2))

    scores = reward.score(images, [sample.caption_spec.caption for sample in samples])

    expected = [
        is_true(replace(sample.caption_spec, background=None), sample.scene) for sample in samples
    ]
    assert scores.tolist() == [float(true) for true in expected]


def test_the_prompt_command_writes_held_out_captions(tmp_path: Path) -> None:
    prompts(tmp_path / "prompts.txt", count=60)

    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert lines == [prompt.caption for prompt in heldout_prompts(60, 91_919)]
    assert {specs_by_caption()[line].composition for line in lines} <= held_out()
