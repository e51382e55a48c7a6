# %% [markdown]
# # From AdamW to AdaFisher
#
# This notebook converts a training loop that uses AdamW. The loop has a `TrainState`, a schedule,
# gradient clipping, and weight decay with a mask. What changes? And does the rest still work?

# %%
import difflib
import inspect

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import adafisher_jax as af


# %%
class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = CNN()


def loss_fn(params, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16

STEPS, BATCH = 200, 64
rows = np.random.default_rng(0).choice(len(images), (STEPS, BATCH))
batches = list(zip(images[rows], labels[rows], strict=True))
params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # kernels decay, biases do not


def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 20, STEPS)


# %% [markdown]
# ## The loop you have


# %%
def train():
    tx = optax.adamw(schedule(3e-2), weight_decay=1e-2, mask=mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for batch in batches:
        state, loss = train_step(state, *batch)
        losses.append(float(loss))
    return state, losses


train_with_adamw = train

# %% [markdown]
# ## The same loop with AdaFisher


# %%
layout = af.trace_layout(loss_fn, params, *batches[0])


def train():
    tx = af.adafisherw(schedule(3e-2), layout, rule="centered", weight_decay=1e-2, mask=mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    state = af.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, images, labels):
        loss, grads, factors = af.value_and_grad(loss_fn, layout)(state.params, images, labels)
        return state.apply_gradients(grads=grads, factors=factors), loss

    losses = []
    for batch in batches:
        state, loss = train_step(state, *batch)
        losses.append(float(loss))
    return state, losses


train_with_adafisher = train

# %% [markdown]
# Besides the layout, only these lines differ:

# %%
sources = (inspect.getsource(f).splitlines() for f in (train_with_adamw, train_with_adafisher))
for line in difflib.ndiff(*sources):
    if line[0] in "-+":
        print(line)

# %% [markdown]
# ## Both train

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, train_fn in {"AdamW": train_with_adamw, "AdaFisher": train_with_adafisher}.items():
    state, losses = train_fn()
    axes.semilogy(losses, label=name, linewidth=1)
    loss = loss_fn(state.params, images, labels)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    print(f"{name:10} training loss {loss:.1e}, optimizer state {state_bytes:,} bytes")
axes.set(xlabel="step", ylabel="loss of the batch")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# AdamW's learning rate is no guide to AdaFisher's: sweep half-decades around `3e-2`. Both
# optimizers multiply the weight decay by the rate. So a larger rate needs a smaller `weight_decay`
# for the same effect.
#
# ## Do the factors arrive?
#
# A step without factors is an error. So is a step inside a wrapper that drops the factors
# ([optax.md](../../docs/optax.md) has a table).

# %%
grads = jax.grad(loss_fn)(state.params, images, labels)
try:
    state.apply_gradients(grads=grads)
except TypeError as error:
    print(error)

# %% [markdown]
# `factors=None` is allowed: the stored curvature stays as it is. The state's `ages` count such
# steps for each layer. With the chain above they are all zero.


# %%
@jax.jit
def keeping_step(state, images, labels):
    grads = jax.grad(loss_fn)(state.params, images, labels)
    return state.apply_gradients(grads=grads, factors=None)


def print_ages(name, state):
    factors, ages = (optax.tree.get(state.opt_state, field) for field in ("factors", "ages"))
    print(f"{name:20}", dict(zip(factors, ages.tolist(), strict=True)))


print_ages("with factors", state)
kept = state
for batch in batches[:3]:
    kept = keeping_step(kept, *batch)
print_ages("three steps without", kept)

# %% [markdown]
# ## Weight decay respects the mask
#
# With zero gradients, the step consists of the weight decay alone.

# %%
tx = af.adafisherw(1.0, layout, rule="centered", weight_decay=0.1, mask=mask)
nothing = jax.tree.map(jnp.zeros_like, params)
biased = jax.tree.map(lambda leaf: leaf + 1, params)
updates, _ = tx.update(nothing, tx.init(biased), biased, factors=None)
for leaf in ("kernel", "bias"):
    share = -updates["Dense_0"][leaf] / biased["Dense_0"][leaf]
    print(f"of a {leaf} {share.min():.3f} to {share.max():.3f} go")

# %% [markdown]
# ## Gradient accumulation
#
# `optax.MultiSteps` averages the gradients, but would use only the last micro-batch's factors.
# `af.accumulate` combines the gradients and the factors. The result equals that of the whole batch.

# %%
grad_fn = af.value_and_grad(loss_fn, layout)
batch = batches[0]
micro_batches = [array.reshape(4, BATCH // 4, *array.shape[1:]) for array in batch]
whole = jax.jit(grad_fn)(state.params, *batch)
parts = jax.jit(af.accumulate(grad_fn, layout))(state.params, *micro_batches)


def difference(one, other):
    return max(
        float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-30))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


for name, one, other in zip(("loss", "gradients", "factors"), whole, parts, strict=True):
    print(f"{name:10} differ by {difference(one, other):.0e} of the largest entry")
    assert difference(one, other) < 1e-3

# %% [markdown]
# ## A checkpoint contains everything
#
# The factors, the momentum and the counts are arrays of the state. The restored state equals the
# saved state bit for bit.

# %%
fresh = kept.replace(opt_state=kept.tx.init(params), params=params)
restored = fresh.from_bytes(flax.serialization.to_bytes(state))
same = jax.tree.all(jax.tree.map(np.array_equal, state, restored))
print("the same state:", same)
assert same

# %% [markdown]
# ## Read next
#
# - [choosing_a_rule.py](choosing_a_rule.py): the rules, and how to find a learning rate.
# - [optax.md](../../docs/optax.md): the wrappers of optax, with a recipe for each.
# - [micro_batches.md](../../docs/micro_batches.md): weights, masks, micro-batches of different
#   sizes.
# - [precision.md](../../docs/precision.md): bfloat16, float16 and loss scaling.
