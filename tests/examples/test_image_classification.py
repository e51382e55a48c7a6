"""The image classification example: its models, its data and a run of it."""

import dataclasses
import functools
import io
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from PIL import Image

import adafisher_jax as af

pytest.importorskip("grain")

from examples.image_classification import augmentation, formats, models, task
from examples.image_classification.__main__ import ImageSettings, main
from examples.image_classification.formats import Arrays, Dataset
from examples.image_classification.loader import Loader
from examples.image_classification.models import by_name, mobilenet, resnet, swin
from examples.image_classification.models.cct import CCT
from examples.image_classification.models.mobilenet import MobileNetV3
from examples.image_classification.models.resnet import ResNet
from examples.image_classification.models.swin import Swin


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)


@pytest.fixture
def data(images):
    labels = np.arange(40) % 4
    return Dataset(
        Arrays(images[:30], labels[:30]), Arrays(images[30:], labels[30:]), tuple("abcd")
    )


@pytest.fixture
def loader(data):
    return Loader(data, side=16, batch=8, seed=3, cutout=6)


# ---- models


@pytest.mark.parametrize(
    ("name", "classes", "size", "published"),
    [
        ("resnet18", 10, 32, 11_173_962),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet50", 10, 32, 23_520_842),
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet101", 1000, 224, 44_549_160),
        ("mobilenetv3-small", 1000, 224, 2_542_856),
        ("mobilenetv3-large", 1000, 224, 5_483_032),
        ("swin-tiny", 1000, 224, 28_288_354),
        ("cct-2-3x2", 10, 32, 283_723),
    ],
)
def test_models_have_as_many_parameters_as_published(name, classes, size, published):
    model = by_name(name, classes, size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key, x: model.init(key, x, False), jax.random.key(0), images)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == published


def test_a_name_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match="'resnet19' is none of resnet18, "):
        by_name("resnet19", 10, 32)


@pytest.mark.parametrize(
    "name",
    [
        "cct-2-3x2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet18", "resnet50", "mobilenetv3-small", "swin-tiny")
        ),
    ],
)
def test_a_fisher_block_covers_every_parameter(name, data):
    side = 32
    pixels = Arrays(np.arange(4 * side**2 * 3).astype(np.uint8).reshape(4, side, side, 3), range(4))
    loader = Loader(data._replace(train=pixels), side, 4, 0, 0)
    layout = task.make(name, by_name(name, 10, side), loader).layout
    assert layout.uncovered == ()


TINY = {
    "resnet": ResNet((1, 1), resnet.BasicBlock, 4, small_images=True, width=4),
    "resnet, bottlenecks": ResNet((1, 1), resnet.Bottleneck, 4, small_images=False, width=4),
    "mobilenet": MobileNetV3(mobilenet.SMALL[2:4], 8, 4, small_images=False),
    "swin": Swin(4, patch=2, window=4, width=8, depths=(2, 1), heads=(1, 2)),
    "cct": CCT(4, convolutions=(4, 8), layers=1),
}


def random_variables(of_task):
    """Parameters and model state, without compiling a model's own initialization."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(of_task.init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "cct" else pytest.mark.slow) for x in TINY],
)
def test_a_step_of_each_architecture(name, loader):
    """What comes out is finite, each layer took part, and running statistics move."""
    of_task = task.make(name, TINY[name], loader, l2=1e-3)
    params, model_state = random_variables(of_task)
    grad_fn = jax.jit(af.value_and_grad(of_task.loss, of_task.layout, has_aux=True))
    key = jax.random.key(1, impl="unsafe_rbg")  # compiles sooner than the default
    arguments = params, model_state, next(of_task.train_batches(0)), key
    found = grad_fn(*arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    (loss, (after, metrics)), grads, factors = found
    assert loss > metrics["cross_entropy"] > 0
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    assert set(factors) == {layer.path for layer in of_task.layout.layers}
    assert all((factor.rows > 0).all() for factor in factors.values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model_state, after)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", TINY)
def test_arithmetic_in_bfloat16_keeps_parameters_in_float32(name, loader):
    model = TINY[name].clone(dtype=jnp.bfloat16)
    of_task = task.make(name, model, loader)
    variables, key = jax.eval_shape(of_task.init, jax.random.key(0)), jax.random.key(1)
    batch = next(of_task.train_batches(0))
    grad_fn = af.value_and_grad(of_task.loss, of_task.layout, has_aux=True)
    found = jax.eval_shape(grad_fn, *variables, batch, key)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, found))} == {jnp.dtype("float32")}
    apply = lambda params, state: model.apply({"params": params} | state, batch["image"], False)  # noqa: E731
    assert jax.eval_shape(apply, *variables).dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_penalty_is_weight_decay_within_the_gradient(loader):
    found = {}
    for l2 in (0.0, 0.3):
        of_task = task.make("resnet", TINY["resnet"].clone(stages=(1,)), loader, l2)
        params, model_state = random_variables(of_task)
        grad_fn = jax.jit(af.value_and_grad(of_task.loss, of_task.layout, has_aux=True))
        batch, key = next(of_task.train_batches(0)), jax.random.key(1)
        arguments = params, model_state, batch, key
        _, *found[l2] = grad_fn(*arguments)
    (plain, factors), (decayed, same_factors) = found.values()
    wanted = jax.tree.map(lambda g, p: g + 0.3 * p, plain, params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, (decayed, same_factors), (wanted, factors))


def test_evaluation_sums_over_examples_with_the_running_statistics(loader):
    model = TINY["resnet"].clone(stages=(1,))
    of_task = task.make("resnet", model, loader)
    params, model_state = random_variables(of_task)
    batches = list(of_task.eval_batches())
    assert [len(batch["label"]) for batch in batches] == [8, 2]
    sums = [jax.jit(of_task.evaluate)(params, model_state, batch) for batch in batches]
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    images, labels = (np.concatenate([b[name] for b in batches]) for name in ("image", "label"))
    logits = jax.jit(model.apply, static_argnums=2)({"params": params} | model_state, images, False)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    assert total["count"] == 10
    assert total["accuracy"] == (logits.argmax(-1) == labels).sum()
    np.testing.assert_allclose(total["loss"], error, rtol=1e-5)


def test_windows_are_put_back_where_they_were(images):
    windows = swin.to_windows(images, 4)
    assert windows.shape == (40, 16, 16, 3)
    np.testing.assert_array_equal(windows[0, 5].reshape(4, 4, 3), images[0, 4:8, 4:8])
    np.testing.assert_array_equal(swin.from_windows(windows, 16), images)


def test_relative_positions_name_offsets():
    offsets = {}
    number = swin.relative_positions(3)
    for a, b in np.ndindex(9, 9):
        down, right = np.subtract(divmod(a, 3), divmod(b, 3)).tolist()
        offsets.setdefault(number[a, b], set()).add((down, right))
    assert sorted(offsets) == list(range(25))
    assert all(len(same) == 1 for same in offsets.values())


def test_shifted_attention_joins_only_neighbours():
    """Pixels that a shift wrapped around the image's edge do not see each other."""
    side, window, shift = 8, 4, 2
    original = np.roll(np.arange(side), -shift)  # where a row of the shifted image came from
    rows, columns = (
        swin.to_windows(np.broadcast_to(x, (side, side))[None, :, :, None], window)[0, :, :, 0]
        for x in (original[:, None], original[None])
    )
    apart = [abs(x[:, :, None] - x[:, None]) >= window for x in (rows, columns)]
    bias = swin.shift_bias(side, window, shift)[:, 0]
    np.testing.assert_array_equal(bias != 0, apart[0] | apart[1])


def test_an_image_that_windows_do_not_fill_is_refused():
    model = Swin(4, patch=2, window=4, width=8, depths=(1,), heads=(1,))
    with pytest.raises(ValueError, match="stage 0 has side 6, no multiple of window 4"):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), jnp.zeros((1, 12, 12, 3)))


# ---- weights to start from


@pytest.fixture
def variables(loader):
    params, model_state = random_variables(task.make("resnet", TINY["resnet"], loader))
    return {"params": params} | model_state


def write(path, variables):
    flat = traverse_util.flatten_dict(variables, sep="/")
    flat = {name: np.asarray(leaf) for name, leaf in flat.items()}
    if path.suffix == ".npz":
        np.savez(path, **flat)
    else:
        pytest.importorskip("safetensors.numpy").save_file(flat, path)
    return path


@pytest.mark.parametrize("suffix", [pytest.param("npz", marks=pytest.mark.slow), "safetensors"])
def test_training_starts_from_the_weights_of_a_file(suffix, variables, loader, tmp_path):
    path = write(tmp_path / f"weights.{suffix}", variables)
    of_task = task.make("resnet", TINY["resnet"], loader, weights=path)
    params, model_state = of_task.init(jax.random.key(0, impl="unsafe_rbg"))
    jax.tree.map(np.testing.assert_array_equal, {"params": params} | model_state, variables)


def test_a_head_for_other_classes_starts_anew(variables, loader, tmp_path, capsys):
    path = write(tmp_path / "weights.npz", variables)
    model = TINY["resnet"].clone(classes=7)
    of_task = task.make("resnet", model, loader, weights=path)
    params, _ = of_task.init(jax.random.key(0, impl="unsafe_rbg"))
    assert params["head"]["kernel"].shape == (8, 7)
    np.testing.assert_array_equal(
        params["stem"]["Conv_0"]["kernel"], variables["params"]["stem"]["Conv_0"]["kernel"]
    )
    assert "params/head/bias: got (4,), wanted (7,)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TINY["resnet"].clone(width=8), r"stem/BatchNorm_0/mean: got \(4,\), wanted \(8,\)"),
        (TINY["resnet"].clone(stages=(1,)), r"stage1_\S+mean: got \(8,\), wanted None"),
        (TINY["resnet"].clone(stages=(2, 1)), r"stage0_block1\S+mean: got None, wanted \(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused(model, message, variables, loader, tmp_path):
    path = write(tmp_path / "weights.npz", variables)
    with pytest.raises(ValueError, match=message):
        task.make("resnet", model, loader, weights=path)


# ---- augmentation


def test_a_crop_is_a_window_of_the_padded_image(images):
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    crops = augmentation.random_crop(images, np.random.default_rng(0), 2)
    for image, crop in zip(padded, crops, strict=True):
        windows = [image[i : i + 16, j : j + 16] for i, j in np.ndindex(5, 5)]
        assert sum((crop == window).all() for window in windows) == 1


def test_about_half_of_the_images_are_mirrored(images):
    flipped = augmentation.random_flip(images, np.random.default_rng(0))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) ^ mirrored).all()
    assert 10 < mirrored.sum() < 30


def test_cutout_zeroes_one_square_at_most():
    images = np.ones((200, 16, 16, 3), np.float32)
    zeros = augmentation.cutout(images, np.random.default_rng(0), 6) == 0
    assert (zeros.all(-1) == zeros.any(-1)).all()  # in all channels
    areas = zeros[..., 0].sum((1, 2))
    heights, widths = zeros[..., 0].any(2).sum(1), zeros[..., 0].any(1).sum(1)
    np.testing.assert_array_equal(areas, heights * widths)
    assert areas.max() == 36
    assert areas.min() >= 9
    assert not (augmentation.cutout(images, np.random.default_rng(0), 0) == 0).any()


def test_crops_of_files_are_squares(images):
    wide = np.repeat(images[0], 3, axis=1)  # 16 x 48
    rng = np.random.default_rng(0)
    crops = [augmentation.random_resized_crop(wide, rng, 8) for _ in range(5)]
    assert {(crop.shape, crop.dtype.name) for crop in crops} == {((8, 8, 3), "uint8")}
    assert augmentation.random_resized_crop(wide[:1], rng, 8).shape == (8, 8, 3)
    assert augmentation.centre_crop(wide, 8).shape == (8, 8, 3)
    np.testing.assert_array_equal(augmentation.centre_crop(images[0], 16), images[0])


# ---- batches


def test_batches_depend_on_the_seed_and_the_step_alone(loader):
    batches = loader.train_batches()
    seen = [next(batches) for _ in range(8)]  # of three epochs: there are 3 batches in each
    resumed = loader.train_batches(start=4)
    for want in seen[4:]:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), want)
    other = next(dataclasses.replace(loader, seed=4).train_batches())
    assert (other["image"] != seen[0]["image"]).any()
    assert (seen[3]["image"] != seen[0]["image"]).any()


def test_an_epoch_has_each_image_once(loader, images):
    whole = loader.data._replace(train=Arrays(images[:24], np.arange(24)))
    loader = dataclasses.replace(loader, data=whole)
    batches = loader.train_batches()
    for _ in range(2):
        labels = np.concatenate([next(batches)["label"] for _ in range(loader.steps_per_epoch)])
        assert sorted(labels) == list(range(24))


def test_batches_are_normalized_float32(loader):
    batch = next(loader.train_batches())
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 16, 16, 3), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)
    train = loader.data.train
    as_test = dataclasses.replace(loader, data=loader.data._replace(test=train), batch=30)
    [batch] = as_test.eval_batches()
    np.testing.assert_allclose(batch["image"].mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(batch["image"].std((0, 1, 2)), 1, atol=1e-5)


def test_test_images_are_left_as_they_are(loader, images):
    found = np.concatenate([batch["image"] for batch in loader.eval_batches()])
    train = images[:30].reshape(-1, 3)
    np.testing.assert_allclose(found, (images[30:] - train.mean(0)) / train.std(0), atol=1e-5)


def test_a_batch_larger_than_the_training_set_is_refused(loader):
    with pytest.raises(ValueError, match="batch 31 exceeds the 30 images"):
        _ = dataclasses.replace(loader, batch=31).steps_per_epoch


# ---- formats


def test_digits():
    data = formats.read("digits")
    assert (len(data.train), len(data.test), len(data.classes)) == (1297, 500, 10)
    assert data.train[0]["image"].shape == (8, 8, 1)
    assert not data.mirrored
    # As bright as uint8 goes.
    assert data.train.images.max() == 255


def pickled(path, **content):
    path.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}))


def planes(pixels):
    """Rows as CIFAR has them: all red, all green, all blue."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar_10(inside, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        rows = planes(pixels[part])
        pickled(folder / f"data_batch_{number + 1}", data=rows, labels=[number, number + 1])
    pickled(folder / "test_batch", data=planes(pixels[10:]), labels=[7, 8])
    pickled(folder / "batches.meta", label_names=[b"airplane", b"automobile"])
    data = formats.read(str(tmp_path))
    np.testing.assert_array_equal(data.train.images, pixels[:10])
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    np.testing.assert_array_equal(data.test[1]["image"], pixels[11])
    assert data.test[1]["label"] == 8
    assert data.classes == ("airplane", "automobile")


def test_cifar_100_has_its_fine_labels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for name in ("train", "test"):
        rows = planes(pixels)
        pickled(tmp_path / name, data=rows, fine_labels=[5, 99, 7], coarse_labels=[0, 1, 2])
    pickled(tmp_path / "meta", fine_label_names=[b"apple"], coarse_label_names=[b"fish"])
    data = formats.read(str(tmp_path))
    np.testing.assert_array_equal(data.train.images, pixels)
    assert data.test.labels.tolist() == [5, 99, 7]
    assert data.classes == ("apple",)


def encoded(color, kind="JPEG", size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def assert_color(image, color):
    np.testing.assert_allclose(image.reshape(-1, 3).mean(0), color, atol=3)


def test_jpegs_end_to_end_in_an_npz(tmp_path):
    arrays = {"classes": np.array(["red", "green"])}
    for split, colors in (("train", [RED, GREEN, RED]), ("test", [GREEN])):
        files = [encoded(color) for color in colors]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.array([color == GREEN for color in colors], np.int64)
    np.savez(tmp_path / "data.npz", **arrays)
    data = formats.read(str(tmp_path / "data.npz"))
    assert data.train.images.shape == (3, 32, 32, 3)
    for index, color in enumerate([RED, GREEN, RED]):
        assert_color(data.train.images[index], color)
    assert data.train.labels.tolist() == [0, 1, 0]
    assert data.classes == ("red", "green")


def save(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(*args, **kwargs))


def test_folders_of_classes(tmp_path):
    save(tmp_path / "train/red/a.JPEG", RED, size=(40, 30))
    save(tmp_path / "train/red/b.png", RED, "PNG", size=(30, 50))
    save(tmp_path / "train/blue/c.jpg", BLUE)
    save(tmp_path / "val/red/d.jpeg", RED, size=(80, 40))
    (tmp_path / "train/red/notes.txt").write_text("not an image")
    data = formats.read(str(tmp_path))
    assert data.classes == ("blue", "red")
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.train[1]["image"].shape == (30, 40, 3)
    assert data.test.labels.tolist() == [1]
    loader = Loader(data, side=16, batch=3, seed=0, cutout=0)
    batch = next(loader.train_batches())
    assert batch["image"].shape == (3, 16, 16, 3)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert image.mean((0, 1)).argmax() == (0 if label == 1 else 2)
    [batch] = loader.eval_batches()
    assert batch["image"].shape == (1, 16, 16, 3)


def test_tiny_imagenet(tmp_path):
    save(tmp_path / "train/n01/images/n01_0.JPEG", RED, size=(64, 64))
    save(tmp_path / "train/n02/images/n02_0.JPEG", BLUE, size=(64, 64))
    save(tmp_path / "val/images/val_0.JPEG", BLUE, size=(64, 64))
    save(tmp_path / "val/images/val_1.JPEG", RED, size=(64, 64))
    lines = ["val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t52\t55\t57\t59"]
    (tmp_path / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = formats.read(str(tmp_path))
    assert data.classes == ("n01", "n02")
    assert data.test.labels.tolist() == [1, 0]
    assert_color(data.test[0]["image"], BLUE)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "train/red").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images in .*train/<class>/"):
        formats.read(str(tmp_path))
    (tmp_path / "train/red").rmdir()
    (tmp_path / "train").rmdir()
    with pytest.raises(ValueError, match="has no folder train/"):
        formats.read(str(tmp_path))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """As the hub has CIFAR-100: images as PNG, and labels of two degrees of fineness."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=["warm", "cold"]),
            "fine_label": datasets.ClassLabel(names=["red", "green", "blue"]),
        }
    )
    colors = {"train": [RED, BLUE, GREEN], "test": [GREEN]}
    for split, rows in colors.items():
        fine = [[RED, GREEN, BLUE].index(color) for color in rows]
        columns = {
            "img": [{"bytes": encoded(color, "PNG"), "path": None} for color in rows],
            "coarse_label": [int(label > 0) for label in fine],
            "fine_label": fine,
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / f"data/{split}.parquet")
    data = formats.hub(str(tmp_path / "data"))
    assert data.in_memory
    assert data.classes == ("red", "green", "blue")
    assert data.train.labels.tolist() == [0, 2, 1]
    for one, color in zip(data.train.images, colors["train"], strict=True):
        assert_color(one, color)
    monkeypatch.setattr(formats, "SMALL", 31)
    larger = formats.hub(str(tmp_path / "data"))
    assert not larger.in_memory
    assert_color(larger.test[0]["image"], GREEN)


# ---- runs


def test_weight_decay_is_by_default_as_in_the_paper():
    defaults = ImageSettings(model="resnet18")
    assert (defaults.l2, defaults.weight_decay) == (5e-4, 0.0)
    defaults = ImageSettings(model="swin-tiny")
    assert (defaults.l2, defaults.weight_decay) == (0.0, 1e-2)
    chosen = ImageSettings.from_flags(["--model", "resnet18", "--l2", "0", "--weight-decay", "0.1"])
    assert (chosen.l2, chosen.weight_decay) == (0.0, 0.1)


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    """On digits, with a network of four channels in place of the ResNet-18."""
    tiny = functools.partial(ResNet, (1,), resnet.BasicBlock, width=4)
    monkeypatch.setitem(models.CONVOLUTIONAL, "resnet18", tiny)
    flags = "--model resnet18 --rate 0.03 --steps 60 --batch 32 --cutout 0 --evaluate-every 60"
    flags += " --log-every 20"
    with jax.default_prng_impl("unsafe_rbg"):  # compiles sooner than the default
        result = main([*flags.split(), "--folder", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (result.status, result.steps) == ("finished", 60)
    assert result.train["cross_entropy"] < 0.95 * lines[0]["train/cross_entropy"]
    assert result.evaluation["accuracy"] > 0.2  # of ten classes
    assert "100.0% of" in capsys.readouterr().out
