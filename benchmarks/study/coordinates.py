"""Any optimizer in coordinates in which the inputs of layers have mean zero."""

import jax.numpy as jnp
import optax

from adafisher_jax.paths import by_path

AVERAGED = 0.95  # as in "centered"


def of_centered_inputs(layout, inner):
    r"""The steps of a transformation along :math:`g_w - \mu g_b^T` and :math:`g_b`.

    A step :math:`(d_w, d_b)` in these coordinates is one of :math:`d_b - d_w^T \mu` for the bias;
    `mu` is a running average of the means of a layer's inputs.
    """
    layers = [one for one in layout.layers if one.weight and one.bias and one.kind != "norm"]
    average = optax.ema(AVERAGED)

    def init(params):
        means = {layer.path: layer.zeros().mean for layer in layers}
        return average.init(means), inner.init(params)

    def update(grads, state, params=None, *, factors):
        fresh = {layer.path: factors[layer.path].mean for layer in layers}
        means, averages = average.update(fresh, state[0])
        leaves, treedef = by_path(grads)
        for layer in layers:
            bias = layer.from_bias(leaves[layer.bias.path])
            leaves[layer.weight.path] -= means[layer.path] * bias
        steps, after = inner.update(treedef.unflatten(leaves.values()), state[1], params)
        leaves, _ = by_path(steps)
        for layer in layers:
            pulled = jnp.sum(
                means[layer.path] * leaves[layer.weight.path], layer.ins, keepdims=True
            )
            leaves[layer.bias.path] -= layer.to_bias(pulled)
        return treedef.unflatten(leaves.values()), (averages, after)

    return optax.GradientTransformationExtraArgs(init, update)
