# %% [markdown]
# # Many devices
#
# This notebook trains on eight devices, and gets the same result as on one. The devices are
# virtual, so it runs on any machine. Set the environment variables before JAX is imported.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import adafisher_jax as af

print(jax.devices())

# %% [markdown]
# ## A model, a loss, a step
#
# This part does not depend on the devices.

# %%
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def loss_fn(params, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16

STEPS, BATCH = 30, 64
rows = np.random.default_rng(0).choice(len(images), (STEPS, BATCH))
batches = list(zip(images[rows], labels[rows], strict=True))
params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]

layout = af.trace_layout(loss_fn, params, *batches[0])
tx = af.adafisher(3e-2, layout, rule="centered")
grad_fn = af.value_and_grad(loss_fn, layout)


@jax.jit
def train_step(params, opt_state, images, labels):
    loss, grads, factors = grad_fn(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
    return optax.apply_updates(params, updates), opt_state, loss


def train(step_fn, state, batches):
    losses = []
    for batch in batches:
        *state, loss = step_fn(*state, *batch)
        losses.append(float(loss))
    return state, losses


state = params, tx.init(params)
_, expected = train(train_step, state, batches)

# %% [markdown]
# ## Data parallelism: place the arrays
#
# Every device has a copy of the parameters and of the optimizer's state, and an eighth of the
# batch. The compiler adds the sums over devices, for the gradients and for the factors.

# %%
mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
placed_state = jax.device_put(state, everywhere)
placed_batches = jax.device_put(batches, split)

shards = placed_batches[0][0].addressable_shards
print(f"a batch of {placed_batches[0][0].shape} in {len(shards)} parts of {shards[0].data.shape}")

_, losses = train(train_step, placed_state, placed_batches)


# %% [markdown]
# The losses equal those of one device up to rounding. `"centered"` magnifies rounding: in a layer
# this narrow, whose inputs are mostly zero, the last losses agree in two or three digits.


# %%
def check(losses):
    apart = np.abs(np.subtract(losses, expected))
    for steps in (10, STEPS):
        print(f"in {steps} steps, losses differ by {np.max(apart[:steps]):.0e} at most")
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=5e-3)
    np.testing.assert_allclose(losses, expected, rtol=5e-2)


check(losses)

# %% [markdown]
# ## `shard_map`: take the mean inside the loss
#
# In `shard_map` your function sees an eighth of the batch. Average the loss over devices before it
# is differentiated. The gradients and factors are then those of the whole batch.

# %%
over_devices = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
)


def mean_loss(params, images, labels):
    return jax.lax.pmean(loss_fn(params, images, labels), "data")


mapped_grad_fn = over_devices(af.value_and_grad(mean_loss, layout))


@jax.jit
def mapped_step(params, opt_state, images, labels):
    loss, grads, factors = mapped_grad_fn(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
    return optax.apply_updates(params, updates), opt_state, loss


_, mapped_losses = train(mapped_step, placed_state, placed_batches)
check(mapped_losses)

# %% [markdown]
# ## Without that mean
#
# If each device averages the loss over its own examples, the gradients at the outputs are larger by
# the number of devices. The factor `s` is larger by the square of that number.


# %%
@jax.jit
@over_devices
def unaveraged(params, images, labels):
    _, grads, factors = grad_fn(params, images, labels)
    return grads, factors


_, plain_grads, plain_factors = jax.jit(grad_fn)(params, *batches[0])
grads, factors = unaveraged(placed_state[0], *placed_batches[0])

path = "layers_2"
bias, plain_bias = (np.linalg.norm(g[path]["bias"]) for g in (grads, plain_grads))
print(f"gradients are {bias / plain_bias:.4f} times as large")
for name in ("h", "s"):
    found, plain = (np.sum(getattr(f[path], name)) for f in (factors, plain_factors))
    print(f"{name} is {found / plain:.4f} times as large")

# %% [markdown]
# Divide the gradients by the number of devices, as for any optimizer. The factors need no change:
# `"paper"` and `"centered"` ignore the scale of `s` (`"official"` almost does), so their steps are
# the same.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(expected, color="0.8", linewidth=6, label="one device")
axes.plot(losses, label="eight, jit")
axes.plot(mapped_losses, "--", label="eight, shard_map")
axes.set(xlabel="step", ylabel="loss")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Read next
#
# - [devices.md](../../docs/devices.md): sharded parameters, several machines, and the communication
#   that factors add.
# - [../many_devices.py](../many_devices.py): the same in two processes, with sharded parameters.
# - [from_adamw.py](from_adamw.py): how to convert an existing training loop.
