"""What a gradient passes through, in every way JAX has of calling a program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from adafisher_jax.capture.lineage import bodies
from adafisher_jax.capture.reach import places_reached


def reached(fun, outputs, *args):
    """How often each of the primitives sin and cos is reached, of all that there are."""
    program = jax.make_jaxpr(fun)(*args)
    places = places_reached(program, outputs)
    counts = {"sin": [0, 0], "cos": [0, 0]}

    def walk(jaxpr, around):
        for index, eqn in enumerate(jaxpr.eqns):
            if (name := eqn.primitive.name) in counts:
                counts[name][0] += (*around, (index, 0)) in places
                counts[name][1] += 1
            for i, body in enumerate(bodies(eqn)):
                walk(body, (*around, (index, i)))

    walk(program.jaxpr, ())
    return {name: tuple(found) for name, found in counts.items()}


def two(x):
    return jnp.sin(x), jnp.cos(x)


def in_scan(x):
    return lax.scan(lambda c, _: (jnp.sin(c), jnp.cos(c)), x, None, length=3)


def handed_on(x):
    """The cosine gets to the first output, but only two steps later."""

    def step(carry, _):
        a, b, c = carry
        return (a + b, b + c, jnp.cos(c)), jnp.sin(c)

    (a, *_), ys = lax.scan(step, (x, x, x), None, length=3)
    return a, ys


def in_while(x):
    return lax.while_loop(lambda c: c[0] < 9, lambda c: (jnp.sin(c[0]), jnp.cos(c[1])), (x, x))


@jax.custom_jvp
def with_own_rule(x):
    return in_while(lax.stop_gradient(x))


with_own_rule.defjvp(lambda primals, tangents: (in_while(*primals), in_while(*tangents)))


def in_cond(x):
    return lax.cond(x > 0, two, lambda x: (x, jnp.cos(x)), x)


def of_index(x):
    return lax.switch(jnp.sin(x).astype(int), [jnp.cos, jnp.tanh], x), jnp.cos(x)


def written(x):
    """The sine is written to a mutable array, in a loop, and read afterwards."""
    ref = jax.new_ref(x)

    def step(carry, _):
        ref[...] += jnp.sin(carry)
        return carry, jnp.cos(carry)

    _, ys = lax.scan(step, x, None, length=3)
    return ref[...], ys


def read_before(x):
    """Each step of the loop reads what the step before wrote."""
    ref = jax.new_ref(x)

    def step(carry, _):
        carry = carry + ref[...]
        ref[...] = jnp.sin(carry)
        return carry, jnp.cos(carry)

    return lax.scan(step, x, None, length=3)


CASES = {
    "as it is": (two, (1, 0), ((1, 1), (0, 1))),
    "both": (two, (1, 1), ((1, 1), (1, 1))),
    "nothing": (two, (0, 0), ((0, 1), (0, 1))),
    "jit": (jax.jit(two), (0, 1), ((0, 1), (1, 1))),
    "checkpoint": (jax.checkpoint(two), (1, 0), ((1, 1), (0, 1))),
    "carried": (in_scan, (1, 0), ((1, 1), (0, 1))),
    "stacked, of what is carried": (in_scan, (0, 1), ((1, 1), (1, 1))),
    "carried from one to another": (handed_on, (1, 0), ((0, 1), (1, 1))),
    "a loop without end": (in_while, (1, 0), ((0, 1), (0, 1))),
    "that in a rule of its own": (with_own_rule, (1, 0), ((1, 1), (1, 1))),
    "stopped": (lambda x: two(lax.stop_gradient(jnp.cos(x))), (1, 0), ((1, 1), (0, 2))),
    "rounded": (lambda x: two(jnp.round(jnp.cos(x))), (1, 0), ((1, 1), (0, 2))),
    "compared": (lambda x: jnp.where(jnp.sin(x) > 0, jnp.cos(x), 1.0), (1,), ((0, 1), (1, 1))),
    "branches": (in_cond, (1, 0), ((1, 1), (0, 2))),
    "written to a mutable array": (written, (1, 0), ((1, 1), (0, 1))),
    "beside a mutable array": (written, (0, 1), ((0, 1), (1, 1))),
    "read before it is written": (read_before, (1, 0), ((1, 1), (0, 1))),
    "which branch it is": (of_index, (1, 0), ((0, 1), (1, 2))),
}


@pytest.mark.parametrize("name", CASES)
def test_places_reached(name):
    fun, outputs, (sin, cos) = CASES[name]
    assert reached(fun, list(map(bool, outputs)), 1.0) == {"sin": sin, "cos": cos}
