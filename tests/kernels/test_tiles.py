"""The table of tiles, and files that override its entries."""

import json
from pathlib import Path

import pytest

from miro_kernels import tiles
from miro_kernels._triton import Target

GOOD = {"rows": 2, "tokens": 32, "programs": 1, "warps": 4, "stages": 1}


@pytest.mark.parametrize(
    ("target", "family"),
    [
        (Target("cuda", 80), "sm_80"),
        (Target("cuda", 86), "sm_80"),
        (Target("cuda", 90), "sm_90"),
        (Target("cuda", 103), "sm_100"),
        (Target("cuda", 120), "sm_80"),
        (Target("hip", "gfx950"), "gfx942"),
    ],
)
def test_every_target_has_a_family_with_tiles(target: Target, family: str) -> None:
    assert target.family == family
    for kernel, settings in tiles.TILES[family].items():
        assert tiles.tile(kernel, target) == settings


def test_all_families_have_the_same_kernels_and_settings() -> None:
    names = {
        family: {kernel: sorted(settings) for kernel, settings in kernels.items()}
        for family, kernels in tiles.TILES.items()
    }
    assert all(found == names["sm_90"] for found in names.values())


def test_a_file_overrides_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"sm_90": {"norm_backward": GOOD}}))
    monkeypatch.setattr(tiles, "_overrides", tiles.read_tiles(file))

    assert tiles.tile("norm_backward", Target("cuda", 90)) == GOOD
    assert tiles.tile("norm_backward", Target("cuda", 80)) == tiles.TILES["sm_80"]["norm_backward"]
    assert tiles.tile("norm_forward", Target("cuda", 90)) == tiles.TILES["sm_90"]["norm_forward"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sm_91": {}}, "no family 'sm_91'; known: sm_80"),
        ({"sm_90": {"norm": GOOD}}, "sm_90.norm must be one of norm_forward"),
        ({"sm_90": {"norm_backward": {"rows": 2}}}, "rows, tokens, programs, warps, stages"),
        (
            {"sm_90": {"norm_backward": {**GOOD, "rows": 3}}},
            "norm_backward.rows.*power of 2, got 3",
        ),
        ({"sm_90": {"norm_backward": {**GOOD, "rows": "4"}}}, "power of 2, got '4'"),
    ],
)
def test_an_invalid_file_is_rejected_with_the_entry(
    tmp_path: Path, content: dict, message: str
) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(content))

    with pytest.raises(ValueError, match=message):
        tiles.read_tiles(file)
