"""What a loss may do with its parameters: a case for each way, and the factors by definition."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.flatten_util import ravel_pytree

import adafisher_jax as af


class MLP(nn.Module):
    dropout: float = 0.0
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="one")(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(2, name="two")(x)


MODEL = MLP()
RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(6, 3)), RNG.normal(size=(5, 3))  # two batches
P, Q, R = (
    {
        name: {"kernel": RNG.normal(size=shape), "bias": RNG.normal(size=shape[1])}
        for name, shape in (("one", (3, 4)), ("two", (4, 2)))
    }
    for _ in range(3)
)
ONE, TWO = "one", "two"


def apply(params, x, **options):
    return MODEL.apply({"params": params}, x, **options)


def size(y):
    return jnp.mean(jnp.square(y - 1.0))


def dense_factors(loss_fn, names, *args, **kwargs):
    """Factors by definition: add a zero to what each call of a Dense puts out, differentiate.

    `names` says, call by call, which parameters were used; None for those of no interest.
    """

    def run(zeros):
        remaining, inputs, outputs = iter(zeros), [], []

        def perturb(call, call_args, call_kwargs, context):
            y = call(*call_args, **call_kwargs)
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                inputs.append(call_args[0])
                outputs.append(y)
                y = y + next(remaining, jnp.zeros_like(y))
            return y

        with nn.intercept_methods(perturb):
            loss = loss_fn(*args, **kwargs)
        return (loss[0] if isinstance(loss, tuple) else loss), (inputs, outputs)

    inputs, outputs = run([])[1]
    cotangents = jax.grad(lambda zeros: run(zeros)[0])([jnp.zeros_like(y) for y in outputs])
    assert len(names) == len(inputs)
    found = {}
    for name in set(names) - {None}:
        of = [i for i, other in enumerate(names) if other == name]
        x, s = (
            np.concatenate([np.float64(values[i]).reshape(-1, values[i].shape[-1]) for i in of])
            for values in (inputs, cotangents)
        )
        found[name] = af.Factor(
            np.mean(x**2, 0)[:, None], np.mean(s**2, 0)[None], len(x), np.mean(x, 0)[:, None]
        )
    return found


class Case(NamedTuple):
    """A loss, its arguments, and the layer that each of its Dense calls belongs to."""

    loss: Any
    calls: list
    params: Any = P
    args: tuple = (X,)
    kwargs: dict = {}  # noqa: RUF012
    has_aux: bool = False
    precision: float = 1e-12


def under(prefix, *more):
    return [f"{prefix}/{name}" for name in (ONE, TWO)] + list(more)


@flax.struct.dataclass
class Models:
    student: Any
    teacher: Any


class Pair(NamedTuple):
    left: Any
    right: Any


@flax.struct.dataclass
class Renamed:
    w: Any
    b: Any


def half(tree):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)


def both(params, x):
    left, right = jax.tree.leaves(params, is_leaf=lambda t: isinstance(t, dict) and ONE in t)
    return size(apply(left, x)) + size(3 * apply(right, 2 * x))


STATS = {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
NORMED = P | {"norm": {"scale": RNG.normal(size=4), "bias": RNG.normal(size=4)}}


def normed(params, x, stats):
    model = MLP(batch_norm=True)
    y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
    return size(y), (new["batch_stats"], {"accuracy": jnp.argmax(y, -1), "name": 1})


def with_dropout(params, x, key):
    y = MLP(dropout=0.5).apply({"params": params}, x, rngs={"dropout": key})
    return size(y)


def gan(params, x):
    """Two models of one structure, cast as a whole: only where they come from tells them apart."""
    params = half(params)
    fake = jnp.concatenate([apply(params["gen"], x), x[:, :1]], 1)
    return size(apply(params["disc"], fake)).astype(jnp.float64)


def teacher(params, old):
    return jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, old, params)


def byol(freeze_before, freeze_after):
    """The teacher is a mean of its old self and the student, and runs in the loss."""

    def loss(params, x, old=Q):
        target = freeze_after(apply(teacher(freeze_before(params), old), x))
        return jnp.mean(jnp.square(apply(params, x) - target))

    return loss


def leave(tree):
    return tree


freeze = jax.lax.stop_gradient


def microbatches(params, x):
    losses = jax.lax.map(lambda x: size(apply(params, x)), x.reshape(3, 2, 3))
    return jnp.mean(losses)


jitted = jax.jit(MODEL.apply)
with jax.enable_x64(True):
    jitted({"params": P}, X)  # compiled before any capture

CASES = {
    # Its first argument.
    "params": Case(lambda p, x: size(apply(p, x)), [ONE, TWO]),
    "variables": Case(lambda v, x: size(MODEL.apply(v, x)), under("params"), {"params": P}),
    "FrozenDict": Case(lambda p, x: size(apply(p, x)), [ONE, TWO], FrozenDict(P)),
    "a dict of two": Case(both, under("a") + under("b"), {"a": P, "b": Q}),
    "a list of two": Case(both, under("0") + under("1"), [P, Q]),
    "a NamedTuple of two": Case(both, under("left") + under("right"), Pair(P, Q)),
    "a dataclass of two": Case(both, under("student") + under("teacher"), Models(P, Q)),
    "deeper": Case(
        lambda p, x: size(apply(p["deep"][0].w, x)), under("deep/0/w"), {"deep": [Renamed(P, Z)]}
    ),
    "renamed": Case(
        lambda p, x: size(nn.Dense(4).apply({"params": {"kernel": p.w, "bias": p.b}}, x)),
        [""],
        Renamed(P[ONE]["kernel"], P[ONE]["bias"]),
    ),
    "running statistics in it": Case(
        lambda v, x: size(MLP(batch_norm=True).apply(v, x, train=False)),
        under("params"),
        {"params": NORMED, "batch_stats": STATS},
    ),
    # Its other arguments and what it returns.
    "aux": Case(lambda p, x: (size(y := apply(p, x)), {"y": y, "n": 3}), [ONE, TWO], has_aux=True),
    "keywords": Case(
        lambda p, x, *, train, scale, name=None: scale * size(apply(p, x, train=train)),
        [ONE, TWO],
        kwargs={"train": True, "scale": 2.0, "name": "a string"},
    ),
    "nothing": Case(lambda p, x, none: size(apply(p, x)), [ONE, TWO], args=(X, None)),
    "batch statistics": Case(normed, [ONE, TWO], NORMED, (X, STATS), has_aux=True),
    "dropout": Case(with_dropout, [ONE, TWO], args=(X, jax.random.key(1))),
    # Several calls of models, or terms without one.
    "siamese": Case(
        lambda p, x, z: jnp.sum(apply(p, x)[:5] * apply(p, z)), [ONE, TWO] * 2, args=(X, Z)
    ),
    "one after the other": Case(
        lambda p, x: size(apply(p["b"], apply(p["a"], x) @ jnp.ones((2, 3)))),
        under("a") + under("b"),
        {"a": P, "b": Q},
    ),
    "models of equal structure, cast": Case(
        gan, under("gen") + under("disc"), {"gen": P, "disc": Q}, precision=2e-2
    ),
    "an L2 term": Case(
        lambda p, x: size(apply(p, x)) + sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(p)),
        [ONE, TWO],
    ),
    "parameters of no model": Case(
        lambda p, x: size(p["scale"] * apply(p["net"], x)), under("net"), {"net": P, "scale": 2.0}
    ),
    # The parameters as a whole.
    "distance to a reference": Case(
        lambda p, x, q: (
            size(apply(p, x))
            + jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), p, q))
        ),
        [ONE, TWO],
        args=(X, Q),
    ),
    "a mask": Case(
        lambda p, x, mask: size(apply(jax.tree.map(lambda a, m: a * (m > 0), p, mask), x)),
        [ONE, TWO],
        args=(X, Q),
    ),
    "noise": Case(
        lambda p, x, q: size(apply(jax.tree.map(lambda a, b: a + 0.1 * b, p, q), x)),
        [ONE, TWO],
        args=(X, Q),
    ),
    "a float mask": Case(
        lambda p, x, mask: size(apply(jax.tree.map(jnp.multiply, p, mask), x)),
        [ONE, TWO],
        args=(X, jax.tree.map(lambda a: np.float64(a > 0), Q)),
    ),
    "a frozen teacher": Case(byol(freeze, freeze), [None, None, ONE, TWO], args=(X, Q)),
    "a teacher's frozen parameters": Case(byol(freeze, leave), [None, None, ONE, TWO], args=(X, Q)),
    "a teacher's frozen output": Case(byol(leave, freeze), [None, None, ONE, TWO], args=(X, Q)),
    "a closed-over teacher": Case(byol(freeze, leave), [None, None, ONE, TWO]),
    "a closed-over teacher's output": Case(byol(leave, freeze), [None, None, ONE, TWO]),
    "a teacher of its own": Case(
        lambda p, x, q: size(apply(p, x) - apply(q, x)), [ONE, TWO, None, None], args=(X, Q)
    ),
    "cast": Case(
        lambda p, x: size(apply(half(p), x)).astype(jnp.float64), [ONE, TWO], precision=1e-2
    ),
    "its own target, by frozen parameters": Case(
        lambda p, x: size(apply(p, x) - apply(freeze(p), x)), [ONE, TWO, None, None]
    ),
    "its own target": Case(
        lambda p, x: size(apply(p, x) - freeze(apply(p, x))),
        [ONE, TWO, None, None],
    ),
    "summed by tree.map": Case(
        lambda p, x: size(apply(jax.tree.map(lambda a: a, p), x)) + ravel_pytree(p)[0].sum(),
        [ONE, TWO],
    ),
    # Transformed.
    "microbatches": Case(microbatches, [ONE, TWO]),
    "checkpoint": Case(jax.checkpoint(lambda p, x: size(apply(p, x))), [ONE, TWO]),
    "jit": Case(lambda p, x: size(jitted({"params": p}, x)), [ONE, TWO]),
    "jitted loss": Case(jax.jit(lambda p, x: size(apply(p, x))), [ONE, TWO]),
}
UNJITTED = {
    "jit": CASES["params"].loss,
    "jitted loss": CASES["params"].loss,
    "checkpoint": CASES["params"].loss,
    "microbatches": lambda p, x: sum(size(apply(p, part)) for part in x.reshape(3, 2, 3)) / 3,
}
UNJITTED_CALLS = {"microbatches": [ONE, TWO] * 3}


def identical(a, b):
    """The same trees, to the last bits: a traced loss may fuse what an eager one does not."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        eps = np.finfo(a.dtype).eps if np.issubdtype(a.dtype, np.floating) else 0
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=8 * eps)

    jax.tree.map(compare, a, b)


def assert_factors(factors, expected, rtol):
    assert factors.keys() >= expected.keys()
    for path, wanted in expected.items():
        for name, got, want in zip(af.Factor._fields, factors[path], wanted, strict=True):
            atol = rtol * np.max(np.abs(want))
            np.testing.assert_allclose(got, want, rtol, atol, err_msg=f"{path}.{name}")
