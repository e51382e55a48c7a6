"""Each rule against a literal reading of its formula, in NumPy, one block after another.

The reading knows a layer as matrices: its axes are brought into the order (blocks, in, out),
so a block is one weight of `in` rows and `out` columns, with one row more for the bias.
"""

import functools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import adafisher_jax as af
from adafisher_jax import spectrum
from adafisher_jax.factors import to_unit
from adafisher_jax.rules import Scale, make_rule
from tests.support.hand_made import LAYERS, layout_of, make_layer, random_factors, random_tree

RULES = ("paper", "official", "centered")
B1, GAMMA, LAMBDA, TAU, CENTERED_GAMMA, B2 = 0.9, 0.8, 1e-3, 0.01, 0.95, 0.99
# The units of the inputs and of the cotangents in each step that brings factors.
REFRESHED = (None, (1, 1), (5, 1), None, (1, 5))

check = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def blocks(value, axes):
    """An array as (blocks, in, out); stacked blocks vary slowest."""
    order = sorted(axes, key=lambda a: ("stack batch in out".split().index(a.rstrip("0123")), a))
    value = np.asarray(value).transpose([axes.index(a) for a in order])
    of = [
        [n for n, a in zip(value.shape, order, strict=True) if a.startswith(r)]
        for r in (("stack", "batch"), "in", "out")
    ]
    return value.reshape([math.prod(sizes) for sizes in of])


def normalized(v, epsilon=0.0):
    """Eq. (4): `(v - min v) / (max v - min v)` of each row, 0 for a constant one."""
    rows = []
    for row in v:
        spread = max(row) - min(row) + epsilon
        rows.append([(entry - min(row)) / spread if spread > 0 else 0.0 for entry in row])
    return np.array(rows)


def stored(basis):
    # XLA rounds doubles to single precision first, and ml_dtypes does so only before 0.7.
    return basis.astype(np.float32).astype(jnp.bfloat16).astype(float)


class Reading:
    """One layer and rule: `step(grad, factor)` is the preconditioned momentum of each block."""

    def __init__(self, rule, layer):
        self.layer, self.rule = layer, getattr(self, rule)
        self.steps = self.refreshes = 0
        self.basis, self.square = {}, {}
        self.m_w = self.m_b = self.h = self.s = self.mean = self.rows = 0.0

    def step(self, g_w, g_b, factor):
        self.steps += 1
        self.m_w = B1 * self.m_w + (1 - B1) * g_w
        self.m_b = B1 * self.m_b + (1 - B1) * g_b
        corrected = 1 - B1**self.steps
        return self.rule(self.m_w / corrected, self.m_b / corrected, g_w, g_b, factor)

    def raw(self, factor, unit=1.0):
        """`h̄` (with the bias slot), `s` and the mean as one vector for each block."""
        if self.layer.kind == "norm":
            h = np.asarray(factor.h).reshape(-1, 2)
            return h, blocks(factor.s, self.layer.axes)[:, 0], None
        h, s, mean = (blocks(v, self.layer.axes) for v in (factor.h, factor.s, factor.mean))
        h = h[:, :, 0] * unit
        if self.layer.bias:
            h = np.concatenate([h, np.full((len(h), 1), unit)], 1)
        return h, s[:, 0], mean[:, :, 0]

    def divide(self, m_w, m_b, f):
        n = m_w.shape[1]
        return m_w / f[:, :n], m_b / f[:, -1]

    def paper(self, m_w, m_b, g_w, g_b, factor):
        """Eqs. (3) and (4), Algorithm 1; the identity before the first refresh."""
        if factor:
            h, s, _ = self.raw(factor)
            self.h, self.s = (GAMMA * a + (1 - GAMMA) * b for a, b in ((self.h, h), (self.s, s)))
            self.refreshes += 1
        if not self.refreshes:
            return m_w, m_b
        f = normalized(self.h)[:, :, None] * normalized(self.s)[:, None, :] + LAMBDA
        return self.divide(m_w, m_b, f)

    def official(self, m_w, m_b, g_w, g_b, factor):
        """The released code's arithmetic, as docs/algorithm.md has it."""
        if factor:
            if not self.refreshes:
                self.h = self.s = 1.0
            k = m_w.shape[1]
            h, s, _ = self.raw(factor, self.layer.groups / k if self.layer.kind == "conv" else 1.0)
            self.h = 0.1 * GAMMA * self.h + 0.01 * GAMMA * normalized(h, 1e-6)
            self.s = 0.1 * GAMMA * self.s + 0.01 * GAMMA * normalized(s, 1e-6)
            self.refreshes += 1
        if not self.refreshes:
            return m_w, m_b
        return self.divide(m_w, m_b, self.h[:, :, None] * self.s[:, None, :] + LAMBDA)

    def centered(self, m_w, m_b, g_w, g_b, factor):
        """The formula of `Centered`; before the first refresh a scalar scale alone."""
        ahead = 1 - B1 ** (self.steps + 1)
        m_w = (B1 * self.m_w + (1 - B1) * g_w) / ahead
        m_b = (B1 * self.m_b + (1 - B1) * g_b) / ahead
        n, outs = m_w.shape[1:]
        if factor:
            h, s, mean = self.raw(factor)
            if self.refreshes:
                share, share_s = self.counted(h[:, :n], self.h[:, :n]), self.counted(s, self.s)
                h, s = np.concatenate([share * h[:, :n], h[:, n:]], 1), share_s * s
                mean = None if mean is None else np.sqrt(share) * mean
            self.refreshes += 1
            rows = np.ravel(factor.rows).repeat(len(m_w) // np.size(factor.rows))
            averaged = ("h", "s", "mean", "rows")
            for name, new in zip(averaged, (h, s, mean, rows), strict=True):
                if new is not None:
                    old = getattr(self, name)
                    setattr(self, name, CENTERED_GAMMA * old + (1 - CENTERED_GAMMA) * new)
        weight = 1 - CENTERED_GAMMA**self.refreshes
        root_h, root_s = np.ones((len(m_w), n)), np.ones((len(m_w), outs))
        mu = np.zeros((len(m_w), n))
        if self.refreshes:
            s = self.s / weight
            root_s = np.sqrt(s / s.mean(1, keepdims=True) + TAU)
            if self.layer.kind != "norm":
                h = self.h[:, :n] / weight
                if self.layer.bias:
                    mu = self.mean / weight
                    h = h - mu**2
                root_h = np.sqrt(h / h.mean(1, keepdims=True) + TAU)
        d_w = (m_w - mu[:, :, None] * m_b[:, None]) / (root_h[:, :, None] * root_s[:, None, :])
        if self.refreshes and self.layer.kind != "norm":
            d_w = np.stack([self.flattened(block, d) for block, d in enumerate(d_w)])
        norm = self.layer.kind == "norm"
        small = min(n, outs) < 128 or self.layer.kind == "embedding"
        size = 0.2 if small else 0.2 * 128 / min(n, outs)
        if self.refreshes and self.layer.kind != "embedding":
            few = np.sqrt(np.minimum(self.rows / weight / min(np.sqrt(n * outs), 64), 1))
            size = size * np.broadcast_to(few, len(d_w))[:, None, None]
        d_w = self.over_rms("w", d_w, g_w) if norm else size * self.over_rms("w", d_w, d_w)
        if not self.layer.bias:
            return d_w, m_b
        d_b = self.over_rms("b", m_b / root_s, g_b)
        return d_w, d_b - np.einsum("bi,bio->bo", mu, d_w)

    def counted(self, new, sums):
        """The share of a batch's statistics that makes them ten times the averages at most."""
        most = 10 * sums.sum(1) / (1 - CENTERED_GAMMA**self.refreshes)
        return np.minimum(1, most / new.sum(1))[:, None]

    def flattened(self, block, d):
        """A matrix whose leading singular values are cut, by the formula of `spectrum`."""
        if len(d) < len(d.T):
            return self.flattened(block, d.T).T
        n = len(d.T)
        k = min(32, n // 2)
        if not k:
            return d
        cosines = np.cos(np.pi * (np.arange(n)[:, None] + 0.5) * (np.arange(k) + 1) / n)
        before = self.basis.get(block, stored(cosines * np.sqrt(2 / n)))
        u, r = np.linalg.qr(d @ before)
        u = u @ np.diag(np.where(np.diag(r) < 0, -1, 1))
        v = d.T @ u
        values = np.linalg.norm(v, axis=0)
        self.basis[block] = stored(v / values.max() + 1e-4 * before)
        total = np.sum(d**2)
        cap = np.sqrt(max((total - np.sum(values**2)) / (n - k), 1e-2 * total / n))
        return d - u @ np.diag(1 - np.minimum(1, cap / values)) @ v.T

    def over_rms(self, name, d, of):
        """Over a running root mean square, of which each stack has one."""
        stacks = math.prod(self.layer.rows_shape)
        square = (of.reshape(stacks, -1) ** 2).mean(1)
        self.square[name] = B2 * self.square.get(name, 0) + (1 - B2) * square
        root = np.sqrt(self.square[name] / (1 - B2**self.steps))
        return d / np.repeat(root, len(d) // stacks).reshape(-1, *[1] * (d.ndim - 1))


# Most have shorter sides above 128.
WIDE = {
    layer.path: layer
    for layer in [
        make_layer("dense", "dense", (256, 150), "in0 out0", "out0"),
        make_layer("heads", "dense", (200, 4, 40), "in0 out0 out1", "out0 out1"),
        make_layer("of_heads", "dense", (4, 40, 170), "in0 in1 out0", "out0"),
        make_layer("square", "dense", (128, 128), "in0 out0"),
        make_layer("stacks", "dense", (2, 132, 140), "stack0 in0 out0", "stack0 out0"),
        make_layer("batch", "dense", (140, 2, 132), "in0 batch0 out0", "batch0 out0"),
        make_layer("conv", "conv", (3, 3, 16, 150), "in0 in1 in2 out0", "out0"),
        make_layer("embedding", "embedding", (300, 144), "in0 out0"),
        make_layer("attend", "attend", (150, 144), "in0 out0"),
        make_layer("few_inputs", "dense", (127, 300), "in0 out0", "out0"),
        make_layer("few_outputs", "dense", (300, 127), "in0 out0", "out0"),
        make_layer("norm", "norm", (300,), "out0", "out0"),
    ]
}


@functools.cache
def trajectory(rule, wide=False):
    """Gradients, factors and updates of a few steps of all layers at once."""
    rng = np.random.default_rng(sum(map(ord, rule)))
    layers = (WIDE if wide else LAYERS).values()
    with jax.enable_x64(True):
        tx = af.scale_by_adafisher(layout_of(*layers), rule=rule)
        state = jax.jit(tx.init)(random_tree(rng, *layers))
        update = jax.jit(tx.update)
        steps = []
        for units in REFRESHED:
            grads = random_tree(rng, *layers)
            factors = units and {
                path: af.Factor(units[0] ** 2 * h, units[1] ** 2 * s, rows, units[0] * mean)
                for path, (h, s, rows, mean) in random_factors(rng, *layers).items()
            }
            updates, state = update(grads, state, factors=factors)
            steps.append((grads, factors, updates))
    return steps


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_formula(rule, name):
    check_formula(LAYERS[name], rule, trajectory(rule))


@pytest.mark.parametrize("name", WIDE)
def test_centered_is_its_formula_on_wide_layers(name):
    check_formula(WIDE[name], "centered", trajectory("centered", wide=True))


def check_formula(layer, rule, steps):
    name, reading = layer.path, Reading(rule, layer)

    def pair(tree):
        weight = blocks(tree[name]["weight"], layer.axes)
        if not layer.bias:
            return weight, np.zeros((len(weight), weight.shape[2]))
        return weight, blocks(tree[name]["bias"], layer.bias.axes)[:, 0]

    for grads, factors, updates in steps:
        expected = reading.step(*pair(grads), factors and factors[name])
        got = pair(updates)
        for mine, literal in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, literal, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "rows", "size"),
    [
        ("heads", 64, 0.16),
        ("heads", 16, 0.08),
        ("heads", 1000, 0.16),
        ("few_inputs", 64, 0.2),
        ("small", 20, 0.2),
        ("small", 5, 0.1),
        ("embedding", 16, 0.2),
        ("norm", 16, 1),
    ],
)
def test_the_size_that_centered_tells_is_that_of_its_steps(name, rows, size):
    small = make_layer(name, "dense", (40, 10), "in0 out0", "out0")
    layer, rule = WIDE.get(name, small).stacked(1), make_rule("centered")
    one = jnp.ones(layer.stack_shape)
    scale = Scale(2 * one, one / 2)  # a root mean square of 2
    fresh = jax.tree.map(lambda x: x + rows, layer.zeros())
    curvature, _ = rule.refresh(layer, rule.start(layer, jnp.float32), fresh)
    np.testing.assert_allclose(rule.size(layer, curvature, scale).ravel(), [size / 2], rtol=1e-6)


LAYER = make_layer("layer", "dense", (2, 2), "in0 out0", "out0")


@pytest.mark.parametrize(
    ("rule", "damping", "weight", "bias"),
    [
        # minmax(4, 2, slot 1) = (1, 1/3, 0) and minmax(1, 3) = (0, 1)
        ("paper", 1e-3, [[3000, 1 / 1.001], [1000, 1 / (1 / 3 + 1e-3)]], [1000, 1000]),
        # 0.08 + 0.008 (1, 1/3, 0) and 0.08 + 0.008 (0, 1)
        ("official", 1e-3, [[373.1343, 114.3641], [131.3485, 120.8508]], [135.1351, 124.3781]),
    ],
)
def test_a_case_worked_by_hand(rule, damping, weight, bias):
    factor = af.Factor(
        jnp.array([[4.0], [2.0]]),
        jnp.array([[1.0, 3.0]]),
        jnp.array(2.0),
        jnp.array([[1.0], [1.0]]),
    )
    grads = {"layer": {"weight": jnp.array([[3.0, 1.0], [1.0, 1.0]]), "bias": jnp.ones(2)}}
    tx = af.scale_by_adafisher(layout_of(LAYER), rule=rule, damping=damping)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), factors={"layer": factor})
    np.testing.assert_allclose(updates["layer"]["weight"], weight, rtol=5e-6, atol=1e-6)
    np.testing.assert_allclose(updates["layer"]["bias"], bias, rtol=5e-6)


def test_no_rule_is_taken_for_another():
    """`jax.jit` tells its arguments apart by their structures."""
    structures = [jax.tree.structure(make_rule(rule)) for rule in RULES]
    for i, one in enumerate(structures):
        assert [one == other for other in structures] == [i == j for j in range(len(RULES))]


def test_a_case_of_centered_worked_by_hand():
    """M = (2, 1) and the variance (4, 2) - 1 over its mean (3/2, 1/2); a column has no spectrum."""
    layer = make_layer("layer", "dense", (2, 1), "in0 out0", "out0")
    column = [jnp.array([[a], [b]]) for a, b in ((4.0, 2.0), (1.0, 1.0), (3.0, 2.0))]
    factor = af.Factor(column[0], jnp.array([[5.0]]), jnp.array(2.0), column[1])
    grads = {"layer": {"weight": column[2], "bias": jnp.ones(1)}}
    tx = af.scale_by_adafisher(layout_of(layer), rule="centered", damping=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), factors={"layer": factor})
    # (2 / sqrt(3/2), 1 / sqrt(1/2)) over its root mean square, sqrt(7/3), times 0.2
    np.testing.assert_allclose(updates["layer"]["weight"][:, 0], [0.213809, 0.185164], rtol=5e-6)
    np.testing.assert_allclose(updates["layer"]["bias"], [1 - 0.398973], rtol=5e-6)


def test_centered_is_the_same_step_taken_in_centered_coordinates(x64):
    """`y = Wᵀh + b = Wᵀ(h - μ) + b'`: differentiate and step in (W, b'), then map back."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(9, 3)) + 2, rng.normal(size=(9, 4))
    w, b = rng.normal(size=(3, 4)), rng.normal(size=4)
    mu = x.mean(0)
    layer = make_layer("layer", "dense", (3, 4), "in0 out0", "out0")

    def loss(w, b, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w + b[None]) - target))

    outputs = jax.grad(lambda y: jnp.mean(jnp.square(jnp.tanh(y) - target)))(x @ w + b[None])
    s2 = jnp.mean(jnp.square(outputs), 0, keepdims=True)
    second = np.mean(x**2, 0)[:, None]
    factor = af.Factor(jnp.asarray(second), s2, jnp.array(9.0), jnp.asarray(mu)[:, None])
    tx = af.scale_by_adafisher(layout_of(layer), rule="centered", b1=0.0, damping=TAU)
    plain = jax.grad(loss, (0, 1))(w, b, x)
    grads = {"layer": dict(zip(("weight", "bias"), plain, strict=True))}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), factors={"layer": factor})

    shifted = b + mu @ w
    g_w, g_b = jax.grad(loss, (0, 1))(w, shifted, x - mu)
    variance = np.var(x, 0)
    root_h = np.sqrt(variance / variance.mean() + TAU)[:, None]
    root_s = np.sqrt(s2[0] / s2.mean() + TAU)
    d_w = g_w / (root_h * root_s)
    basis = spectrum.start((1, *d_w.shape))
    cut, _ = spectrum.leading_excess(layer, [d_w], basis, jnp.ones(1, bool))
    (d_w,) = cut.subtract(layer, [d_w])
    d_b = g_b / root_s
    new_w = w - 0.2 * d_w / np.sqrt(np.mean(d_w**2))
    new_b = shifted - d_b / np.sqrt(np.mean(g_b**2))
    moved = jax.tree.map(np.asarray, updates["layer"])
    after = x @ (w - moved["weight"]) + b - moved["bias"]
    expected = (x - mu) @ np.asarray(new_w) + np.asarray(new_b)
    np.testing.assert_allclose(after, expected, rtol=1e-12)


# Properties of the normalisation.

numbers = st.floats(0, 2.0**1000, allow_subnormal=False)
vectors = hnp.arrays(np.float64, st.sampled_from([1, 2, 5]), elements=numbers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def scale(values, inner, epsilon=0.0):
    low, inverse = to_unit(values, inner, epsilon)
    return [(v - low) * inverse for v in values]


@check
@given(vectors, st.integers(-900, 20))
def test_minmax_fills_the_unit_interval_whatever_the_scale(v, exponent):
    with jax.enable_x64(True):
        (got,) = scale((jnp.asarray(v),), (0,))
        got = np.asarray(got)
        assert np.all((got >= 0) & (got <= 1 + 1e-15))
        assert np.all(np.diff(got[np.argsort(v)]) >= 0)
        if v.max() - v.min() > 1e-300:
            np.testing.assert_allclose(got, (v - v.min()) / (v.max() - v.min()), rtol=1e-15)
        if v.max() - v.min() > 1e-20:
            (scaled,) = scale((jnp.asarray(v * 2.0**exponent),), (0,))
            np.testing.assert_allclose(scaled, got, atol=1e-15)


@check
@given(numbers, st.sampled_from([1, 5]), st.sampled_from([0.0, 1e-6]))
def test_minmax_of_a_constant_is_zero(value, n, epsilon):
    with jax.enable_x64(True):
        (got,) = scale((jnp.full(n, value),), (0,), epsilon)
    np.testing.assert_array_equal(got, np.zeros(n))


@check
@given(vectors, vectors)
def test_minmax_of_two_arrays_is_that_of_one(a, b):
    with jax.enable_x64(True):
        joint = scale((jnp.asarray(a), jnp.asarray(b)), (0,))
        (one,) = scale((jnp.concatenate([a, b]),), (0,))
    np.testing.assert_allclose(np.concatenate(joint), one, rtol=1e-15)


# Properties of the averages.


@functools.cache
def updater(rule, x64):
    """The state after `init`, and a compiled `update`, of one small layer."""
    with jax.enable_x64(x64):
        tx = af.scale_by_adafisher(layout_of(LAYER), rule=rule)
        grads = random_tree(np.random.default_rng(0), LAYER)
        return tx.init(grads), jax.jit(lambda g, s, f: tx.update(g, s, factors=f)), grads


def factor_of(values, rows=3.0):
    h, s, mean = np.split(np.asarray(values, float), 3)
    arrays = (h[:, None], s[None], np.array(rows), mean[:, None])
    return {"layer": af.Factor(*map(jnp.asarray, arrays))}


six = hnp.arrays(np.float64, 6, elements=st.floats(1e-100, 1e100))
BAD = st.sampled_from([("value", np.nan), ("value", np.inf), ("rows", 0.0), ("rows", np.nan)])
refreshes = st.lists(st.tuples(six, st.none() | BAD, st.integers(0, 2)), min_size=1, max_size=6)


@check
@given(refreshes, st.sampled_from(["paper", "centered"]))
def test_averages_weigh_good_refreshes_by_their_age_and_skip_bad_ones(sequence, rule):
    """`Σ γ^(n-i) x_i / Σ γ^(n-i)` over the good ones, wherever unrefreshed steps lie between.

    Under `"centered"` `x_i` is what counts of them: at most ten times the average before.
    """
    state, update, grads = updater(rule, True)
    good, gamma = [], {"paper": GAMMA, "centered": CENTERED_GAMMA}[rule]
    with jax.enable_x64(True):
        for values, bad, pauses in sequence:
            what, number = bad or (None, None)
            if what is None:
                counted = values.copy()
                if rule == "centered" and good:
                    past = sum(gamma ** (len(good) - 1 - i) * v for i, v in enumerate(good))
                    past = past / sum(gamma**i for i in range(len(good)))
                    for of, root in ((slice(2), slice(4, 6)), (slice(2, 4), slice(0))):
                        share = min(1, 10 * past[of].sum() / values[of].sum())
                        counted[of] *= share
                        counted[root] *= np.sqrt(share)
                good.append(counted)
            elif what == "value":
                values = np.where(np.arange(6) == int(values[0]) % 6, number, values)
            _, state = update(grads, state, factor_of(values, number if what == "rows" else 3.0))
            for _ in range(pauses):
                _, state = update(grads, state, None)
    weights = [(1 - gamma) * gamma ** (len(good) - 1 - i) for i in range(len(good))]
    averages = jax.tree.map(lambda x: x[0], state.factors["layer"])
    found = np.concatenate([np.ravel(v) for v in (averages.h, averages.s, averages.mean)])
    expected = sum((w * v for w, v in zip(weights, good, strict=True)), np.zeros(6))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(np.ravel(state.slots["layer"]), sum(weights), rtol=1e-12)


single = st.floats(0, np.finfo(np.float32).max, width=32, allow_subnormal=False)
anything = st.tuples(
    hnp.arrays(
        np.float32, 4, elements=single | st.sampled_from([0.0, np.inf, np.nan, 1e-37, 3e38])
    ),
    hnp.arrays(np.float32, 2, elements=st.floats(-1, 1, width=32)),
)


@check
@given(st.lists(anything, min_size=1, max_size=4), st.sampled_from(RULES))
def test_updates_and_state_stay_finite_whatever_the_factors(sequence, rule):
    state, update, grads = updater(rule, False)
    for values, tilt in sequence:
        with np.errstate(invalid="ignore"):
            mean = np.sqrt(values[:2]) * tilt  # as of real inputs: mean² ≤ h
        updates, state = update(grads, state, factor_of([*values, *mean]))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))


@check
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), st.sampled_from(RULES))
def test_updates_are_minus_the_learning_rate_times_the_direction(rates, rule):
    schedule = jnp.asarray(rates, jnp.float32)
    tx = af.adafisher(lambda count: schedule[count], None, rule=rule)
    plain = af.scale_by_adafisher(None, rule=rule)
    grads = {"w": jnp.array([1.0, -2.0])}
    state, plain_state = tx.init(grads), plain.init(grads)
    for rate in rates:
        updates, state = tx.update(grads, state)
        direction, plain_state = plain.update(grads, plain_state)
        np.testing.assert_allclose(updates["w"], -np.float32(rate) * direction["w"], rtol=1e-6)


def test_the_rules_defaults_are_those_documented():
    rng = np.random.default_rng(0)
    grads, factors = random_tree(rng, LAYER), random_factors(rng, LAYER)
    for rule, ema, damping in (
        ("paper", GAMMA, LAMBDA),
        ("official", GAMMA, LAMBDA),
        ("centered", CENTERED_GAMMA, TAU),
    ):
        found = []
        for given_ in ({}, {"curvature_ema": ema, "damping": damping, "b1": B1}):
            tx = af.scale_by_adafisher(layout_of(LAYER), rule=rule, **given_)
            found.append(jax.jit(tx.update)(grads, tx.init(grads), factors=factors))
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_centered_steps_of_inputs_far_from_zero_stay_within_its_rms():
    """Where rounding leaves nothing of the centered gradient, a weight is not stepped wildly."""
    far, out = 1e4, 2
    h = jnp.full((2, 1), far)
    factor = af.Factor(h**2, jnp.ones((1, out)), jnp.array(8.0), h)
    bias = jnp.array([0.5, -1.0])
    grads = {"layer": {"weight": far * jnp.stack([bias, bias]) * (1 + 1e-7), "bias": bias}}
    tx = af.scale_by_adafisher(layout_of(LAYER), rule="centered")
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), factors={"layer": factor})
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    assert jnp.max(jnp.abs(updates["layer"]["weight"])) < 10
    assert state.scales["layer/weight"].square.item() > 0


def test_the_scales_keep_their_type_beside_a_wider_bias(x64):
    grads = {"layer": {"weight": jnp.ones((2, 2), jnp.float32), "bias": jnp.ones(2)}}
    tx = af.scale_by_adafisher(layout_of(LAYER), rule="centered")
    state = tx.init(grads)
    factor = jax.tree.map(lambda x: x + 1.0, LAYER.zeros(jnp.float64))
    _, after = tx.update(grads, state, factors={"layer": factor})
    types = [[x.dtype for x in jax.tree.leaves(one.scales)] for one in (state, after)]
    assert types[0] == types[1]


def test_a_rule_is_taken_where_its_name_is():
    class Twice(type(make_rule("centered"))):
        rms = 0.4

    grads = random_tree(np.random.default_rng(0), LAYER)
    factors = random_factors(np.random.default_rng(0), LAYER)
    found = {}
    for rule in ("centered", make_rule("centered"), Twice(CENTERED_GAMMA, TAU)):
        tx = af.scale_by_adafisher(layout_of(LAYER), rule=rule)
        found[rule] = jax.jit(tx.update)(grads, tx.init(grads), factors=factors)[0]
    named, same, other = found.values()
    jax.tree.map(np.testing.assert_array_equal, named, same)
    np.testing.assert_allclose(other["layer"]["weight"], 2 * named["layer"]["weight"], rtol=1e-6)
    with pytest.raises(ValueError, match="damping: got -1"):
        af.scale_by_adafisher(layout_of(LAYER), rule=Twice(0.9, -1))
