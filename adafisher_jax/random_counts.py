"""Finds random numbers that would be the same in every micro-batch.

An NNX random stream folds its count into its key and adds one to the count. A function that merges
a module from arrays it closes over drops the new count, so all its calls draw the same numbers. The
program of one micro-batch shows this: a count that is closed over is folded into a key, and neither
of the two depends on the micro-batch.
"""

import enum

from jax.extend import core

from adafisher_jax.capture.places import bodies


class Behind(enum.IntEnum):
    """What a value of a program depends on; the result of two branches has the larger of theirs."""

    NEITHER = 0
    CLOSED_OVER = 1
    """The value is an array from outside, unchanged."""
    INPUTS = 2


Levels = list[Behind]


def check_random_counts(program: core.ClosedJaxpr) -> None:
    """Checks that the random numbers of one micro-batch's program are not those of all others.

    Raises:
      ValueError: if an array that is closed over is folded into a key that does not depend on the
        program's inputs.
    """
    folds: list[Levels] = []
    _follow(program.jaxpr, [Behind.INPUTS for _ in program.jaxpr.invars], folds)
    if any(key != Behind.INPUTS and count == Behind.CLOSED_OVER for key, count in folds):
        raise ValueError(
            "grad_fn: every micro-batch would draw the same random numbers. It folds a count that "
            "it closes over into a key, as an nnx.Module merged from arrays does, and drops the "
            "change to that count. Give the module itself: "
            "adafisher_jax.nnx.accumulate(grad_fn, layout)(model, ...). Or give a key for each "
            "micro-batch as an argument: jax.random.split(key, k)"
        )


def _follow(jaxpr: core.Jaxpr, inputs: Levels, folds: list[Levels]) -> Levels:
    """Returns what outputs depend on; appends what each pair of a key and a folded count does."""
    known = dict.fromkeys(jaxpr.constvars, Behind.CLOSED_OVER)
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def behind(atom: core.Var | core.Literal) -> Behind:
        return Behind.NEITHER if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        operands = [behind(atom) for atom in eqn.invars]
        if eqn.primitive.name == "random_fold_in":
            folds.append(operands)
        known |= zip(eqn.outvars, _results(eqn, operands, folds), strict=True)
    return [behind(atom) for atom in jaxpr.outvars]


def _results(eqn: core.JaxprEqn, operands: Levels, folds: list[Levels]) -> Levels:
    """Returns what the results of an equation depend on."""
    programs = list(bodies(eqn))
    if not programs:
        differs = Behind.INPUTS in operands
        return [Behind.INPUTS if differs else Behind.NEITHER for _ in eqn.outvars]

    def run(inputs: Levels, folds: list[Levels]) -> Levels:
        each = [_follow(program, inputs, folds) for program in programs]
        return [max(levels) for levels in zip(*each, strict=True)]

    match eqn.primitive.name, eqn.params:
        case "cond", _:
            branch, *inputs = operands
            return [max(branch, level) for level in run(inputs, folds)]
        case "scan", {"num_consts": fixed, "num_carry": carried}:
            inputs = operands
        case "while", {"cond_nconsts": skipped, "body_nconsts": fixed}:
            inputs = operands[skipped:]
            carried = len(inputs) - fixed
        case _:
            return run(operands, folds)
    loop = slice(fixed, fixed + carried)
    while (after := list(map(max, inputs[loop], run(inputs, [])))) != inputs[loop]:
        inputs[loop] = after  # the next step depends on what a step changes
    return run(inputs, folds)
