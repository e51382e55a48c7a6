"""Mixed precision: loss scales, half-precision models, and the types the optimizer keeps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import adafisher_jax as af
from tests.support.hand_made import layout_of, make_layer, random_factors, random_tree

pytestmark = pytest.mark.slow

any_rule = pytest.mark.parametrize("rule", ["paper", "official", "centered"])
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 5, 16))


class Net(nn.Module):
    """A layer of every statistic, computing in `dtype` with float32 parameters."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, tokens):
        x = nn.Dense(4, dtype=self.dtype)(x) + nn.Embed(5, 4, dtype=self.dtype)(tokens)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        x = nn.Conv(2, (3,), dtype=self.dtype)(x[..., None])
        return jnp.mean(nn.tanh(x), 1)


PARAMS = Net().init(jax.random.key(0), X, TOKENS)["params"]


def loss_fn(params, scale, model):
    y = model.apply({"params": params}, X, TOKENS)
    return scale * jnp.mean(jnp.square(y.astype(jnp.float32) - X[:, :2]))


@functools.cache
def capture(model):
    loss = functools.partial(loss_fn, model=model)
    layout = af.trace_layout(loss, PARAMS, 1.0)
    return layout, jax.jit(af.value_and_grad(loss, layout))


# Loss scales.


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**16])
def test_unscaled_factors_are_those_of_the_plain_loss(scale):
    layout, grad_fn = capture(Net())
    assert layout.covered == 1
    _, _, plain = grad_fn(PARAMS, 1.0)
    _, _, scaled = grad_fn(PARAMS, scale)
    unscaled = {path: factor.unscale(scale) for path, factor in scaled.items()}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), unscaled, plain)


def test_a_scales_square_may_be_too_large_for_float32():
    factor = random_factors(np.random.default_rng(0), DENSE)["dense"]
    large = factor._replace(s=factor.s * 2.0**120)
    np.testing.assert_array_equal(large.unscale(2.0**100).s, factor.s * 2.0**-80)


@functools.cache
def create(rule):
    rate = 0.01 if rule == "centered" else 1e-4
    tx = af.adafisherw(rate, capture(Net())[0], rule=rule)
    state = af.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    return state.replace(step=jnp.zeros([], jnp.int32))


@functools.partial(jax.jit, static_argnums=2)
def scaled_step(state, dynamic_scale, model):
    """A step by the recipe of docs/precision.md."""
    scale = dynamic_scale.scale
    loss, grads, factors = capture(model)[1](state.params, scale)
    factors = {path: factor.unscale(scale) for path, factor in factors.items()}
    dynamic_scale, finite, _, grads = dynamic_scale.value_and_grad(
        lambda params: optax.tree.vdot(params, grads) / scale
    )(state.params)
    new = state.apply_gradients(grads=grads, factors=factors)
    state = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return state, dynamic_scale, finite, loss / scale


@jax.jit
def plain_step(state):
    loss, grads, factors = capture(Net())[1](state.params, 1.0)
    return state.apply_gradients(grads=grads, factors=factors), loss


@functools.cache
def plain_run(rule, steps):
    """The state and losses in float32, without a scale."""
    state, losses = create(rule), []
    for _ in range(steps):
        state, loss = plain_step(state)
        losses.append(loss)
    return state, losses


def scaled_run(rule, dynamic_scale, model, steps):
    state, scales, finites, losses = create(rule), [], [], []
    for _ in range(steps):
        scales.append(float(dynamic_scale.scale))
        state, dynamic_scale, finite, loss = scaled_step(state, dynamic_scale, model)
        finites.append(bool(finite))
        losses.append(loss)
    return state, scales, finites, losses


def new_scale(scale, growth_interval):
    return DynamicScale(
        scale=jnp.float32(scale), fin_steps=jnp.int32(0), growth_interval=growth_interval
    )


@any_rule
def test_a_run_with_a_growing_scale_is_the_run_without(rule):
    """So both the gradients and the factors are unscaled."""
    state, scales, finites, _ = scaled_run(rule, new_scale(2.0**10, 1), Net(), 6)
    assert scales == [2.0**n for n in (10, 10, 11, 11, 12, 12)]
    assert all(finites)
    expected, _ = plain_run(rule, 6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, state.params, expected.params)
    jax.tree.map(close, state.opt_state[0].factors, expected.opt_state[0].factors)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, jnp.float16) for rule in ("paper", "official", "centered")]
    + [("centered", jnp.bfloat16)],
)
def test_a_half_precision_model_trains_like_the_float32_one(rule, dtype):
    """In float16 the first scales overflow: those steps are skipped, and the scale shrinks."""
    steps = 16
    state, scales, finites, losses = scaled_run(rule, new_scale(2.0**24, 99), Net(dtype), steps)
    overflows = finites.index(True)
    assert (overflows > 0) == (dtype == jnp.float16)
    assert finites == [False] * overflows + [True] * (steps - overflows)
    assert scales[overflows] == 2.0 ** (24 - overflows)
    assert state.step == state.opt_state[0].count == steps - overflows
    assert set(optax.tree.get(state, "skipped").tolist()) == {0}
    _, expected = plain_run(rule, steps - overflows)
    np.testing.assert_allclose(losses[overflows:], expected, rtol=0.05)
    assert expected[-1] < 0.97 * expected[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


# Types.

DENSE = make_layer("dense", "dense", (3, 4), "in0 out0", "out0")
STACK = make_layer("stack", "dense", (2, 3, 4), "stack0 in0 out0", "stack0 out0")
NORM = make_layer("norm", "norm", (4,), "out0", "out0")
LAYERS = (DENSE, STACK, NORM)


@pytest.mark.parametrize("mu_dtype", [None, jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@any_rule
def test_types_are_stable_whatever_the_parameters_are(rule, dtype, mu_dtype):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a.astype(dtype), random_tree(rng, *LAYERS))
    params |= {"free": jnp.ones(2, dtype)}
    factors = random_factors(rng, *LAYERS)
    tx = af.scale_by_adafisher(layout_of(*LAYERS, free=(2,)), rule=rule, mu_dtype=mu_dtype)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(
        lambda g, s, f: tx.update(g, s, factors=f), params, state, factors
    )
    types = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)  # noqa: E731
    assert types(after) == types(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype or dtype)}
    bases = {path: scale.basis for path, scale in state.scales.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(bases)} <= {jnp.dtype(jnp.bfloat16)}
    scales = {path: scale._replace(basis=None) for path, scale in state.scales.items()}
    kept = state.factors, state.slots, scales
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}


# Complex parameters have no factors, and are stepped as a pair of real ones with one size.


@any_rule
def test_a_complex_parameter_is_stepped_by_the_fallback(rule):
    g = jnp.array([3.0 + 4.0j, -1.0j])
    tx = af.scale_by_adafisher(None, rule=rule, b1=0.5)
    updates, state = tx.update({"w": g}, tx.init({"w": g}))
    size = np.sqrt((25 + 1) / 2) if rule == "centered" else 1.0
    np.testing.assert_allclose(updates["w"], g / size, rtol=1e-6)
    updates, state = tx.update({"w": g.at[0].set(complex(0, np.nan))}, state)
    assert state.mu["w"].dtype == updates["w"].dtype == g.dtype
    assert np.all(np.isfinite(jnp.stack([updates["w"].real, updates["w"].imag])))
    assert state.mu["w"][0] == g[0] / 2
    assert all(jnp.isrealobj(leaf) for leaf in jax.tree.leaves(state.scales))


@any_rule
def test_a_complex_layer_is_listed_as_uncovered(rule):
    """And descends, given the conjugate of JAX's gradient, as every optax optimizer is."""
    model = nn.Sequential([nn.Dense(2, param_dtype=jnp.complex64), jnp.real, nn.Dense(1)])
    x = X.astype(jnp.complex64) * (1 + 0.5j)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - X[:, :1]))

    layout = af.trace_layout(loss_fn, params)
    reasons = {row.leaf.path: row.reason for row in layout.uncovered}
    assert sorted(reasons) == ["layers_0/bias", "layers_0/kernel"]
    assert all("complex" in reason for reason in reasons.values())
    assert [layer.path for layer in layout.layers] == ["layers_2"]
    tx = af.adafisher(0.03 if rule == "centered" else 1e-4, layout, rule=rule)

    @jax.jit
    def step(params, state):
        loss, grads, factors = af.value_and_grad(loss_fn, layout)(params)
        updates, state = tx.update(jax.tree.map(jnp.conj, grads), state, params, factors=factors)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
