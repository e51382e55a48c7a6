"""Batches of images: training images with random augmentation, test images without."""

import dataclasses
import functools
import os

import grain

from examples.image_classification import augmentation
from examples.image_classification.formats import Dataset

# Of ImageNet, for images that are not in memory.
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


@dataclasses.dataclass(frozen=True)
class Loader:
    """The batches of a data set, `{"image": float32, "label": int32}`.

    Attributes:
      data: the data set.
      side: the side of the images in pixels; images in memory already have it.
      batch: the number of images in a batch; a training epoch drops an incomplete batch.
      seed: the seed for the order and the augmentation.
      cutout: the side of the square that cutout sets to zero; 0 for none.
    """

    data: Dataset
    side: int
    batch: int
    seed: int
    cutout: int

    @property
    def steps_per_epoch(self):
        steps = len(self.data.train) // self.batch
        if not steps:
            raise ValueError(f"batch {self.batch} exceeds the {len(self.data.train)} images")
        return steps

    def train_batches(self, start=0):
        """Endless batches from step `start` on; a batch depends only on `seed` and its step."""
        images = grain.MapDataset.source(self.data.train).seed(self.seed).shuffle()
        if not self.data.in_memory:
            images = images.random_map(self._crop_at_random)
        batches = images.batch(self.batch, drop_remainder=True).random_map(self._augment).repeat()
        return _read(batches[start:])

    def eval_batches(self):
        images = grain.MapDataset.source(self.data.test)
        if not self.data.in_memory:
            images = images.map(self._crop)
        return _read(images.batch(self.batch).map(self._normalize))

    @functools.cached_property
    def _mean_and_std(self):
        if not self.data.in_memory:
            return MEAN, STD
        images = self.data.train.images
        sample = images[:: -(-len(images) // 5000)]
        return sample.mean((0, 1, 2)), sample.std((0, 1, 2))

    def _crop_at_random(self, one, rng):
        return one | {"image": augmentation.random_resized_crop(one["image"], rng, self.side)}

    def _crop(self, one):
        return one | {"image": augmentation.centre_crop(one["image"], self.side)}

    def _normalize(self, batch):
        return batch | {"image": augmentation.normalize(batch["image"], *self._mean_and_std)}

    def _augment(self, batch, rng):
        images = batch["image"]
        if self.data.in_memory:
            images = augmentation.random_crop(images, rng, self.side // 8)  # 4 for CIFAR
        if self.data.mirrored:
            images = augmentation.random_flip(images, rng)
        images = augmentation.normalize(images, *self._mean_and_std)
        return batch | {"image": augmentation.cutout(images, rng, self.cutout)}


def _read(batches):
    threads = os.cpu_count() or 1
    # grain's default prepares 500 batches ahead.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.to_iter_dataset(options))
