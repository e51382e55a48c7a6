"""Dense and convolution factors against the diagonals of kfac-jax's Kronecker factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.reference import captured, random_params


@pytest.fixture
def kfac(monkeypatch):
    kfac_jax = pytest.importorskip("kfac_jax")
    from kfac_jax._src import tag_graph_matcher

    def eval_jaxpr_eqn(eqn, values):  # JAX 0.10 returns parameters alone, kfac-jax wants a pair
        params = eqn.primitive.get_bind_params(eqn.params)
        subfuns, params = params if isinstance(params, tuple) else ((), params)
        outputs = eqn.primitive.bind(*subfuns, *values, **params)
        return outputs if isinstance(outputs, list) else [outputs]

    monkeypatch.setattr(tag_graph_matcher, "eval_jaxpr_eqn", eval_jaxpr_eqn)
    with jax.numpy_rank_promotion("allow"):
        yield kfac_jax


class Net(nn.Module):
    padding: str
    strides: int

    @nn.compact
    def __call__(self, x):
        f64 = {"param_dtype": jnp.float64}
        x = nn.Conv(4, (3, 2), self.strides, padding=self.padding, name="conv", **f64)(x)
        x = jnp.tanh(x).reshape(x.shape[0], -1)
        x = jnp.tanh(nn.Dense(5, use_bias=False, name="mid", **f64)(x))
        return nn.Dense(3, name="head", **f64)(x)


@pytest.mark.parametrize(
    ("padding", "strides"), [("SAME", 2), pytest.param("VALID", 1, marks=pytest.mark.slow)]
)
def test_factors_are_the_diagonals_of_kfacs(padding, strides, kfac, x64):
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(4, 5, 4, 2)), rng.normal(size=(4, 3))
    model = Net(padding, strides)
    params = random_params(model, x)

    def loss_fn(params, batch):
        y = model.apply({"params": params}, batch[0])
        kfac.register_squared_error_loss(y, batch[1])
        return jnp.sum(jnp.square(y - batch[1])) / 2  # kfac's: summed over examples

    estimator = kfac.BlockDiagonalCurvature(loss_fn, default_estimation_mode="fisher_empirical")
    arguments = (params, (x, target))
    estimator.finalize(arguments)
    options = {"rng": jax.random.key(0), "func_args": arguments}
    state = estimator.init(
        exact_powers_to_cache=set(),
        approx_powers_to_cache=set(),
        cache_eigenvalues=False,
        **options,
    )
    state = estimator.update_curvature_matrix_estimate(
        state, ema_old=0.0, ema_new=1.0, identity_weight=0.0, batch_size=4, **options
    )
    diagonals = {
        block.parameters_shapes[0]: [np.diag(factor.value) for factor in found.factors]
        for block, found in zip(estimator.blocks, state.blocks_states, strict=True)
    }

    layout, factors = captured(
        lambda params, x, y: jnp.sum(jnp.square(model.apply({"params": params}, x) - y)) / 2,
        params,
        x,
        target,
    )
    assert len(layout.layers) == 3
    for layer in layout.layers:
        h, s = diagonals[layer.weight.shape]
        if layer.bias:
            assert h[-1] == 1  # the bias slot, that `h` leaves out
            h = h[:-1]
        factor = factors[layer.path]
        np.testing.assert_allclose(factor.h.ravel(), h, 1e-9, err_msg=layer.path)
        np.testing.assert_allclose(factor.s.ravel(), s, 1e-9, err_msg=layer.path)
