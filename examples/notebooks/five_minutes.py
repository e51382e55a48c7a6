# %% [markdown]
# # Five minutes with AdaFisher, in Linen
#
# Train a classifier of handwritten digits, look at the curvature that the optimizer uses, and
# compare with AdamW. [five_minutes_nnx.py](five_minutes_nnx.py) is the same in NNX.

# %%
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adafisher_jax as af
from adafisher_jax import diagnostics

# %% [markdown]
# ## A model, a loss, batches
#
# This part does not depend on the optimizer.


# %%
class MLP(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(128)(images))
        x = nn.relu(nn.Dense(64)(nn.LayerNorm()(x)))
        sharpness = self.param("sharpness", nn.initializers.ones, ())
        return sharpness * nn.Dense(10)(x)


model = MLP()


def loss_fn(params, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=500, random_state=0)

STEPS, BATCH = 300, 64
rows = np.random.default_rng(0).choice(len(train_x), (STEPS, BATCH))
batches = list(zip(train_x[rows], train_y[rows], strict=True))
params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]

# %% [markdown]
# ## The layout: which layers are there?
#
# One abstract trace of the loss finds the layers. Read the table once for each new model. It lists
# every parameter. `sharpness` does not belong to a layer: the table gives the reason, and the
# optimizer trains this parameter without curvature.

# %%
layout = af.trace_layout(loss_fn, params, *batches[0])
print(layout)

# %% [markdown]
# ## The factors: what is captured?
#
# `af.value_and_grad` replaces `jax.value_and_grad`. The same backward pass also returns the
# *factors* of each layer: the mean squares of its inputs (`h`) and of the loss's gradients at its
# outputs (`s`). The means are over *rows*. Here a row is an example; in sequences and convolutions
# it is a position of an example.

# %%
grad_fn = jax.jit(af.value_and_grad(loss_fn, layout))
loss, grads, factors = grad_fn(params, *batches[0])
for path, factor in factors.items():
    print(f"{path:12} h {factor.h.shape!s:9} s {factor.s.shape!s:9} over {factor.rows:.0f} rows")

# %% [markdown]
# The product `h × s` has the shape of the weight. It is the diagonal of the layer's Fisher matrix,
# if inputs and output gradients are independent. The product is never stored. In the first layer,
# `h` can be drawn as an image. Pixels that are always black have no curvature, so the optimizer
# adds a constant, the damping.

# %%
first, last = factors["Dense_0"], factors["Dense_2"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
left.imshow(first.h.reshape(8, 8), cmap="magma")
left.set(title="h of Dense_0", xlabel="pixel", xticks=[], yticks=[])
middle.bar(range(10), last.s.ravel() / last.s.sum())
middle.set(title="s of Dense_2", xlabel="class", ylabel="share", xticks=range(10))
right.imshow(first.h * first.s, cmap="magma", aspect="auto")
right.set(title="h × s of Dense_0", xlabel="output", ylabel="input")
plt.show()

# %% [markdown]
# ## Two train steps
#
# There is one difference: `tx.update` takes the factors with the gradients.

# %%
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-2, STEPS // 20, STEPS)
tx = af.adafisher(schedule, layout, rule="centered")


@jax.jit
def adafisher_step(params, opt_state, images, labels):
    loss, grads, factors = grad_fn(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
    return optax.apply_updates(params, updates), opt_state, loss


adamw = optax.adamw(schedule)


@jax.jit
def adamw_step(params, opt_state, images, labels):
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, opt_state = adamw.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


# %%
def train(step_fn, opt_state):
    state, losses = (params, opt_state), []
    for batch in batches:
        *state, loss = step_fn(*state, *batch)
        losses.append(float(loss))
    return state, losses


@jax.jit
def evaluate(params):
    predicted = model.apply({"params": params}, test_x).argmax(-1)
    return loss_fn(params, train_x, train_y), (predicted == test_y).mean()


def summary(state):
    trained, opt_state = state
    loss, accuracy = evaluate(trained)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    return f"training loss {loss:.1e}, test accuracy {accuracy:.3f}, state {state_bytes:,} bytes"


figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
runs = {"AdaFisher, centered": (adafisher_step, tx), "AdamW": (adamw_step, adamw)}
for name, (step_fn, transformation) in runs.items():
    state, losses = train(step_fn, transformation.init(params))
    print(f"{name:20} {summary(state)}")
    axes.semilogy(losses, label=name, linewidth=1)
axes.set(xlabel="step", ylabel="loss of the batch")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Both runs use the same learning rate. Sweep the rate of each optimizer before you compare them, as
# [choosing_a_rule.py](choosing_a_rule.py) does. The size of the state does not depend on the rate.
# AdaFisher stores the momentum and a few vectors for each layer; AdamW stores two arrays of every
# weight's size.
#
# ## The live report: what does the optimizer do?
#
# `diagnostics.report` reads the optimizer's state inside the jitted step. It returns a few scalars
# per layer.


# %%
@jax.jit
def watched_step(params, opt_state, images, labels):
    _, grads, factors = grad_fn(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
    found = diagnostics.report(opt_state, layout, rule="centered", params=params, updates=updates)
    return optax.apply_updates(params, updates), opt_state, found


state = params, tx.init(params)
for batch in batches[:100]:
    *state, found = watched_step(*state, *batch)
print(diagnostics.table(found))

# %% [markdown]
# `above damping` is the share of a weight's entries whose curvature exceeds the damping. The rates
# are the numbers that multiply the momentum, before the learning rate. If `age` grows, no factors
# arrive. `diagnostics.scalars` flattens the report for a logger:

# %%
for name, value in list(diagnostics.scalars(found).items())[:3]:
    print(f"{name:24} {value:.3g}")


# %% [markdown]
# ## Refreshing every few steps
#
# A step with `factors=None` uses the stored averages. To save time, capture the curvature at some
# steps only.


# %%
@jax.jit
def keeping_step(params, opt_state, images, labels):
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params, factors=None)
    return optax.apply_updates(params, updates), opt_state, loss


def train_refreshing(every):
    state = params, tx.init(params)
    for step, batch in enumerate(batches):
        step_fn = keeping_step if step % every else adafisher_step
        *state, _ = step_fn(*state, *batch)
    return jax.block_until_ready(state)


train_refreshing(STEPS)  # compiles
for every in (1, 5, 25):
    start = time.perf_counter()
    state = train_refreshing(every)
    milliseconds = 1e3 * (time.perf_counter() - start) / STEPS
    print(f"every {every:2} steps: {summary(state)}, {milliseconds:.2f} ms a step")

# %% [markdown]
# ## Read next
#
# - [choosing_a_rule.py](choosing_a_rule.py): the three rules, their learning rates and dampings.
# - [from_adamw.py](from_adamw.py): what changes in an existing training loop.
# - [refreshing.md](../../docs/refreshing.md): one compiled step that refreshes by a schedule.
# - [layers.md](../../docs/layers.md): which layers and transforms are covered.
# - [diagnostics.md](../../docs/diagnostics.md): the meaning of each column of the report.
