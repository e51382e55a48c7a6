"""Layers made by hand, and random factors and gradients for them: no model, no capture."""

import jax
import jax.numpy as jnp
import numpy as np

import adafisher_jax as af
from adafisher_jax.diagnostics.stored import of_layers


def make_layer(path, kind, weight, axes, bias=None, groups=1):
    """A layer of one weight, and with a bias if its axes are given."""
    axes = tuple(axes.split())
    sizes = dict(zip(axes, weight, strict=True))
    leaves = [af.Leaf(f"{path}/weight", weight, axes)]
    if bias is not None:
        bias = tuple(bias.split())
        leaves.append(af.Leaf(f"{path}/bias", tuple(sizes[a] for a in bias), bias))
    return af.Layer(path, kind, *[*leaves, None][:2], groups)


LAYERS = {
    layer.path: layer
    for layer in [
        make_layer("dense", "dense", (3, 4), "in0 out0", "out0"),
        make_layer("no_bias", "dense", (3, 4), "in0 out0"),
        make_layer("general", "dense", (2, 3, 4), "out0 in0 out1", "out0 out1"),
        make_layer("conv", "conv", (3, 2, 2, 4), "in0 in1 in2 out0", "out0"),
        make_layer("groups", "conv", (3, 2, 6), "in0 in1 out0", "out0", groups=3),
        make_layer("batch", "dense", (2, 3, 4), "batch0 in0 out0", "batch0 out0"),
        make_layer("elements", "dense", (4,), "batch0"),
        make_layer("stacks", "dense", (2, 3, 3, 4), "stack0 in0 stack1 out0", "stack0 stack1 out0"),
        make_layer("vector", "dense", (3,), "in0", ""),
        make_layer("norm", "norm", (5,), "out0", "out0"),
        make_layer("no_shift", "norm", (5,), "out0"),
        make_layer("stacked_norm", "norm", (2, 5), "stack0 out0", "stack0 out0"),
    ]
}


def layout_of(*layers, **others):
    """A layout of some layers, and of other parameters' shapes by path."""
    rows = tuple(af.Uncovered(af.Leaf(path, shape), "by hand") for path, shape in others.items())
    return af.Layout(tuple(sorted(layers, key=lambda layer: layer.path)), rows)


def unflatten(by_path):
    """Nested dicts of a dict from path to array."""
    tree = {}
    for path, value in by_path.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return tree


def random_tree(rng, *layers):
    """Parameters or gradients of some layers, in the session's float type."""
    leaves = [leaf for layer in layers for leaf in layer.leaves]
    return unflatten({leaf.path: jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves})


def random_factor(rng, layer):
    """A factor that could be: `h` is at least the square of `mean`."""
    zeros = layer.zeros()
    mean = rng.normal(size=zeros.mean.shape)
    h = mean**2 + rng.exponential(size=mean.shape)
    s = rng.exponential(size=zeros.s.shape) * 1e-3
    rows = np.ceil(10 * np.resize(h, zeros.rows.shape))
    return af.Factor(*(jnp.asarray(v) for v in (h, s, rows, mean)))


def curvatures(state, layout):
    """Each layer's `Curvature` in a state."""
    return {
        layer.path: jax.tree.map(lambda part: part[0], stored.curvature)
        for layer, stored in of_layers(state, layout)
    }


def random_factors(rng, *layers):
    return {layer.path: random_factor(rng, layer) for layer in layers}
