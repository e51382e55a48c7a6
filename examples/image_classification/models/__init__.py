"""The models of the paper's image experiments, by name.

A model is called as `model.apply(variables, images, train)`, with images of shape (examples, side,
side, channels). Arithmetic is in `dtype`, parameters are float32. The last layer is named `head`.
"""

import jax.numpy as jnp

from examples.image_classification.models.cct import CCT
from examples.image_classification.models.mobilenet import MobileNetV3Large, MobileNetV3Small
from examples.image_classification.models.resnet import ResNet18, ResNet50, ResNet101
from examples.image_classification.models.swin import Swin

CONVOLUTIONAL = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "mobilenetv3-small": MobileNetV3Small,
    "mobilenetv3-large": MobileNetV3Large,
}
TRANSFORMERS = {"swin-tiny": Swin, "cct-2-3x2": CCT}
NAMES = (*CONVOLUTIONAL, *TRANSFORMERS)


def by_name(name, classes, image_size, dtype=jnp.float32):
    """Builds a model for images of a given size; up to 64 pixels count as small."""
    small = image_size <= 64
    if name in CONVOLUTIONAL:
        return CONVOLUTIONAL[name](classes, small_images=small, dtype=dtype)
    if name == "swin-tiny":
        patch, window = (max(image_size // 16, 1), 4) if small else (4, 7)
        return Swin(classes, patch, window, dtype=dtype)
    if name == "cct-2-3x2":
        return CCT(classes, dtype=dtype)
    raise ValueError(f"model {name!r} is none of {', '.join(NAMES)}")
