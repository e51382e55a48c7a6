"""The recommended rule."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from adafisher_jax import execution_order, spectrum
from adafisher_jax.alike import each, part
from adafisher_jax.factors import Axes, Factor
from adafisher_jax.layout import Layer, Leaf, unstacked
from adafisher_jax.meshes import everywhere
from adafisher_jax.rules.rule import Curvature, Outcome, Pair, Rule, Scale, Vectors, blend, sums

# Entries of weights whose steps a CPU holds in memory at a time. Allocators map larger memory anew
# in every call, which took a third of the update's time.
AT_ONCE = 2**21


class Centered(Rule):
    r"""The square root of the factors in coordinates that center the inputs, and a flat spectrum.

    A layer with a bias is the same map as :math:`y = W^T (\bar h - \mu) + b'`. In these
    coordinates the weight and the bias no longer share a direction. With :math:`\hat n` the
    momentum one step ahead (Nesterov's) and :math:`r(x) = x / \mathrm{mean}(x)`,

    .. math::

        \hat H &= r(E[h^2] - \mu^2), \qquad \hat S = r(S), \qquad
        D = (\hat n_w - \mu \hat n_b^T)
            / \left((\hat H + \tau) \otimes (\hat S + \tau)\right)^{1/2} \\
        d_w &= 0.2\, \min(1, 128/n)\, \min(1, N/N_0)^{1/2}\,
            (D - E) / \mathrm{rms}(D - E), \qquad
        d_b = \hat n_b / \big((\hat S + \tau)^{1/2}\, \mathrm{rms}(g_b)\big) - \mu^T d_w

    `E` is the excess of the leading singular values (`adafisher_jax.spectrum`). `rms` is a running
    root mean square, one number for each parameter and each stacked layer. The scale of the loss
    drops out. At a learning rate of one, the step of a weight is about as large as Adam's.

    `n` is the shorter side of `D` as a matrix of inputs by outputs. A patch counts as inputs, the
    features of all heads as outputs, and stacked layers are separate matrices. A few directions
    hold most of a step, so a step of fixed root mean square changes outputs in proportion to `n`
    when both sides grow. The division by `n` makes up for this, and one learning rate serves small
    and large networks. It does not apply below 128, since a bottleneck is not a narrow network, nor
    to embeddings, since a lookup changes by its own row alone.

    `N` is the number of rows in a batch, averaged as the factors are, and :math:`N_0` the geometric
    mean of the sides of `D`, or 64 if that is less. The gradient of few rows is mostly noise, and
    of low rank, but a step of fixed root mean square would be as long as that of many. The root is
    the rule of arXiv:2205.10287 for noise. It does not apply to embeddings either.

    A batch whose `H` has more than ten times the sum of the averaged `H` counts as one with ten
    times the sum, its :math:`\mu` by the root of the same share, and so does one whose `S` has. So
    no batch in other units decides for the next twenty by which mean inputs are centered.

    Without a bias :math:`\mu = 0`. A normalization layer is stepped like a bias. Outside layers,
    and before the first refresh of a layer, matrices are divided by the `rms` of their own steps,
    and vectors by that of the gradient.

    µP divides by the number of inputs (arXiv:2203.03466); Muon with a fixed root mean square
    (arXiv:2502.16982) does not divide. Spectra (arXiv:2602.11185) also lowers a leading subspace of
    the update, tracked by power iteration. `docs/algorithm.md` has more of what is close.
    """

    nesterov = True
    exponent = 0.5
    b2 = 0.99
    rms = 0.2
    widest = 128  # the longest shorter side of a weight whose steps have that root mean square
    fewest = 64  # so many rows in a batch are enough for steps of that size in every layer
    most = 10.0  # how many times the averages so far the statistics of one batch count

    def refresh(self, layer: Layer, old: Curvature, fresh: Factor) -> tuple[Curvature, Outcome]:
        """The averages after new statistics, of which those far above them count less."""
        of_h, of_mean, before_h = sums(layer, fresh.h, jnp.abs(fresh.mean), old.factor.h)
        of_s, before_s = sums(layer, fresh.s, old.factor.s)

        def share(of_batch: jax.Array, before: jax.Array) -> jax.Array:
            """The share that counts. Averages so far are sums to be divided by their slot."""
            most, of_batch = self.most * before, of_batch * old.slot
            above = (most > 0) & (of_batch > most)
            return jnp.where(above, most / jnp.where(above, of_batch, 1), 1)

        h, s = share(of_h, before_h), share(of_s, before_s)
        counted = Factor(h * fresh.h, s * fresh.s, fresh.rows, jnp.sqrt(h) * fresh.mean)
        new = counted, jnp.ones_like(old.slot)
        finite = jnp.isfinite(of_h + of_mean + of_s)
        return blend(layer, old, new, fresh.rows, finite, self.ema, 1 - self.ema)

    def start_scale(self, leaf: Any, layer: Layer | None, at: Leaf | None) -> Scale | None:
        axes = at.axes if at else ("",) * leaf.ndim
        square = jax.eval_shape(lambda x: _mean(_squared(x), axes), leaf)
        zeros = functools.partial(jnp.zeros, square.shape, square.dtype)  # to be donated apart
        basis = None
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        if layer and layer.weight == at and layer.kind != "norm" and real:
            basis = spectrum.start(jax.eval_shape(layer.to_matrices, leaf).shape)
        return Scale(zeros(), zeros(), basis)

    def scaled(
        self, layer: Layer, curvature: Curvature, centers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (h, s, _, mean), slot, _ = curvature  # the slot, by which they are divided, drops out
        if layer.kind == "norm":
            h = jnp.ones_like(h)
        elif centers:
            square = jnp.square(mean) / jnp.where(self.refreshed(curvature), slot, 1)
            h = _relative(layer, jnp.maximum(h - square, 0))
        else:
            h = _relative(layer, h)
        return h, slot, _relative(layer, s)

    def damped(self, layer: Layer, h: jax.Array, s: jax.Array) -> jax.Array:
        return (s + self.damping) * (h if layer.kind == "norm" else h + self.damping)

    def direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, vectors: Vectors, scales: Pair
    ) -> tuple[Pair, Pair]:
        few = max(AT_ONCE * layer.shape[0] // max(layer.leaves[0].size, 1), 1)
        together = functools.partial(self._direction, layer)
        in_parts = functools.partial(self._in_parts, layer, few)
        given = curvature, momentum, vectors, scales
        if momentum.weight is None or few >= layer.shape[0]:
            return together(*given)
        return jax.lax.platform_dependent(*given, cpu=in_parts, default=together)

    def _in_parts(
        self,
        layer: Layer,
        few: int,
        curvature: Curvature,
        momentum: Pair,
        vectors: Vectors,
        scales: Pair,
    ) -> tuple[Pair, Pair]:
        """The directions of a few layers, then of the next."""
        steps: list[Pair] = []
        after: list[Pair] = []
        stacked = curvature, vectors, scales
        begin = jnp.zeros([], jnp.int32)
        for start in range(0, layer.shape[0], few):
            own = Pair(*(values and values[start : start + few] for values in momentum))
            count = min(few, layer.shape[0] - start)
            if after:
                begin = execution_order.after(begin, [after[-1].weight.square])
            (averages, *others), begin = part(layer.shape[0], count, stacked, begin)
            found = self._direction(layer.one.stacked(count), averages, own, *others)
            steps.append(found[0])
            after.append(found[1])
        joined = (one[0] and tuple(itertools.chain(*one)) for one in zip(*steps, strict=True))
        return Pair(*joined), jax.tree.map(lambda *parts: jnp.concatenate(parts), *after)

    @functools.partial(jax.jit, static_argnums=1)  # parts of a group are traced once
    def _direction(
        self, layer: Layer, curvature: Curvature, momentum: Pair, vectors: Vectors, scales: Pair
    ) -> tuple[Pair, Pair]:
        (weights, biases), (scale_w, scale_b) = momentum, scales
        centers = layer.kind != "norm" and weights is not None and biases is not None
        refreshed = self.refreshed(curvature)
        h, _, s = self.scaled(layer, curvature, centers)
        inverse_h, inverse_s = (
            _inverse_root(jnp.where(refreshed, x + self.damping, 1)) for x in (h, s)
        )
        if biases is not None and layer.bias is not None:
            scale_b, inverse = self._of_vectors(scale_b, vectors.grads.bias, layer.bias.axes)
            biases = each(jnp.multiply, biases, layer.to_bias(inverse_s) * inverse)
        if weights is not None and layer.kind == "norm":
            scale_w, inverse = self._of_vectors(scale_w, vectors.grads.weight, layer.axes)
            weights = each(jnp.multiply, weights, inverse_s * inverse)
        elif weights is not None:
            parts, mean, least = [inverse_h, inverse_s], None, jnp.zeros(())
            if centers:
                mean = curvature.factor.mean / jnp.where(refreshed, curvature.slot, 1)
                of_in, of_out = mean * inverse_h, layer.from_bias(vectors.momentum.bias) * inverse_s
                parts += [of_in, of_out]
                # Where no more than rounding is left of the difference, it is no step.
                least = _mean(_squared(of_in), layer.axes) * _mean(_squared(of_out), layer.axes)
                least = jnp.finfo(least.dtype).eps * least
            steps = each(_preconditioned, weights, *parts)
            size = self.step_rms(layer, curvature)
            weights, pulled, scale_w = self._flat(
                layer, steps, mean, refreshed, scale_w, least, size
            )
            if centers:
                biases = each(jnp.subtract, biases, layer.to_bias(pulled))
        return Pair(weights, biases), Pair(scale_w, scale_b)

    def _flat(
        self,
        layer: Layer,
        steps: tuple[jax.Array, ...],
        mean: jax.Array | None,
        where: jax.Array,
        scale: Scale,
        least: jax.Array,
        size: Any,
    ) -> tuple[tuple[jax.Array, ...], Any, Scale]:
        """Weights' steps with their leading singular values cut, at their size.

        Args:
          layer: the group's.
          steps: of each weight, in its own axes.
          mean: of the inputs, if it is to be multiplied with the steps.
          where: false for layers, or blocks of them, whose values are left as they are.
          scale: what is stored of their steps.
          least: what their mean squares are at least taken for.
          size: their root mean square afterwards.

        Returns:
          The steps, their products with `mean`, and what is stored of them.
        """
        one = layer.one
        vector = None if mean is None else layer.to_matrices(mean).mT
        if scale.basis is None:
            cut = spectrum.no_excess(one, steps, vector)
        else:
            where = where.reshape(-1)
            cut, basis = spectrum.leading_excess(one, steps, scale.basis, where, vector)
            scale = scale._replace(basis=basis)
        square = _mean(cut.square.reshape(layer.slot_shape), layer.axes)
        square = square / max(layer.fan_in * layer.fan_out, 1)
        scale, inverse = self._size(scale, jnp.maximum(square, least))
        size = size * inverse
        flat = each(jnp.multiply, cut.subtract(one, steps), size)
        pulled = None if cut.pulled is None else layer.from_matrices(cut.pulled) * size
        return flat, pulled, scale

    def step_rms(self, layer: Layer, curvature: Curvature) -> Any:
        """The root mean square of the steps of a layer's weight at a learning rate of one.

        It is one number, or one for each stacked layer, of the weight's rank.
        """
        own = self.rms * self.share(layer)
        if layer.kind == "embedding":
            return own
        slot = _mean(curvature.slot, layer.axes)
        rows = curvature.factor.rows.reshape(slot.shape) / jnp.where(slot > 0, slot, 1)
        share = jnp.minimum(rows / self.enough(layer), 1)
        return own * jnp.sqrt(jnp.where(rows > 0, share, 1))

    def share(self, layer: Layer) -> float:
        """The size of the steps of a layer's weight, relative to a small layer's."""
        if layer.kind == "embedding":  # a lookup changes by its own row's step, whatever the width
            return 1.0
        return min(1.0, self.widest / max(min(layer.fan_in, layer.fan_out), 1))

    def enough(self, layer: Layer) -> float:
        """How many rows in a batch are enough for steps of full size of a layer's weight."""
        return min(max(layer.fan_in * layer.fan_out, 1) ** 0.5, self.fewest)

    def fallback(self, momentum: jax.Array, grad: jax.Array, scale: Any) -> tuple[Any, Any]:
        vector = momentum.ndim < 2
        square = _squared(grad if vector else momentum)
        scale, inverse = self._size(scale, _mean(square, ("",) * square.ndim))
        return momentum * (inverse if vector else self.rms * inverse), scale

    def _of_vectors(self, scale: Scale, grads: jax.Array, axes: Axes) -> tuple[Scale, jax.Array]:
        """`_size` of biases, or of normalization layers' scales or shifts."""
        return self._size(scale, _mean(_squared(grads), axes))

    def _size(self, scale: Scale, square: jax.Array) -> tuple[Scale, jax.Array]:
        """The scale after a mean square, and one over the root of the average that it keeps."""
        square = everywhere(square).astype(scale.square.dtype)
        good = jnp.isfinite(square)
        new = jnp.where(good, self.b2 * scale.square + (1 - self.b2) * square, scale.square)
        one = jnp.where(
            good, self.b2 * scale.bias_correction + (1 - self.b2), scale.bias_correction
        )
        scale = scale._replace(square=new, bias_correction=one)
        return scale, jnp.where(good, _inverse_rms(scale), 0)  # without a square there is no step

    def size(self, layer: Layer, curvature: Curvature, scale: Scale | None) -> Any:
        assert scale is not None
        own = 1 if layer.kind == "norm" else self.step_rms(layer, curvature)
        return own * _inverse_rms(scale)


def _preconditioned(
    momentum: jax.Array, inverse_h: jax.Array, inverse_s: jax.Array, *means: jax.Array
) -> jax.Array:
    """A weight's momentum, without the part along the mean input if that is given, divided."""
    step = momentum * (inverse_h * inverse_s)
    return step - means[0] * means[1] if means else step


def _inverse_rms(scale: Scale) -> jax.Array:
    """One over the running root mean square; 0 while that is 0."""
    return _inverse_root(scale.square, scale.bias_correction)


def _inverse_root(x: jax.Array, by: Any = 1) -> jax.Array:
    """One over the square root of `x / by`; 0 where `x` is 0."""
    good = x > 0
    x, by = (jnp.where(good, y, 1) for y in (x, by))
    return jnp.where(good, jax.lax.rsqrt(x / by), 0)


def _relative(layer: Layer, values: jax.Array) -> jax.Array:
    """Values relative to their block's average; 1 where that is nothing to go by."""
    average = _average(values, layer.inner)
    relative = values / jnp.where(average > 0, average, 1)
    return jnp.where((average > 0) & jnp.isfinite(relative), relative, 1)


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(x).astype(jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32)))


def _mean(values: jax.Array, axes: Axes) -> jax.Array:
    """The average of each stacked layer; the other axes stay as 1."""
    return _average(values, unstacked(axes))


def _average(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Over some axes, which stay as 1; of nothing, 0."""
    count = math.prod(values.shape[i] for i in axes)
    return jnp.sum(values, axes, keepdims=True) / max(count, 1)
