"""Two decoder-only transformers: the paper's, and one in today's style."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

INIT = nn.initializers.normal(0.02)


class GPT(nn.Module):
    """Pre-norm blocks with learned positions; `tied` shares embeddings and output weights."""

    vocabulary: int
    length: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    tied: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, train):
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, embedding_init=INIT)
        positions = nn.Embed(self.length, self.width, dtype=self.dtype, embedding_init=INIT)
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for _ in range(self.layers):
            x = GPTBlock(self.heads, self.layers, self.dropout, self.dtype)(x, train)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, kernel_init=INIT)(x)


class GPTBlock(nn.Module):
    heads: int
    layers: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        def dense(width, init=INIT):
            return nn.Dense(width, dtype=self.dtype, kernel_init=init)

        def into(branch):  # the residual stream; its variance then does not grow with depth
            smaller = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
            branch = dense(x.shape[-1], smaller)(branch)
            return nn.Dropout(self.dropout, deterministic=not train)(branch)

        normalized = nn.LayerNorm(dtype=self.dtype)(x)
        heads = dense(3 * x.shape[-1])(normalized).reshape(*x.shape[:2], 3, self.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 2, 0), is_causal=True)
        x = x + into(attended.reshape(x.shape))
        normalized = nn.LayerNorm(dtype=self.dtype)(x)
        return x + into(nn.gelu(dense(4 * x.shape[-1])(normalized)))


class ScannedTransformer(nn.Module):
    """A block scanned over the layers, with rematerialization, rotary positions and no biases."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, embedding_init=INIT)(tokens)
        blocks = nn.scan(
            nn.remat(ScannedBlock, prevent_cse=False),  # not needed inside a scan
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.layers,
        )
        x, _ = blocks(self.heads, self.dropout, not train, self.dtype, name="blocks")(x, None)
        x = nn.RMSNorm(dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, kernel_init=INIT)(x)


class ScannedBlock(nn.Module):
    """Attention and a gated MLP."""

    heads: int
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        def dense(width, name):
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=INIT, name=name)

        def dropped(branch):
            return nn.Dropout(self.dropout, deterministic=self.deterministic)(branch)

        width = x.shape[-1]
        normalized = nn.RMSNorm(dtype=self.dtype)(x)
        query, key, value = (
            dense(width, name)(normalized).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + dropped(dense(width, "out")(attended.reshape(x.shape)))
        normalized = nn.RMSNorm(dtype=self.dtype)(x)
        hidden = nn.silu(dense(4 * width, "gate")(normalized)) * dense(4 * width, "up")(normalized)
        return x + dropped(dense(width, "down")(hidden)), None


def rotated(x):
    """Rotary positions (Su et al., arXiv:2104.09864) for `(batch, position, head, feature)`.

    Features i and i + d/2 of d are a complex number, which is rotated by the angle position times
    10000^(-2i/d).
    """
    half = x.shape[-1] // 2
    turns = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))
    cos, sin = (f(turns)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)
