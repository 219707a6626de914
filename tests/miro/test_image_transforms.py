"""Image transforms against Pillow and torchvision."""

import pytest
import torch
from helpers.images import smooth_image
from helpers.toy_clips import as_pil
from torchvision.transforms import functional as TF

from miro.images.transforms import ImageTransform, map_images, normalize


@pytest.mark.parametrize("shape", [(480, 640), (641, 427), (224, 224), (100, 90), (225, 452)])
def test_crop_equals_torchvision_on_the_pil_image(shape: tuple[int, int]) -> None:
    image = smooth_image(*shape)

    cropped = ImageTransform(224)(image)

    resized = TF.resize(as_pil(image), [224], TF.InterpolationMode.BICUBIC)
    expected = TF.pil_to_tensor(TF.center_crop(resized, [224]))
    assert cropped.shape == expected.shape
    assert (cropped.int() - expected.int()).abs().max() <= 1


def test_an_odd_crop_margin_is_rounded_as_configured() -> None:
    image = smooth_image(224, 227)

    nearest = ImageTransform(224)(image)
    down = ImageTransform(224, crop_rounding="down")(image)

    assert torch.equal(nearest, image[:, :, 2:226])
    assert torch.equal(down, image[:, :, 1:225])


def test_pad_shows_the_whole_image_on_the_mean_color() -> None:
    image = torch.full((3, 20, 40), 200, dtype=torch.uint8)

    padded = ImageTransform(40, "pad")(image)

    assert (padded[:, 10:30] == 200).all()
    assert padded[:, 0, 0].tolist() == [122, 116, 104]


@pytest.mark.parametrize(("shape", "inside"), [((20, 40), (10, 30)), ((16, 1000), (19, 20))])
def test_letterbox_shows_the_whole_image_on_black(
    shape: tuple[int, int], inside: tuple[int, int]
) -> None:
    image = torch.full((3, *shape), 200, dtype=torch.uint8)

    letterboxed = ImageTransform(40, "letterbox")(image)

    top, bottom = inside
    assert (letterboxed[:, top:bottom] == 200).all()
    assert letterboxed.sum() == 3 * 200 * 40 * (bottom - top)


def test_map_images_raises_the_error_of_an_image() -> None:
    def fail(image: torch.Tensor) -> torch.Tensor:
        raise OSError(f"{image.shape[1]} rows")

    with pytest.raises(OSError, match="^3 rows"):
        map_images([smooth_image(3, 4), smooth_image(5, 4)], fail)


def test_normalize_maps_the_mean_of_clip_to_zero() -> None:
    image = torch.tensor([122, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)

    pixels = normalize(image, torch.float32)

    assert pixels.abs().max() < 0.02  # half a grey level
