"""Train an image classifier, as in the experiments of the AdaFisher paper (arXiv:2405.16397).

python -m examples.image_classification --data cifar-10-batches-py --model resnet18 --epochs 200
"""

import dataclasses

import jax.numpy as jnp

from examples.image_classification import formats, models, task
from examples.image_classification.loader import Loader
from examples.training.report import table
from examples.training.run import run
from examples.training.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """The settings. The defaults, such as weight decay by kind of model, are the paper's."""

    data: str = setting(
        "digits", "digits, a folder, an .npz file or a name on the Hugging Face hub"
    )
    model: str = setting("cct-2-3x2", "the architecture", models.NAMES)
    image_size: int | None = setting(
        None, "side of images from files (default: 64 if they are 64x64, else 224)"
    )
    dtype: str = setting(
        "float32", "type of the arithmetic; parameters are float32", ("float32", "bfloat16")
    )
    cutout: int = setting(16, "side of the cutout square, at most half the image's; 0 for none")
    weights: str = setting("", "a file with initial weights, .npz or .safetensors")
    l2: float | None = setting(
        None, "weight decay in the loss (default: 0.0005, for transformers 0)"
    )
    weight_decay: float | None = setting(
        None, "decoupled weight decay (default: 0, for transformers 0.01)"
    )
    batch: int = setting(256, "examples in a batch")

    def __post_init__(self):
        super().__post_init__()
        l2, decoupled = (0.0, 1e-2) if self.model in models.TRANSFORMERS else (5e-4, 0.0)
        for name, default in (("l2", l2), ("weight_decay", decoupled)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the dataclass is frozen

    def task(self):
        """The task that the settings describe."""
        data = formats.read(self.data)
        side = self._side(data)
        loader = Loader(data, side, self.batch, self.seed, min(self.cutout, side // 2))
        model = models.by_name(self.model, len(data.classes), side, jnp.dtype(self.dtype))
        return task.make(self.model, model, loader, self.l2, self.weights)

    def _side(self, data):
        height, width = data.train[0]["image"].shape[:2]
        if data.in_memory:
            return height
        return self.image_size or (64 if height == width == 64 else 224)


def main(argv=None):
    settings = ImageSettings.from_flags(argv, __doc__.splitlines()[0])
    classification = settings.task()
    print(classification.layout)
    result = run(classification, settings)
    print(table(settings, result))
    return result


if __name__ == "__main__":
    main()
