"""Scenes: rendering, captions, held-out compositions, and determinism."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from openmoji.compositions import (
    CATEGORIES,
    HARD_NEGATIVES,
    NUMBERS,
    RELATIONS,
    CaptionSpec,
    Scene,
    SceneObject,
    caption_specs,
    hard_negative,
    held_out,
    is_true,
    specs_by_caption,
    variants,
)
from openmoji.scenes import SceneStream, heldout_prompts, render_samples, write_scenes
from openmoji.sprites import BACKGROUNDS, CONCEPTS, TINTS, sprite_bank, svg_of
from PIL import Image

from miro.data.shards import Manifest, verify
from miro.sources.tar import iterate_shard

PAIR = CaptionSpec("two_objects", ("frog", "apple"))
LEFT = CaptionSpec("position", ("frog", "apple"), relation="left of", background="pink")
TINTED = CaptionSpec("colour_attribution", ("frog", "apple"), tints=("red", "blue"))
THREE = CaptionSpec("counting", ("butterfly",), count=3)


def frog_left_of_apple(tints: tuple[str | None, str | None] = (None, None)) -> Scene:
    objects = (
        SceneObject("frog", tints[0], 0.25, 0.5, 0.5),
        SceneObject("apple", tints[1], 0.75, 0.5, 0.5),
    )
    return Scene("position", objects, "pink")


# --- captions and truth -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "caption"),
    [
        (CaptionSpec("single_object", ("apple",)), "an apple"),
        (PAIR, "a frog and an apple"),
        (LEFT, "a frog left of an apple on a pink background"),
        (TINTED, "a red frog and a blue apple"),
        (THREE, "three butterflies"),
        (CaptionSpec("counting", ("fish",), count=2), "two fish"),
        (
            CaptionSpec("colours", ("car",), tints=("green",), background="orange"),
            "a green car on an orange background",
        ),
    ],
)
def test_captions_are_english(spec: CaptionSpec, caption: str) -> None:
    assert spec.caption == caption


def test_truth_follows_the_scene() -> None:
    scene = frog_left_of_apple()
    assert is_true(LEFT, scene) and is_true(PAIR, scene)
    assert not is_true(replace(LEFT, background="gray"), scene)
    assert not is_true(replace(LEFT, relation="right of"), scene)
    assert not is_true(replace(LEFT, relation="above"), scene)
    assert not is_true(replace(PAIR, concepts=("frog", "car")), scene)
    assert not is_true(TINTED, scene)
    assert is_true(TINTED, frog_left_of_apple(("red", "blue")))
    assert not is_true(TINTED, frog_left_of_apple(("blue", "red")))
    assert not is_true(CaptionSpec("counting", ("frog",), count=2), scene)


def test_true_captions_are_true_of_their_scene() -> None:
    for split in ("train", "heldout", "all"):
        for sample in SceneStream(3, split, wrong_captions=0).samples(0, 300):
            assert is_true(sample.caption_spec, sample.scene), sample


def test_captions_and_scenes_survive_json() -> None:
    for sample in SceneStream(1).samples(0, 50):
        content = json.loads(json.dumps(sample.to_json()))
        assert CaptionSpec.from_json(content["caption_spec"]) == sample.caption_spec
        assert Scene.from_json(content["scene"]) == sample.scene


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_about_one_composition_in_eight_is_held_out(category: str) -> None:
    train, out = (
        {s.composition for s in caption_specs(category, split)} for split in ("train", "heldout")
    )
    assert not train & out
    assert train | out == {s.composition for s in caption_specs(category, "all")}
    assert 0.09 < len(out) / len(train | out) < 0.15


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_word_of_a_category_stays_in_training(category: str) -> None:
    def words(split: str) -> set[object]:
        found: set[object] = set()
        for s in caption_specs(category, split):
            found |= {*s.concepts, *s.tints, s.relation, s.count, s.background}
        return found

    assert words("train") == words("all")
    assert set(CONCEPTS) <= words("train")
    if category == "colour_attribution":
        train = caption_specs(category, "train")
        pairs = {pair for s in train for pair in zip(s.tints, s.concepts, strict=True)}
        assert len(pairs) == len(CONCEPTS) * len(TINTS)


def test_a_composition_does_not_depend_on_the_order() -> None:
    mirrored = replace(LEFT, concepts=("apple", "frog"), relation="right of")
    assert mirrored.composition == LEFT.composition
    assert replace(LEFT, relation="right of").composition != LEFT.composition
    assert replace(LEFT, background=None).composition == LEFT.composition
    swapped = replace(TINTED, concepts=("apple", "frog"), tints=("blue", "red"))
    assert swapped.composition == TINTED.composition
    assert replace(TINTED, tints=("blue", "red")).composition != TINTED.composition
    assert CaptionSpec("single_object", ("frog",)).composition is None


def test_training_contains_no_held_out_composition() -> None:
    samples = SceneStream(0, "train", wrong_captions=1.0).samples(0, 3000)
    assert not {s.caption_spec.composition for s in samples} & held_out()
    truths = SceneStream(0, "train", wrong_captions=0).samples(0, 3000)
    assert not {s.caption_spec.composition for s in truths} & held_out()
    shown = {
        ("single_object", s.scene.objects[0].concept, s.scene.background)
        for s in samples
        if s.scene.category == "single_object"
    }
    assert shown and not shown & held_out()


def test_the_split_is_stable() -> None:
    # Otherwise models would be evaluated on compositions that they were trained on.
    assert ("counting", "frog", "three") in held_out()
    assert ("two_objects", "car", "panda") in held_out()
    assert len(held_out()) == 110


def test_held_out_prompts_are_balanced_and_never_trained_on() -> None:
    prompts = heldout_prompts(240, seed=5)
    assert Counter(p.category for p in prompts) == dict.fromkeys(CATEGORIES, 40)
    assert {p.caption_spec.composition for p in prompts} <= held_out()
    assert all(
        p.caption == p.caption_spec.caption and p.category == p.caption_spec.category
        for p in prompts
    )
    uses = Counter(p.caption_spec.composition for p in prompts if p.category == "two_objects")
    assert set(uses.values()) == {6, 7}  # 40 prompts, 6 held-out pairs
    assert heldout_prompts(60, seed=5) == prompts[:60]
    assert heldout_prompts(60, seed=6) != prompts[:60]


# --- wrong captions -----------------------------------------------------------------------------


def test_the_share_of_wrong_captions_is_as_configured() -> None:
    samples = SceneStream(2, wrong_captions=0.5).samples(0, 2000)
    wrong = [s for s in samples if not is_true(s.caption_spec, s.scene)]
    assert 0.46 < len(wrong) / len(samples) < 0.54
    none = SceneStream(2, wrong_captions=0).samples(0, 200)
    every = SceneStream(2, wrong_captions=1).samples(0, 200)
    assert all(is_true(s.caption_spec, s.scene) for s in none)
    assert not any(is_true(s.caption_spec, s.scene) for s in every)


@pytest.mark.parametrize(
    ("kind", "spec", "caption"),
    [
        ("swapped_objects", LEFT, "an apple left of a frog on a pink background"),
        ("flipped_relation", LEFT, "a frog right of an apple on a pink background"),
        ("swapped_colours", TINTED, "a blue frog and a red apple"),
    ],
)
def test_a_hard_negative_has_exactly_one_error(kind: str, spec: CaptionSpec, caption: str) -> None:
    assert hard_negative(spec, kind, np.random.default_rng(0)) == caption


def test_wrong_counts_and_replaced_objects_reach_every_alternative() -> None:
    rng = np.random.default_rng(0)
    counts = {hard_negative(THREE, "wrong_count", rng) for _ in range(50)}
    assert counts == {"two butterflies", "four butterflies"}
    replaced = variants(TINTED, "replaced_object")
    assert len(replaced) == 2 * (len(CONCEPTS) - 2)
    assert all(len({*s.concepts} & {"frog", "apple"}) == 1 for s in replaced)


def test_no_variant_is_true_of_the_scene() -> None:
    for sample in SceneStream(4, "all", wrong_captions=0).samples(0, 300):
        for kind in HARD_NEGATIVES:
            assert not any(is_true(s, sample.scene) for s in variants(sample.caption_spec, kind))


def test_an_impossible_error_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="a frog and an apple.*swapped_objects"):
        hard_negative(PAIR, "swapped_objects", rng)
    with pytest.raises(ValueError, match="did you mean 'swapped_colours'"):
        hard_negative(TINTED, "swapped_colors", rng)


# --- images -------------------------------------------------------------------------------------


def test_every_concept_has_artwork_and_all_sprites_differ() -> None:
    bank = sprite_bank(16)
    assert len(bank) == len(CONCEPTS) * (len(TINTS) + 1)
    for a, b in itertools.combinations(bank.values(), 2):
        assert np.abs(a - b).mean() > 0.01
    for concept in CONCEPTS:
        natural = bank[concept, None][..., :3]
        # A drawing in its own colors must not resemble a tinted one.
        assert all(np.abs(natural - bank[concept, t][..., :3]).max() > 0.2 for t in TINTS)


def test_an_unknown_concept_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no emoji named 'frogg'"):
        svg_of("frogg")


def test_objects_are_at_their_positions() -> None:
    clean = SceneStream(0, "all", wrong_captions=0, strength=0).samples(0, 200)
    for sample, image in zip(clean, render_samples(clean), strict=True):
        background = np.rint(np.array(BACKGROUNDS[sample.scene.background]) * 255)
        covered = np.abs(image - background).max(-1) > 3
        expected = np.zeros_like(covered)
        for item in sample.scene.objects:
            left, top = (round((c - item.width / 2) * 32) for c in (item.x, item.y))
            box = np.s_[top : top + round(item.width * 32), left : left + round(item.width * 32)]
            expected[box] = True
            assert covered[box].any()
        assert not (covered & ~expected).any()


def test_counting_scenes_have_that_many_objects() -> None:
    samples = SceneStream(0, "all", wrong_captions=0).samples(0, 400)
    counts = {len(s.scene.objects) for s in samples if s.scene.category == "counting"}
    assert counts == set(NUMBERS)
    for sample in samples:
        centers = {(t.x, t.y) for t in sample.scene.objects}
        assert len(centers) == len(sample.scene.objects)
    assert {s.caption_spec.relation for s in samples} == {None, *RELATIONS}


def test_degradations_agree_with_the_json_member() -> None:
    rough = SceneStream(7, wrong_captions=0).samples(0, 300)
    clean = [replace(s, degradation=type(s.degradation)()) for s in rough]
    before, after = (render_samples(s).astype(np.float32) for s in (clean, rough))
    quiet = [i for i, s in enumerate(rough) if s.degradation.noise == 0]
    for i in quiet:
        assert after[i].std() <= before[i].std() + 1
    gray = [i for i in quiet if rough[i].degradation.saturation < 0.3]
    spread = [np.ptp(p[gray], axis=-1).mean() for p in (before, after)]
    assert gray and spread[1] < 0.3 * spread[0]
    unchanged = [
        (d.blur, d.saturation, d.contrast) == (0, 1, 1) for d in (s.degradation for s in rough)
    ]
    untouched = [i for i in quiet if unchanged[i]]
    assert untouched and (before[untouched] == after[untouched]).all()


@pytest.mark.parametrize("size", [0, 33, 36])
def test_a_size_that_is_no_multiple_of_8_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size is {size}"):
        render_samples(SceneStream(0).samples(0, 1), size)


def test_every_caption_is_found_among_all_captions() -> None:
    samples = SceneStream(6, "all", wrong_captions=0.5).samples(0, 500)
    for sample in samples:
        assert specs_by_caption()[sample.caption_spec.caption] == sample.caption_spec
    assert "a unicorn" not in specs_by_caption()


# --- the stream and the folder ------------------------------------------------------------------


def test_a_sample_depends_on_seed_split_and_index_alone() -> None:
    stream = SceneStream(9)
    assert stream.samples(0, 40)[25:] == stream.samples(25, 40)
    whole = render_samples(stream.samples(0, 40))
    assert (whole[25:] == render_samples(stream.samples(25, 40))).all()
    assert SceneStream(10).samples(0, 40) != stream.samples(0, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"seed": -1}, "seed is -1"),
        ({"wrong_captions": 1.5}, "wrong_captions is 1.5"),
        ({"samples": 0}, "samples is 0"),
        ({"size": 20}, "size is 20"),
    ],
)
def test_an_impossible_argument_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    arguments: dict = {"samples": 4, "seed": 0, "split": "train", **options}
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "scenes", **arguments)


def test_a_folder_contains_images_captions_and_scenes(tmp_path: Path) -> None:
    manifest = write_scenes(tmp_path, samples=30, seed=0, split="train", shard_samples=12)
    assert manifest == Manifest.read(tmp_path)
    assert [s.samples for s in manifest.shards] == [12, 12, 6]
    assert manifest.kind == "images" and manifest.captions == ("original",)
    verify(tmp_path)
    stream = SceneStream(0)
    drawn = render_samples(stream.samples(0, 30))
    found = [m for s in manifest.shards for m in iterate_shard(tmp_path / "shards" / s.name)]
    for i, (key, members) in enumerate(found):
        assert key == f"{i:08d}" and set(members) == {"png", "json"}
        content = json.loads(members["json"])
        spec = CaptionSpec.from_json(content["caption_spec"])
        assert content["captions"] == {"original": spec.caption}
        assert content["wrong"] != is_true(spec, Scene.from_json(content["scene"]))
        assert (np.asarray(Image.open(io.BytesIO(members["png"]))) == drawn[i]).all()


def test_an_interrupted_call_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    options: dict = {"samples": 30, "seed": 0, "split": "heldout", "shard_samples": 10}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    complete = write_scenes(whole, **options)
    write_scenes(cut, **options)
    # As after a kill behind the first shard: the others are absent, or present but not listed.
    replace(complete, shards=complete.shards[:1]).write(cut)
    (cut / "shards" / "00001.tar").write_bytes(b"torn")
    (cut / "shards" / "00002.tar").unlink()
    first = (cut / "shards" / "00000.tar").stat().st_mtime_ns
    assert write_scenes(cut, **options) == complete
    assert (cut / "shards" / "00000.tar").stat().st_mtime_ns == first
    verify(cut)


def test_a_folder_of_other_scenes_is_refused(tmp_path: Path) -> None:
    before = write_scenes(tmp_path, samples=4, seed=0, split="train")
    with pytest.raises(ValueError, match="give another folder or delete"):
        write_scenes(tmp_path, samples=4, seed=1, split="train")
    assert Manifest.read(tmp_path) == before
    verify(tmp_path)
