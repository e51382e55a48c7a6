# %% [markdown]
# # Is your model diagonal?
#
# Let $\bar h$ be the inputs of a layer (with a 1 appended for the bias), and $s$ the gradients at
# its outputs. The layer has two curvature matrices, its factors $H = E[\bar h \bar h^T]$ and
# $S = E[s s^T]$. AdaFisher stores only their diagonals, since the paper reports that the factors
# concentrate there. This notebook tests that claim. It trains two small models and computes their
# full factors. Replace the models with your own.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import adafisher_jax as af
from adafisher_jax import diagnostics
from adafisher_jax.diagnostics import pictures

# %% [markdown]
# ## A convolutional network


# %%
class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        x = nn.relu(nn.Conv(24, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cnn_loss(params, images, labels):
    logits = CNN().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


STEPS, BATCH = 200, 32
random = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
rows = random.choice(len(images), (STEPS, BATCH))
cnn_batches = list(zip(images[rows], labels[rows], strict=True))

# %% [markdown]
# ## A transformer, on a formal language
#
# The transformer reads formulas, character by character. A formula is a letter, or two formulas in
# brackets with an operator between them. Some letters are rarer than others.


# %%
def formula(depth=0):
    if random.random() < depth / 4:
        return str(random.choice(list("abcdef"), p=[0.4, 0.25, 0.15, 0.1, 0.07, 0.03]))
    return f"({formula(depth + 1)}{random.choice(list('+-*'))}{formula(depth + 1)})"


LENGTH, WIDTH, HEADS = 32, 16, 4
text = " ".join(formula() for _ in range(1000))
characters = sorted(set(text))
tokens = np.array([characters.index(c) for c in text])
starts = random.choice(len(tokens) - LENGTH, (STEPS, BATCH))
text_batches = [(tokens[at[:, None] + np.arange(LENGTH + 1)],) for at in starts]
print(text[:80])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        positions = nn.Embed(LENGTH, WIDTH, name="position")(jnp.arange(LENGTH)[None])
        x = nn.Embed(len(characters), WIDTH, name="character")(tokens) + positions
        attention = nn.SelfAttention(HEADS, name="attention")
        x = x + attention(nn.LayerNorm()(x), nn.make_causal_mask(tokens))
        y = nn.Dense(3 * WIDTH, name="up")(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH, name="down")(nn.gelu(y))
        return nn.Dense(len(characters), name="logits")(nn.LayerNorm()(x))


def text_loss(params, tokens):
    logits = Transformer().apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# %% [markdown]
# ## Train both
#
# The optimizer is Adam, so that no result depends on AdaFisher.


# %%
def train(loss_fn, params, batches):
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    state, losses = (params, tx.init(params)), []
    for batch in batches:
        *state, loss = step(*state, batch)
        losses.append(float(loss))
    print(f"loss from {losses[0]:.2f} to {np.mean(losses[-20:]):.2f}")
    return state[0]


key = jax.random.key(0)
cnn_start = jax.jit(CNN().init)(key, images[:1])["params"]
text_start = jax.jit(Transformer().init)(key, tokens[None, :LENGTH])["params"]
cnn_params = train(cnn_loss, cnn_start, cnn_batches)
text_params = train(text_loss, text_start, text_batches)

# %% [markdown]
# ## The full factors, over many batches
#
# The inputs of an embedding are one-hot, so its `H` is diagonal by construction. The notebook
# therefore examines the layers with a bias.


# %%
def whole_factors(loss_fn, params, batches):
    layout = af.trace_layout(loss_fn, params, *batches[0])
    asked = [layer.path for layer in layout.layers if layer.bias and layer.kind != "norm"]
    factors_fn = jax.jit(diagnostics.full_factors(loss_fn, layout, asked))
    return layout, diagnostics.pool(factors_fn(params, *batch) for batch in batches)


cnn_layout, cnn_factors = whole_factors(cnn_loss, cnn_params, cnn_batches[:30])
text_layout, text_factors = whole_factors(text_loss, text_params, text_batches[:30])
factors = cnn_factors | text_factors


@jax.jit
def matrices(factor):
    """The matrices, each divided by the mean of its diagonal: the mean eigenvalue is one."""
    mean = factor.h[:-1, -1]
    covariance = factor.h[:-1, :-1] - jnp.outer(mean, mean)
    found = {"H": factor.h, "H centered": covariance, "S": factor.s}
    return {name: matrix / jnp.mean(jnp.diagonal(matrix)) for name, matrix in found.items()}


found = {path: matrices(factor) for path, factor in factors.items()}

# %% [markdown]
# ## How much is on the diagonal?
#
# The table shows the share of the diagonal in the sum of all squared entries. The share is 100% for
# a diagonal matrix, and 1 / n if all entries are equal. With the mean $\mu$ subtracted from the
# inputs, $H$ becomes the covariance $E[\bar h \bar h^T] - \mu \mu^T$. The rule `"centered"` uses
# the diagonal of that covariance.

# %%
share = jax.jit(diagnostics.diagonal_energy)
shares = {path: [share(m).item() for m in layer.values()] for path, layer in found.items()}

print(f"{'on the diagonal':18}{'H':>6}{'H centered':>12}{'S':>6}    1 / n of H, of S")
for path, (h, covariance, s) in shares.items():
    n_h, n_s = len(factors[path].h), len(factors[path].s)
    print(f"{path:18}{h:6.0%}{covariance:12.0%}{s:6.0%}{1 / n_h:14.0%}{1 / n_s:6.0%}")

for name, column in zip(("H", "H centered", "S"), zip(*shares.values(), strict=True), strict=True):
    most = sum(share > 0.5 for share in column)
    print(
        f"{name}: more than half in {most} of {len(column)} layers, median {np.median(column):.0%}"
    )

# %% [markdown]
# ## Two layers in full
#
# The colours are logarithmic, for positive and negative entries.

# %%
SHOWN = ("Conv_1", "up")


def panels():
    """A row of axes for each layer shown, with the matrix to draw there."""
    figure = plt.figure(figsize=(11, 6.8), layout="constrained")
    for path, row in zip(SHOWN, figure.subfigures(len(SHOWN)), strict=True):
        row.suptitle(path)
        for axes, (name, matrix) in zip(row.subplots(1, 3), found[path].items(), strict=True):
            axes.set_title(name, loc="left", fontsize="small")
            yield axes, matrix


for axes, matrix in panels():
    pictures.heat_map(axes, matrix)
plt.show()

# %% [markdown]
# After a ReLU no input is negative, so the mean of every product of two inputs is positive: $H$
# contains the full matrix $\mu \mu^T$. Centering removes $\mu \mu^T$, and leaves the correlations
# between inputs. After a layer norm, as in `up`, the mean is small, so centering changes little.
#
# ## Gershgorin's discs
#
# Every eigenvalue lies in a disc around a diagonal entry. The radius of the disc is the sum of the
# absolute values of the other entries in the row. If the discs were small and apart, the diagonal
# would nearly contain the eigenvalues.

# %%
for axes, matrix in panels():
    pictures.discs(axes, matrix)
plt.show()

for path in SHOWN:
    for name, matrix in found[path].items():
        low, high = diagnostics.gershgorin(matrix).bounds
        largest = diagnostics.eigenvalues(matrix)[0]
        print(
            f"{path:7} {name:10} discs from {low:5.1f} to {high:5.1f}, eigenvalues to {largest:.1f}"
        )

# %% [markdown]
# ## Eigenvalues, and noise
#
# The Kaiser rule selects the eigenvalues above the average, which is 1 here. The grey line shows
# the diagonal entries: for a diagonal matrix they are the eigenvalues. The second spectrum is that
# of the matrix with noise off the diagonal, of a hundredth of the diagonal's mean. It shows how
# stable the eigenvalues are.


# %%
@jax.jit
def with_noise(matrix):
    return diagnostics.add_noise(matrix, 0.01, key)


def most_moved(matrix):
    """The largest relative change by noise among the eigenvalues that the Kaiser rule selects."""
    before, after = (np.asarray(diagnostics.eigenvalues(m)) for m in (matrix, with_noise(matrix)))
    kept = np.asarray(diagnostics.kaiser(before))
    return np.max(np.abs(after / before - 1)[kept])


for axes, matrix in panels():
    pictures.eigenvalues(axes, matrix, with_noise(matrix))
    diagonal = np.sort(np.diagonal(matrix))[::-1]
    axes.plot(range(1, len(matrix) + 1), diagonal, color="0.6", zorder=0)
plt.show()

for path in SHOWN:
    moved = {name: f"{most_moved(matrix):.1%}" for name, matrix in found[path].items()}
    print(f"kept eigenvalues of {path} move by up to", moved)

# %% [markdown]
# The noise hardly changes the leading eigenvalues, but it changes the small ones. The leading
# eigenvalues also differ from the diagonal entries: a few directions contain most of the curvature,
# and each of them mixes several inputs.
#
# ## Fourier spectrum and signal-to-noise ratio
#
# In the spectrum of a diagonal matrix, a line crosses the middle. Smooth structure gathers in the
# middle, and periodic structure makes a grid. The signal-to-noise ratio compares the diagonal with
# the entries above it. 0 dB means that both have the same sum of squares.

# %%
for axes, matrix in panels():
    pictures.fourier(axes, matrix)
plt.show()

# %% [markdown]
# ## Does it matter for a step?
#
# For a small layer, the exact empirical Fisher matrix can be built from the gradient of each
# example. The table compares three steps with the damped step of that matrix: the gradient itself,
# the step of the diagonal factors, and the step of the full factors. The numbers are angles in
# degrees.

# %%
some_text = np.concatenate([batch for (batch,) in text_batches[:8]])
of_cnn, of_text = ("Conv_0", "Dense_1"), ("attention/out", "up")
compare_cnn = jax.jit(diagnostics.compare_steps(cnn_loss, cnn_layout, of_cnn))
compare_text = jax.jit(diagnostics.compare_steps(text_loss, text_layout, of_text))
steps = compare_cnn(cnn_params, images[:256], labels[:256]) | compare_text(text_params, some_text)

print(f"{'angle to the exact step':26}{'gradient':>9}{'diagonal':>10}{'Kronecker':>11}")
for path, one in steps.items():
    print(f"{path:24}" + "".join(f"{deviation.angle:>9.0f}°" for deviation in one))
medians = np.median([[deviation.angle for deviation in one] for one in steps.values()], 0)
print(f"{'median':24}" + "".join(f"{angle:>9.0f}°" for angle in medians))

# %% [markdown]
# ## So, is it diagonal?

# %%
for model, paths in {"convolutional": cnn_factors, "transformer": text_factors}.items():
    h, covariance, s = np.median([shares[path] for path in paths], 0)
    print(
        f"{model:14} on the diagonal: H {h:.0%}, H centered {covariance:.0%}, S {s:.0%} (medians)"
    )

# %% [markdown]
# Not in these models. In most layers, most of the squares of $H$ are off the diagonal. Centering
# helps where inputs come from a ReLU, but does not make $H$ diagonal. After a layer norm it changes
# little. $S$ is closer to diagonal in the convolutional network. The step of the diagonal factors
# is about as far from the exact step as the gradient is. The step of the full factors is closer. So
# if AdaFisher trains such models well, diagonal factors are not the reason. The diagonals do
# contain the scale of each input and output. And the rule `"centered"` removes the largest part off
# the diagonal, the mean.
#
# ## Read next
#
# - [choosing_a_rule.py](choosing_a_rule.py): what the rules do in training.
# - [diagnostics.md](../../docs/diagnostics.md): these functions, and how to read them.
# - [layers.md](../../docs/layers.md): the factors of each kind of layer.
