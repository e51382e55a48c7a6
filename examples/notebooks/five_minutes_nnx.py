# %% [markdown]
# # Five minutes with AdaFisher, in NNX
#
# Train a classifier of handwritten digits, look at the curvature that the optimizer uses, and
# compare with AdamW. [five_minutes.py](five_minutes.py) is the same in Linen.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adafisher_jax as af
from adafisher_jax import diagnostics

# %% [markdown]
# ## A model, a loss, batches
#
# This part does not depend on the optimizer. The model has running statistics and dropout. The
# gradient function has to update both.


# %%
class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.top = nnx.Linear(128, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)
        self.sharpness = nnx.Param(jnp.ones(()))

    def __call__(self, images):
        x = nnx.relu(self.norm(self.hidden(images)))
        x = self.dropout(nnx.relu(self.top(x)))
        return self.sharpness * self.logits(x)


def loss_fn(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=500, random_state=0)

STEPS, BATCH = 300, 64
rows = np.random.default_rng(0).choice(len(train_x), (STEPS, BATCH))
batches = list(zip(train_x[rows], train_y[rows], strict=True))
model = MLP(nnx.Rngs(0))

# %% [markdown]
# ## The layout: which layers are there?
#
# One abstract trace of the loss finds the layers. Read the table once for each new model. It lists
# every parameter. `sharpness` does not belong to a layer: the table gives the reason, and the
# optimizer trains this parameter without curvature.

# %%
layout = af.nnx.trace_layout(loss_fn, model, *batches[0])
print(layout)

# %% [markdown]
# ## The factors: what is captured?
#
# `af.nnx.value_and_grad` replaces `nnx.value_and_grad`. The same backward pass also returns the
# *factors* of each layer: the mean squares of its inputs (`h`) and of the loss's gradients at its
# outputs (`s`). The means are over *rows*. Here a row is an example; in sequences and convolutions
# it is a position of an example. Like Flax's function, it also updates what the loss changes in the
# model.

# %%
grad_fn = af.nnx.value_and_grad(loss_fn, layout)
before = model.norm.mean[...].sum()
loss, grads, factors = nnx.jit(grad_fn)(model, *batches[0])
for path, factor in factors.items():
    print(f"{path:7} h {factor.h.shape!s:9} s {factor.s.shape!s:9} over {factor.rows:.0f} rows")
print(f"running means, summed: {before:.3f} before, {model.norm.mean[...].sum():.3f} after")

# %% [markdown]
# The product `h × s` has the shape of the weight. It is the diagonal of the layer's Fisher matrix,
# if inputs and output gradients are independent. The product is never stored. In the first layer,
# `h` can be drawn as an image. Pixels that are always black have no curvature, so the optimizer
# adds a constant, the damping.

# %%
first, last = factors["hidden"], factors["logits"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
left.imshow(first.h.reshape(8, 8), cmap="magma")
left.set(title="h of hidden", xlabel="pixel", xticks=[], yticks=[])
middle.bar(range(10), last.s.ravel() / last.s.sum())
middle.set(title="s of logits", xlabel="class", ylabel="share", xticks=range(10))
right.imshow(first.h * first.s, cmap="magma", aspect="auto")
right.set(title="h × s of hidden", xlabel="output", ylabel="input")
plt.show()

# %% [markdown]
# ## Two train steps
#
# There is one difference: `optimizer.update` takes the factors with the gradients. Create each
# transformation once: with a new one, even an equal one, `nnx.jit` compiles the step again.


# %%
def make(tx):
    model = MLP(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-2, STEPS // 20, STEPS)
adafisher = af.adafisher(schedule, layout, rule="centered")


@nnx.jit
def adafisher_step(model, optimizer, images, labels):
    loss, grads, factors = grad_fn(model, images, labels)
    optimizer.update(model, grads, factors=factors)
    return loss


adamw = optax.adamw(schedule)


@nnx.jit
def adamw_step(model, optimizer, images, labels):
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


# %%
@nnx.jit
def evaluate(model):
    predicted = model(test_x).argmax(-1)
    return loss_fn(model, train_x, train_y), (predicted == test_y).mean()


def summary(model, optimizer):
    model.eval()
    loss, accuracy = evaluate(model)
    model.train()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(optimizer)))
    return f"training loss {loss:.1e}, test accuracy {accuracy:.3f}, state {state_bytes:,} bytes"


figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
runs = {"AdaFisher, centered": (adafisher_step, adafisher), "AdamW": (adamw_step, adamw)}
for name, (step_fn, tx) in runs.items():
    model, optimizer = make(tx)
    losses = [float(step_fn(model, optimizer, *batch)) for batch in batches]
    print(f"{name:20} {summary(model, optimizer)}")
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
@nnx.jit
def watched_step(model, optimizer, images, labels):
    _, grads, factors = grad_fn(model, images, labels)
    optimizer.update(model, grads, factors=factors)
    return diagnostics.report(optimizer, layout, rule="centered")


model, optimizer = make(adafisher)
for batch in batches[:100]:
    found = watched_step(model, optimizer, *batch)
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
# An update with `factors=None` uses the stored averages. To save time, capture the curvature at
# some steps only. [five_minutes.py](five_minutes.py) has times. Here they would show little: a step
# this small spends most of its time in `nnx.jit`, which takes the model apart.


# %%
@nnx.jit
def keeping_step(model, optimizer, images, labels):
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads, factors=None)
    return loss


def train_refreshing(every):
    model, optimizer = make(adafisher)
    for step, batch in enumerate(batches):
        step_fn = keeping_step if step % every else adafisher_step
        step_fn(model, optimizer, *batch)
    return model, optimizer


for every in (1, 5, 25):
    print(f"every {every:2} steps: {summary(*train_refreshing(every))}")

# %% [markdown]
# ## Read next
#
# - [choosing_a_rule.py](choosing_a_rule.py): the three rules, their learning rates and dampings.
# - [is_your_model_diagonal.py](is_your_model_diagonal.py): what the diagonal factors leave out.
# - [refreshing.md](../../docs/refreshing.md): one compiled step that refreshes by a schedule.
# - [checkpoints.md](../../docs/checkpoints.md): saving model and optimizer together.
