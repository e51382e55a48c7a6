"""Random changes to training images that keep their class.

`random_resized_crop` and `centre_crop` make a square of one uint8 image, (height, width, channels).
The other functions take a batch of squares, (examples, side, side, channels).
"""

import numpy as np
from PIL import Image


def random_resized_crop(image, rng, side):
    """Crops a rectangle of 8 to 100 % of the area, in shape 3:4 to 4:3; scales it to a square."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_width, crop_height = (area * shape) ** 0.5, (area / shape) ** 0.5
        if crop_width <= width and crop_height <= height:
            left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return _scale(image, side, (left, top, left + crop_width, top + crop_height))
    return centre_crop(image, side)  # no crop fits into a very long image


def centre_crop(image, side):
    """Crops 7/8 of the shorter side from the centre, unless the image has the right size."""
    height, width = image.shape[:2]
    if height == width == side:
        return image
    crop = min(height, width) * 7 / 8
    left, top = (width - crop) / 2, (height - crop) / 2
    return _scale(image, side, (left, top, left + crop, top + crop))


def _scale(image, side, box):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box))


def random_crop(images, rng, padding):
    """Shifts each image by up to `padding` pixels, and fills the rest with black."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = rng.integers(0, 2 * padding + 1, (len(images), 2))
    crops = zip(padded, corners, strict=True)
    return np.stack([image[top : top + side, left : left + side] for image, (top, left) in crops])


def random_flip(images, rng):
    """Mirrors each image with probability 1/2."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def normalize(images, mean, std):
    """uint8 to float32, each channel with mean 0 and variance 1 over the training set."""
    return (images - np.float32(mean)) / np.float32(std)


def cutout(images, rng, length):
    """Puts zeros in a square of each image (DeVries and Taylor, 2017, arXiv:1708.04552).

    The centre is anywhere in the image, so a part of the square may lie outside.
    """
    examples, side = images.shape[:2]
    begin = rng.integers(0, side, (2, examples, 1)) - length // 2
    pixels = np.arange(side)
    rows, columns = (begin <= pixels) & (pixels < begin + length)
    return np.where((rows[:, :, None] & columns[:, None])[..., None], np.float32(0), images)
