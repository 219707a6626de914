"""ImageBatch: each distinct image is preprocessed once, and the result is shared."""

import pytest
import torch
from helpers.images import smooth_image

from miro.images.transforms import ImageTransform
from miro.rewards.image_batch import ImageBatch


def test_preprocessed_images_are_computed_once_and_shared() -> None:
    images = [smooth_image(50, 60), smooth_image(70, 40, 1)]
    batch = ImageBatch(images)
    pairs = batch.take([0, 0, 1])

    preprocessed = pairs.preprocessed(ImageTransform(32))

    assert preprocessed.shape == (2, 3, 32, 32)
    assert batch.preprocessed(ImageTransform(32)) is preprocessed
    assert pairs.rows == [0, 0, 1]
    assert len(pairs) == 3 and pairs[1] is images[0] and pairs[1:] == images


def test_preprocessing_a_batch_equals_preprocessing_each_image() -> None:
    images = [smooth_image(40 + n, 90 - n, n) for n in range(20)]

    preprocessed = ImageBatch(images).preprocessed(ImageTransform(24))

    assert torch.equal(preprocessed, torch.stack([ImageTransform(24)(image) for image in images]))


def test_a_repeated_image_is_one_distinct_image() -> None:
    image, other = smooth_image(50, 60), smooth_image(50, 60, 1)

    batch = ImageBatch([image, other, image])

    assert batch.rows == [0, 1, 0] and len(batch.distinct) == 2


def test_the_error_of_an_invalid_image_has_its_index() -> None:
    with pytest.raises(ValueError, match="image 1: expected uint8"):
        ImageBatch([smooth_image(8, 8), torch.zeros(3, 8, 8)]).preprocessed(ImageTransform(8))


def test_an_empty_batch_has_no_preprocessed_images() -> None:
    assert ImageBatch(()).preprocessed(ImageTransform(8)).shape == (0, 3, 8, 8)
