"""Readers for data sets of labelled images in several formats.

A split is a grain data source. `split[i]` is `{"image": uint8 (height, width, channels), "label":
index of the class}`.
"""

import concurrent.futures
import io
import itertools
import pathlib
import pickle
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png"}
SMALL = 32  # pixels; images of the hub up to this size are decoded once, into memory


class Arrays:
    """A split of images of one size, in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, np.asarray(labels, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


class Files:
    """A split of images of any size, decoded on access."""

    def __init__(self, paths, labels):
        self.paths, self.labels = paths, np.asarray(labels, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": decode(self.paths[index]), "label": self.labels[index]}


class HubRows:
    """A split of a data set from the Hugging Face hub, decoded on access."""

    def __init__(self, rows, image, label):
        self.rows, self.image, self.label = rows, image, label

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[int(index)]
        return {"image": as_array(row[self.image]), "label": np.int32(row[self.label])}


class Dataset(NamedTuple):
    """A training split and a test split.

    Attributes:
      train: a split.
      test: a split.
      classes: the names of the classes, by index.
      mirrored: whether a mirror image belongs to the same class.
    """

    train: Any
    test: Any
    classes: tuple[str, ...]
    mirrored: bool = True

    @property
    def in_memory(self):
        """Whether the images are in memory, as squares of one size."""
        return isinstance(self.train, Arrays)


def read(data):
    """Reads `digits`, an `.npz` file of JPEGs, a folder, or a data set of the hub."""
    path = pathlib.Path(data)
    if data == "digits":
        return digits()
    if path.suffix == ".npz":
        return jpegs(path)
    if (path / "train").is_dir():
        return folders(path)
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        if (folder / "meta").is_file() or (folder / "batches.meta").is_file():
            return cifar(folder)
    if path.exists():
        raise ValueError(f"{path} has no folder train/, and is none of CIFAR's")
    return hub(data)


def digits():
    """The 8x8 digits that come with scikit-learn: 1,297 to train, 500 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=500, random_state=0, stratify=labels
    )
    classes = tuple("0123456789")
    return Dataset(Arrays(train, train_labels), Arrays(test, test_labels), classes, mirrored=False)


def cifar(folder):
    """The Python version of CIFAR-10 or CIFAR-100, as its authors distribute it."""
    if (folder / "batches.meta").is_file():
        splits = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
        label, names = b"labels", _unpickle(folder / "batches.meta")[b"label_names"]
    else:
        splits = ["train"], ["test"]
        label, names = b"fine_labels", _unpickle(folder / "meta")[b"fine_label_names"]

    def split(files):
        parts = [_unpickle(folder / file) for file in files]
        images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[label] for part in parts])
        return Arrays(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels)

    return Dataset(*map(split, splits), tuple(name.decode() for name in names))


def _unpickle(path):
    with open(path, "rb") as file:
        return pickle.load(file, encoding="bytes")


def jpegs(path):
    """An `.npz` file with the concatenated JPEGs, their offsets and labels, for each split."""

    def split(name):
        content, offsets = stored[f"{name}_jpeg"].tobytes(), stored[f"{name}_offsets"]
        files = [content[a:b] for a, b in itertools.pairwise(offsets)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(lambda file: decode(io.BytesIO(file)), files)))
        return Arrays(images, stored[f"{name}_labels"])

    with np.load(path) as stored:
        return Dataset(split("train"), split("test"), tuple(stored["classes"].tolist()))


def folders(path):
    """`train/<class>/…` and `val/<class>/…`, or Tiny ImageNet's `val/val_annotations.txt`."""
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())
    number = {name: index for index, name in enumerate(classes)}

    def split(folder):
        found = [
            (file, label)
            for name, label in number.items()
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in EXTENSIONS
        ]
        if not found:
            raise ValueError(f"no images in {folder}/<class>/, where <class> is as in {path}/train")
        return Files(*zip(*found, strict=True))

    annotations = path / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return Dataset(split(path / "train"), split(path / "val"), tuple(classes))
    lines = [line.split("\t") for line in annotations.read_text().splitlines()]
    test = Files(
        [path / "val" / "images" / file for file, *_ in lines],
        [number[name] for _, name, *_ in lines],
    )
    return Dataset(split(path / "train"), test, tuple(classes))


def hub(name):
    """A data set of the Hugging Face hub, downloaded and cached by the package `datasets`.

    The labels are the finest available. The test split is the validation split if there is one.
    """
    import datasets

    splits = datasets.load_dataset(name)
    test = next((split for split in ("validation", "valid", "test") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name} has splits {', '.join(splits)}: wanted train and a held-out one")
    features = splits["train"].features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(f"{name} has columns {features}: wanted an Image and a ClassLabel")
    label = max(labels, key=lambda key: features[key].num_classes)

    def split(rows):
        source = HubRows(rows, images[0], label)
        if max(source[0]["image"].shape) > SMALL:
            return source
        kept = [source[index] for index in range(len(source))]
        return Arrays(np.stack([one["image"] for one in kept]), [one["label"] for one in kept])

    return Dataset(split(splits["train"]), split(splits[test]), tuple(features[label].names))


def decode(file):
    """Decodes an image file, given its path or an open file."""
    with Image.open(file) as image:
        return as_array(image)


def as_array(image):
    return np.asarray(image.convert("RGB"))
