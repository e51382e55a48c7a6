"""Checkpoints: a run that stopped and went on is the run that never stopped."""

import functools
import itertools
import warnings

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adafisher_jax as af
from tests.support.every_rule import every_rule

STEPS, EVERY = 12, 3
RNG = np.random.default_rng(0)
BATCHES = jnp.asarray(RNG.normal(size=(STEPS, 6, 3)), jnp.float32)


class Net(nn.Module):
    """Layers of each shape of factors: two of their own, a stack and a normalization."""

    hidden: int = 4
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.hidden)(x))
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(2)(nn.LayerNorm()(x) if self.norm else x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(x.shape[-1])(x)), None


def loss_of(model):
    return lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x) - 1))


@functools.cache
def layout_of(model):
    return af.trace_layout(loss_of(model), params_of(model), BATCHES[0])


def params_of(model):
    return model.init(jax.random.key(0), BATCHES[0])["params"]


def create(rule="centered", model=Net(), layout=None):  # noqa: B008
    """A new state, with a new optimizer."""
    rate = 0.03 if rule == "centered" else 3e-5
    schedule = optax.linear_schedule(rate, rate / 10, STEPS)
    tx = af.adafisherw(schedule, layout or layout_of(model), rule=rule)
    state = af.TrainState.create(apply_fn=model.apply, params=params_of(model), tx=tx)
    return state.replace(step=jnp.zeros([], jnp.int32))


@jax.jit
def train_step(state, x):
    """Refreshes the curvature at every third step."""
    loss_fn = loss_of(Net())

    def with_factors(state):
        _, grads, factors = af.value_and_grad(loss_fn, layout_of(Net()))(state.params, x)
        return state.apply_gradients(grads=grads, factors=factors)

    def without(state):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, x), factors=None)

    return jax.lax.cond(state.step % EVERY == 0, with_factors, without, state)


@functools.cache
def run(rule):
    """The states before each step of a run that never stops, and after the last."""
    states = [create(rule)]
    for x in BATCHES:
        states.append(train_step(states[-1], x))
    return states


def go_on(state, stopped_at):
    for x in BATCHES[stopped_at:]:
        state = train_step(state, x)
    return state


def arrays(state):
    return state.step, state.params, state.opt_state


def identical(a, b):
    a, b = arrays(a), arrays(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@every_rule
def test_the_run_refreshes_and_learns(rule):
    """Or the tests below would compare nothing."""
    states = run(rule)
    slots = [np.ravel(state.opt_state[0].slots["Dense_0"])[0] for state in states]
    changed = [i for i in range(STEPS) if slots[i] != slots[i + 1]]
    assert changed == [0, 3, 6, 9]
    losses = [loss_of(Net())(state.params, BATCHES[0]) for state in states]
    assert all(after < before for before, after in itertools.pairwise(losses))


# Flax's bytes.


@every_rule
def test_flax_serialization_is_bit_exact(rule):
    for state in run(rule)[:: EVERY + 1]:
        encoded = flax.serialization.to_bytes(state)
        identical(flax.serialization.from_bytes(run(rule)[0], encoded), state)
        identical(run(rule)[0].from_bytes(encoded), state)


@pytest.mark.parametrize("stopped_at", range(STEPS))
@every_rule
def test_a_run_stopped_at_any_step_ends_as_one_that_never_stopped(rule, stopped_at):
    states = run(rule)
    encoded = flax.serialization.to_bytes(states[stopped_at])
    identical(go_on(states[0].from_bytes(encoded), stopped_at), states[-1])


@pytest.mark.slow
def test_a_new_process_goes_on_from_bytes():
    """With its own layout, optimizer and compiled step."""
    rule = "centered"
    layout = af.trace_layout(loss_of(Net()), params_of(Net()), BATCHES[0])
    assert layout is not layout_of(Net())
    encoded = flax.serialization.to_bytes(run(rule)[4])
    identical(go_on(create(rule, layout=layout).from_bytes(encoded), 4), run(rule)[-1])


# Another model, layout or rule.


def without_layer(layout, path):
    kept = [layer.path for layer in layout.layers if layer.path != path]
    assert len(kept) == len(layout.layers) - 1
    return layout.only(kept)


OTHERS = {
    "wider": (lambda: create(model=Net(5)), "Dense_0"),
    "one layer less": (lambda: create(model=Net(norm=False)), "LayerNorm_0"),
    "layout": (lambda: create(layout=without_layer(layout_of(Net()), "Dense_1")), "Dense_1"),
    "rule": (lambda: create("paper"), "(scales|ranges)"),
}
any_other = pytest.mark.parametrize(("other", "path"), OTHERS.values(), ids=OTHERS)


@pytest.mark.parametrize("way", ["into the other", "from the other"])
@any_other
def test_restoring_bytes_of_another_model_names_the_first_path_that_differs(other, path, way):
    ours, other = create(), other()
    into, encoded = (other, ours) if way == "into the other" else (ours, other)
    with pytest.raises(ValueError, match=f"another model, layout or rule: '[^']*{path}[^']*'"):
        into.from_bytes(flax.serialization.to_bytes(encoded))


@any_other
def test_updating_another_models_state_names_the_first_path_that_differs(other, path):
    """However it got there, and before anything runs."""
    ours, other = create(), other()
    path = path.removeprefix("params/")
    update = functools.partial(ours.tx.update, factors=None)
    with pytest.raises(ValueError, match=f"another model, layout or rule: '[^']*{path}[^']*'"):
        jax.eval_shape(update, ours.params, other.opt_state, ours.params)


def test_a_state_of_nothing_it_knows():
    ours = create()
    with pytest.raises(ValueError, match="'count' is missing, wanted shape"):
        ours.tx.update(ours.params, ({}, *ours.opt_state[1:]), ours.params, factors=None)


def test_a_state_with_each_layer_apart_is_refused():
    """As they were stored once."""
    ours = create()
    state, *others = ours.opt_state
    apart = state._replace(factors=af.diagnostics.averages(state, layout_of(Net())))
    with pytest.raises(ValueError, match=r"another model, layout or rule: '[^']*factors/"):
        ours.tx.update(ours.params, (apart, *others), ours.params, factors=None)


# Orbax.


@pytest.fixture
def ocp():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        return pytest.importorskip("orbax.checkpoint")


@every_rule
def test_orbax_is_bit_exact_and_a_run_goes_on_from_it(rule, ocp, tmp_path):
    stops = (1, 5, 9)
    states = run(rule)
    with ocp.CheckpointManager(tmp_path) as manager:
        for stop in stops:
            manager.save(stop, args=ocp.args.StandardSave(states[stop]))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == stops[-1]
        for stop in stops:
            restored = manager.restore(stop, args=ocp.args.StandardRestore(states[0]))
            identical(restored, states[stop])
            identical(go_on(restored, stop), states[-1])


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "wider"])
def test_orbax_names_the_paths_of_another_models_state(other, ocp, tmp_path):
    make, path = OTHERS[other]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", create())
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=rf"opt_state\[0\]\.\S*{path}"):
            checkpointer.restore(tmp_path / "one", make())


# Orbax reads arrays concurrently; after an error, the reads that are still under way report to
# an event loop that is closed. So what fails while it is read is a single array in these tests.
def one_array(state):
    return {"s": state.opt_state[0].factors["Dense_0"].s}


def test_orbax_keeps_a_state_without_layers(ocp, tmp_path):
    tx = af.adafisher(0.1, None, rule="paper")
    params = {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))


def test_orbax_refuses_another_shape(ocp, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", one_array(create()))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=r"\(1, 1, 5\) is not compatible .* \(1, 1, 4\)"):
            checkpointer.restore(tmp_path / "one", one_array(create(model=Net(5))))


@pytest.fixture
def saved(ocp, tmp_path):
    """A folder with the checkpoint of step 3, and what saves one there."""

    def save(step):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(step), one_array(run("centered")[step]))

    save(3)
    return tmp_path, save


def test_a_preempted_save_leaves_the_checkpoint_before_it(ocp, saved, monkeypatch):
    """Orbax writes beside a checkpoint's place, and moves what is whole there."""
    folder, save = saved

    def die(*_):
        raise InterruptedError("preempted")

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", die)
        with pytest.raises(InterruptedError, match="preempted"):
            save(4)
    assert any(path.name.startswith("4.") for path in folder.iterdir())
    with ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        assert manager.all_steps() == [3]
        save(4)  # again, and whole
        manager.reload()
        assert manager.latest_step() == 4


@pytest.mark.parametrize("size", [0, 20])
def test_a_torn_orbax_checkpoint_is_an_error(size, ocp, saved):
    """As where a copy of one was cut short."""
    folder, _ = saved
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:size])
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match="Error"):
        checkpointer.restore(folder / "3", one_array(run("centered")[0]))


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_torn_bytes_are_an_error(share):
    encoded = flax.serialization.to_bytes(run("centered")[3])
    with pytest.raises(ValueError, match=r"incomplete|Unpack"):
        run("centered")[0].from_bytes(encoded[: int(share * len(encoded))])
