# %% [markdown]
# # Choosing a rule
#
# A rule is the formula that turns the captured factors into a step. AdaFisher has three rules. This
# notebook trains a small network with each rule, at several learning rates and dampings, and with
# AdamW and SGD. Then it shows why the rules differ.

# %%
import functools
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits

import adafisher_jax as af
from adafisher_jax.diagnostics import landscape, pictures, report
from adafisher_jax.rules import make_rule

# %% [markdown]
# ## One task
#
# The task is an MLP on scikit-learn's digits: 300 steps of 64 examples, one seed, and the same
# warm-up and cosine schedule for all optimizers.

# %%
model = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(10)])


def loss_fn(params, images, labels):
    logits = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16

CHUNKS, CHUNK, BATCH = 30, 10, 64
STEPS = CHUNKS * CHUNK
rows = np.random.default_rng(0).choice(len(images), (CHUNKS, CHUNK, BATCH))
batches = images[rows], labels[rows]
start = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
layout = af.trace_layout(loss_fn, start, images[:BATCH], labels[:BATCH])
shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 10, STEPS)

# %% [markdown]
# The settings are arrays, so `jax.vmap` trains with all of them in parallel. Each rule is compiled
# once.


# %%
class Seen(NamedTuple):
    """What is recorded for each setting after each chunk of steps."""

    params: Any
    loss: jax.Array  # on the whole training set
    report: Any


def make_train(make_tx, look=lambda opt_state, **settings: {}):
    """Trains with arrays of peak learning rates and of settings for `make_tx`."""
    grad_fn = af.value_and_grad(loss_fn, layout)

    @jax.jit
    @jax.vmap
    def train(peak, settings):
        tx = make_tx(lambda step: peak * shape(step), **settings)
        tx = optax.with_extra_args_support(tx)

        def step(state, batch):
            params, opt_state = state
            _, grads, factors = grad_fn(params, *batch)
            updates, opt_state = tx.update(grads, opt_state, params, factors=factors)
            return (optax.apply_updates(params, updates), opt_state), None

        def chunk(state, batches):
            state, _ = jax.lax.scan(step, state, batches)
            params, opt_state = state
            return state, Seen(params, loss_fn(params, images, labels), look(opt_state, **settings))

        _, seen = jax.lax.scan(chunk, (start, tx.init(start)), batches)
        return seen

    return train


# %% [markdown]
# ## Learning rates and dampings
#
# | rule | divisor of the momentum |
# | --- | --- |
# | `"centered"` | the square root of the Fisher diagonal of centered inputs, plus `damping` |
# | `"paper"` | the Fisher diagonal, each factor scaled to [0, 1] by min-max, plus `damping` |
# | `"official"` | the arithmetic of the released code, which soon is almost a constant |
#
# `"centered"` and `"paper"` run with every pair of a rate and a damping. The other optimizers run
# with every rate.

# %%
RATES = 10.0 ** np.arange(-3.5, 0.1, 0.5)
DAMPINGS = np.array([1e-3, 1e-2, 1e-1, 1.0])
DEFAULTS = {rule: make_rule(rule).damping for rule in ("centered", "paper")}
peaks, dampings = np.meshgrid(RATES, DAMPINGS)


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


grids, runs = {}, {}
for rule, damping in DEFAULTS.items():
    make_tx = functools.partial(af.adafisher, layout=layout, rule=rule)
    train = make_train(make_tx, functools.partial(report, layout=layout, rule=rule))
    seen = jax.device_get(train(peaks.ravel(), {"damping": dampings.ravel()}))
    grids[rule] = jax.tree.map(lambda x: x.reshape(*peaks.shape, *x.shape[1:]), seen)
    runs[f"AdaFisher, {rule}"] = at(grids[rule], list(DAMPINGS).index(damping))

others = {
    "AdaFisher, official": functools.partial(af.adafisher, layout=layout, rule="official"),
    "AdamW": optax.adamw,
    "SGD": functools.partial(optax.sgd, momentum=0.9),
}
for name, make_tx in others.items():
    runs[name] = jax.device_get(make_train(make_tx)(RATES, {}))

# %% [markdown]
# At the default damping of each rule:


# %%
def best(losses):
    """The index of the lowest loss; losses that are not finite do not count."""
    return np.argmin(np.where(np.isfinite(losses), losses, np.inf))


chosen = {name: best(seen.loss[:, -1]) for name, seen in runs.items()}
for name, seen in runs.items():
    print(f"{name:20} best rate {RATES[chosen[name]]:.0e}, loss {seen.loss[chosen[name], -1]:.1e}")

steps = CHUNK * np.arange(1, CHUNKS + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, seen), colour in zip(runs.items(), pictures.COLOURS, strict=False):
    left.loglog(RATES, seen.loss[:, -1], "o-", color=colour, markersize=3)
    right.semilogy(steps, seen.loss[chosen[name]], color=colour, label=name)
left.set(xlabel="peak learning rate", ylabel="training loss", title="after the last step")
right.set(xlabel="step", title="each at its best rate")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Damping
#
# `"paper"` scales the factors `h` and `s` of each layer by min-max, so the smallest entry of each
# is exactly 0. The weights of that input or output are divided by `damping` alone. So the best rate
# depends on the damping. `"centered"` scales each factor to mean one, adds the damping under a
# square root, and divides by the root mean square of its steps. The white line joins the best
# rates.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
norm = LogNorm(min(np.nanmin(seen.loss[:, :, -1]) for seen in grids.values()), 3)
best_rates = {}
for axes, (rule, seen) in zip(panels, grids.items(), strict=True):
    losses = seen.loss[:, :, -1]
    best_rates[rule] = [best(row) for row in losses]
    x, y = np.log10(RATES), np.log10(DAMPINGS)
    shown = axes.pcolormesh(x, y, losses, norm=norm, cmap="viridis_r")
    axes.plot(x[best_rates[rule]], y, "w.-")
    axes.set(xlabel="log10 of the peak rate", title=f'"{rule}"', yticks=y)
    for damping, row, column in zip(DAMPINGS, losses, best_rates[rule], strict=True):
        rate, loss = RATES[column], row[column]
        print(f"{rule:9} damping {damping:<6g} best rate {rate:.0e}, loss {loss:.1e}")
panels[0].set(ylabel="log10 of the damping")
figure.colorbar(shown, ax=panels, label="training loss, at most 3")
plt.show()

# %% [markdown]
# The live report shows the reason: how many entries of a layer have more curvature than damping?

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for axes, (rule, seen) in zip(panels, grids.items(), strict=True):
    share = np.mean([layer.above_damping for layer in seen.report.values()], 0)
    for i, damping in enumerate(DAMPINGS):
        colour = plt.colormaps["viridis"](i / len(DAMPINGS))
        axes.plot(steps, share[i, best_rates[rule][i]], color=colour, label=f"{damping:g}")
    axes.set(xlabel="step", title=f'"{rule}"')
panels[0].set(ylabel="share above the damping", ylim=(-0.03, 1.03))
panels[1].legend(title="damping", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Where the share is near 0, `"paper"` is momentum SGD with the learning rate divided by the
# damping. Where the share is near 1, the damping matters only for the smallest entries. But under
# `"paper"` the step of the smallest entries is up to 1 / damping times that of the largest.
#
# ## Curvature over training
#
# The plots show the numbers that multiply the momentum in each layer, before the learning rate, at
# each rule's best rate and default damping. The line is the median. The band contains nine tenths
# of a weight's entries.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axes, rule in zip(panels, DEFAULTS, strict=True):
    name = f"AdaFisher, {rule}"
    reports = [(step, at(runs[name].report, chosen[name], i)) for i, step in enumerate(steps)]
    pictures.over_training(axes, reports, "rate_median")
    axes.set(title=f'"{rule}"')
plt.show()

# %% [markdown]
# ## Five paths through the loss
#
# All runs start at the same point. The left plot shows the plane of the two directions along which
# the runs vary most. Movement outside of the plane is not visible. The right plot shows the three
# runs that stayed closest to the start, in a plane of their own.


# %%
def distance(name):
    end = at(runs[name].params, chosen[name], -1)
    return optax.tree.norm(jax.tree.map(np.subtract, end, start)).item()


def draw(axes, names):
    ways = {
        name: [start, *(at(runs[name].params, chosen[name], i) for i in range(CHUNKS))]
        for name in names
    }
    plane = landscape.principal_plane(ways)
    paths = {name: landscape.coordinates(plane, way) for name, way in ways.items()}
    xs, ys = landscape.frame(paths.values())
    losses = landscape.evaluate(loss_fn, plane, xs, ys, images, labels)
    pictures.trajectories(axes, plane, losses, xs, ys, paths)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
by_distance = sorted(runs, key=distance)
draw(left, by_distance)
draw(right, by_distance[:3])
plt.show()

for name in by_distance:
    print(f"{name:20} ends {distance(name):.1f} from the start")

# %% [markdown]
# ## Which rule?
#
# To train a model, use `"centered"`; sweep half-decades of its rate and keep its damping. To
# compare with the paper, use `"paper"` or `"official"`, and sweep rate and damping together. Note:
# one small task and one seed do not decide what is best for your model.
#
# ## Read next
#
# - [is_your_model_diagonal.py](is_your_model_diagonal.py): how good the diagonal is.
# - [choosing.md](../../docs/choosing.md): the rules and settings in brief.
# - [study.md](../../docs/study.md): more tasks and optimizers, with several seeds.
# - [training.md](../../docs/training.md): programs that train larger models with these optimizers.
