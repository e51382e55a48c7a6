"""Modules that both vision transformers use."""

from typing import Any

from flax import linen as nn

small_normal = nn.initializers.truncated_normal(0.02)


class SelfAttention(nn.Module):
    """Self-attention over the second to last axis, with a bias, (…, heads, tokens, tokens)."""

    heads: int
    dropout: float
    qkv_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train, bias=None):
        width = x.shape[-1]
        qkv = nn.Dense(
            3 * width,
            use_bias=self.qkv_bias,
            kernel_init=small_normal,
            dtype=self.dtype,
            name="qkv",
        )(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        x = nn.dot_product_attention(
            qkv[..., 0, :, :],
            qkv[..., 1, :, :],
            qkv[..., 2, :, :],
            bias,
            broadcast_dropout=False,
            dropout_rng=self.make_rng("dropout") if train and self.dropout else None,
            dropout_rate=self.dropout,
            deterministic=not train,
        ).reshape(x.shape)
        return nn.Dense(width, kernel_init=small_normal, dtype=self.dtype, name="out")(x)


class MLP(nn.Module):
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.Dense(self.hidden, kernel_init=small_normal, dtype=self.dtype, name="up")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, kernel_init=small_normal, dtype=self.dtype, name="down")(x)


class StochasticDepth(nn.Module):
    """Drops a residual branch for random examples in training."""

    rate: float

    @nn.compact
    def __call__(self, x, train):
        all_but_examples = tuple(range(1, x.ndim))
        return nn.Dropout(self.rate, all_but_examples, deterministic=not train)(x)
