"""Squares of images: as PIL makes them, made once, shared among rewards."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from miro.images.transforms import ImageTransform, for_each, normalised
from miro.rewards.image_batch import ImageBatch


def photograph(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (3, H, W): smooth, with edges, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    smooth[:, height // 3 : height // 2, width // 4 : width // 2] *= 0.3
    return (smooth.clamp(0, 1) * 255).byte()


def as_pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.asarray(picture.permute(1, 2, 0)))


@pytest.mark.parametrize("shape", [(480, 640), (641, 427), (224, 224), (100, 90), (225, 452)])
def test_a_cropped_square_is_what_torchvision_makes_of_the_pil_image(
    shape: tuple[int, int],
) -> None:
    picture = photograph(*shape)

    square = ImageTransform(224).of(picture)

    image = TF.resize(as_pil(picture), [224], TF.InterpolationMode.BICUBIC)
    expected = TF.pil_to_tensor(TF.center_crop(image, [224]))
    assert square.shape == expected.shape
    assert (square.int() - expected.int()).abs().max() <= 1


def test_where_half_a_pixel_is_left_over_a_view_says_which_way_it_rounds() -> None:
    picture = photograph(224, 227)

    nearest, down = (
        ImageTransform(224).of(picture),
        ImageTransform(224, crop_rounding="down").of(picture),
    )

    assert torch.equal(nearest, picture[:, :, 2:226])
    assert torch.equal(down, picture[:, :, 1:225])


def test_a_padded_square_holds_the_whole_image_on_the_mean_colour() -> None:
    picture = torch.full((3, 20, 40), 200, dtype=torch.uint8)

    square = ImageTransform(40, "pad").of(picture)

    assert (square[:, 10:30] == 200).all()
    assert square[:, 0, 0].tolist() == [122, 116, 104]


@pytest.mark.parametrize(("shape", "inside"), [((20, 40), (10, 30)), ((16, 1000), (19, 20))])
def test_a_letterboxed_square_holds_the_whole_image_on_black(
    shape: tuple[int, int], inside: tuple[int, int]
) -> None:
    picture = torch.full((3, *shape), 200, dtype=torch.uint8)

    square = ImageTransform(40, "letterbox").of(picture)

    top, bottom = inside
    assert (square[:, top:bottom] == 200).all()
    assert square.sum() == 3 * 200 * 40 * (bottom - top)


def test_a_square_is_made_once_for_all_who_look_at_it() -> None:
    images = [photograph(50, 60), photograph(70, 40, 1)]
    pictures = ImageBatch(images)
    pairs = pictures.take([0, 0, 1])

    squares = pairs.preprocessed(ImageTransform(32))

    assert squares.shape == (2, 3, 32, 32)
    assert pictures.preprocessed(ImageTransform(32)) is squares
    assert pairs.rows == [0, 0, 1]
    assert len(pairs) == 3 and pairs[1] is images[0] and pairs[1:] == images


def test_the_squares_of_many_images_are_those_of_each() -> None:
    images = [photograph(40 + n, 90 - n, n) for n in range(20)]

    squares = ImageBatch(images).preprocessed(ImageTransform(24))

    assert torch.equal(squares, torch.stack([ImageTransform(24).of(image) for image in images]))


def test_what_one_image_fails_with_is_raised() -> None:
    def change(picture: torch.Tensor) -> torch.Tensor:
        raise OSError(f"{picture.shape[1]} rows")

    with pytest.raises(OSError, match="^3 rows"):
        for_each([photograph(3, 4), photograph(5, 4)], change)


def test_one_image_in_several_places_is_one_image() -> None:
    image, other = photograph(50, 60), photograph(50, 60, 1)

    pictures = ImageBatch([image, other, image])

    assert pictures.rows == [0, 1, 0] and len(pictures.distinct) == 2


def test_what_is_no_image_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="image 1: expected uint8"):
        ImageBatch([photograph(8, 8), torch.zeros(3, 8, 8)]).preprocessed(ImageTransform(8))


def test_no_images_have_no_squares() -> None:
    assert ImageBatch(()).preprocessed(ImageTransform(8)).shape == (0, 3, 8, 8)


def test_normalised_pixels_have_the_mean_and_spread_of_clip() -> None:
    square = torch.tensor([122, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)

    pixels = normalised(square, torch.float32)

    assert pixels.abs().max() < 0.02  # half a grey level
