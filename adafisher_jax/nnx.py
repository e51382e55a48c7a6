"""Layout, gradients and factors of a loss of a Flax NNX module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx import extract
from flax.nnx.transforms.general import merge_inputs, split_inputs

from adafisher_jax import capture
from adafisher_jax.layout import Layout, check_layout
from adafisher_jax.loss import check_loss, explaining
from adafisher_jax.micro_batches import over_micro_batches
from adafisher_jax.paths import by_path


def trace_layout(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    /,
    *args: Any,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    **kwargs: Any,
) -> Layout:
    """Finds the layers that `loss_fn(model, *args, **kwargs)` calls, without computing anything.

    Args:
      loss_fn: any traceable function that calls NNX layers of its first argument.
      model: the module.
      *args: further arguments. Arrays may be `jax.ShapeDtypeStruct`. Other values (`train=True`)
        are passed on unchanged.
      wrt: which of the module's variables are the parameters: any filter of `nnx.state`, as in
        `nnx.Optimizer`, such as `nnx.LoRAParam` or `nnx.PathContains("head")`. It is not passed to
        the loss.
      has_aux: whether `loss_fn` returns a pair `(scalar, aux)`.
      **kwargs: further arguments, as `args`.

    Returns:
      A static, hashable `Layout`. Print it to see what is covered. It lists the parameters and
      nothing else of the model. Paths are those of `nnx.state(model, wrt)`. A shared module has the
      first of its paths.

    Raises:
      TypeError: if the loss is a module, `model` is no module, a parameter is not floating-point,
        or the loss with `has_aux` returns no pair.
      ValueError: as `adafisher_jax.trace_layout`; also if `wrt` selects nothing, or another
        argument holds a variable of the model.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> print(trace_layout(loss_fn, model, jnp.ones((8, 3))))
      parameter        layer  in  out  stacked  covered
      ---------------  -----  --  ---  -------  -------
      layers/0/bias    dense  -   4    -        yes
      layers/0/kernel  dense  3   4    -        yes
      100.0% of 16 parameters under a Fisher block
    """
    check_loss(loss_fn)
    _check(model, args, kwargs)
    explained = explaining(loss_fn, has_aux or None)
    model, args, kwargs = extract.to_tree((model, args, kwargs))
    params, rest = _parts(model, wrt)
    if not jax.tree.leaves(params):
        raise ValueError(f"wrt: {wrt!r} selects none of the model's variables")

    def loss(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        whole = _whole(model, params, rest)
        model_again, args, kwargs = extract.from_tree((whole, args, kwargs))
        result = explained(model_again, *args, **kwargs)
        return jax.tree.leaves(result)[:1]  # the loss; the other results may be no pytree

    layout = capture.trace_layout(loss, params, (rest, args, kwargs), {})
    left_out, _ = by_path(nnx.split_state(rest, nnx.Param, ...)[0])
    return dataclasses.replace(layout, left_out=tuple(left_out))


def value_and_grad(
    loss_fn: Callable[..., Any], layout: Layout, has_aux: bool = False, *, when: Any = True
) -> Callable[..., Any]:
    """Returns `nnx.value_and_grad` of a loss, with the factors from the same backward pass.

    Args:
      loss_fn: the loss of `trace_layout`; it returns a scalar, or `(scalar, aux)` with `has_aux`.
      layout: from `trace_layout`.
      has_aux: whether `loss_fn` returns auxiliary data.
      when: whether to compute factors; see `adafisher_jax.value_and_grad`.

    Returns:
      A function of `loss_fn`'s arguments that returns `(loss, grads, factors)`, or
      `((loss, aux), grads, factors)`. The first two are those of `nnx.value_and_grad`. The third is
      a dict from layer path to `Factor`. Gradients are those of the parameters that the layout
      lists. What the loss changes in its arguments (running statistics, counts of random streams)
      is changed in the caller's, as `nnx.value_and_grad` does.

    Raises:
      TypeError, ValueError: as `trace_layout`; also if the layout is of another model or loss.

    Example:
      >>> from flax import nnx
      >>> import adafisher_jax as af, jax.numpy as jnp
      >>> model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.array([[1.0, 2.0, 3.0]])
      >>> loss_fn = lambda model, x: jnp.sum(model(x))
      >>> layout = af.nnx.trace_layout(loss_fn, model, x)
      >>> tx = af.adafisher(3e-2, layout, rule="centered")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss, grads, factors = af.nnx.value_and_grad(loss_fn, layout)(model, x)
      >>> _ = optimizer.update(model, grads, factors=factors)
      >>> factors[""].h.ravel().tolist(), factors[""].s.ravel().tolist()
      ([1.0, 4.0, 9.0], [1.0])
    """
    check_loss(loss_fn)
    check_layout(layout)
    when = capture.condition(when)
    explained = explaining(loss_fn, has_aux)
    wrt = parameters_of(layout)

    def grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        _check(model, args, kwargs)

        # These two turn modules into pytrees on the way in, and carry changes out.
        @split_inputs
        def differentiated(model: Any, args: Any, kwargs: Any) -> Any:
            params, rest = _parts(model, wrt)

            def loss(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
                changed, result = merged(_whole(model, params, rest), args, kwargs)
                value, aux = result if has_aux else (result, None)
                return value, (changed, aux)

            (value, (changed, aux)), grads, factors = capture.value_and_grad(
                loss, layout, True, params, (rest, args, kwargs), {}, when=when
            )
            return changed, ((value, aux) if has_aux else value, grads, factors)

        @merge_inputs
        def merged(model: nnx.Module, args: Any, kwargs: Any) -> Any:
            return explained(model, *args, **kwargs)

        return differentiated(model, args, kwargs)

    return grad_fn


def accumulate(
    grad_fn: Callable[..., Any], layout: Layout, weights: Any = None
) -> Callable[..., Any]:
    """Runs a gradient function over micro-batches, in the memory of one micro-batch.

    Args:
      grad_fn: from `value_and_grad`.
      layout: the layout of `grad_fn`.
      weights: as in `adafisher_jax.accumulate`.

    Returns:
      A function `(model, *args, **kwargs)` that returns what `grad_fn` returns, for the whole
      batch. What the loss changes in the model (counts of random streams, running statistics) is
      carried from each micro-batch to the next and is in the model afterwards, as after a loop.
      The same holds for other modules and variables among the arguments. Each array among them is
      a stack of micro-batches; all else is as in `adafisher_jax.accumulate`.

    Raises:
      TypeError: from the returned function, if `model` is no module.
      ValueError: from the returned function, as `adafisher_jax.accumulate`; also if the loss
        changes more of a module than the values of its variables.

    Example:
      >>> from flax import nnx
      >>> import adafisher_jax as af, jax.numpy as jnp
      >>> rngs, x = nnx.Rngs(0), jnp.ones((8, 3))
      >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> layout = af.nnx.trace_layout(loss_fn, model, x)
      >>> grad_fn = af.nnx.value_and_grad(loss_fn, layout)
      >>> loss, grads, factors = af.nnx.accumulate(grad_fn, layout)(model, x.reshape(4, 2, 3))
      >>> factors["layers/0"].rows.item(), model.layers[1].rngs.count[...].item()
      (8.0, 4)
    """

    def accumulated(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        _check(model, args, kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
        objects = [model, *filter(_is_object, leaves)]
        graphdef, state = nnx.split(objects)

        def one(values: Any, *args: Any, **kwargs: Any) -> Any:
            inner = nnx.merge(graphdef, values)
            model, *others = inner
            own, given = iter(others), iter(jax.tree.leaves((args, kwargs)))
            args, kwargs = jax.tree.unflatten(
                structure, [next(own if _is_object(leaf) else given) for leaf in leaves]
            )
            result = grad_fn(model, *args, **kwargs)
            changed, after = nnx.split(inner)
            _check_carried(state, after, changed == graphdef)
            return after, result

        args, kwargs = jax.tree.unflatten(
            structure, [None if _is_object(leaf) else leaf for leaf in leaves]
        )
        state, result = over_micro_batches(one, layout, weights, state, args, kwargs)
        nnx.update(objects, state)
        return result

    return accumulated


def parameters_of(layout: Layout) -> Callable[[tuple[Any, ...], Any], bool]:
    """Returns the filter of `nnx.state` for the parameters of which a layout was traced."""
    listed, left_out = {leaf.path for leaf in layout.leaves}, set(layout.left_out)
    is_parameter = nnx.filterlib.to_predicate(nnx.Param)

    def wrt(keys: tuple[Any, ...], variable: Any) -> bool:
        path = "/".join(map(str, keys))  # a path in neither is an error of the layout's check
        return path in listed or (is_parameter(keys, variable) and path not in left_out)

    return wrt


def _parts(model: Any, wrt: Any) -> Any:
    """Returns the parameters and the rest of a module in its form as a pytree."""
    (state,) = model.states
    return nnx.split_state(state, wrt, ...)


def _whole(model: Any, params: Any, rest: Any) -> Any:
    return model.replace(states=(nnx.merge_state(params, rest),))


def _check(model: Any, args: Any, kwargs: Any) -> None:
    """Checks that `model` is a module, and that other arguments hold no variable of it."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, wanted an nnx.Module; for the parameters of Linen "
            "there are adafisher_jax.trace_layout and adafisher_jax.value_and_grad"
        )
    own = {id(v): path for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
    for path, found in nnx.iter_graph({"args": args, "kwargs": kwargs}):
        if id(found) in own:
            inside, again = ("/".join(map(str, keys)) for keys in (own[id(found)], path))
            raise ValueError(
                f"inconsistent aliasing: the model's variable {inside!r} is {again!r} too, and "
                "gradients are of the first argument alone: let the loss take it from the model, "
                "or give a copy, nnx.clone(...)"
            )


def _is_object(leaf: Any) -> bool:
    """Whether a leaf is a module or a variable, which a loss may change in place."""
    return isinstance(leaf, nnx.Variable | nnx.Pytree)


def _check_carried(before: Any, after: Any, same_structure: bool) -> None:
    """Checks that only the values of variables differ, since a scan carries nothing else."""
    was, now = ({p: (a.shape, a.dtype) for p, a in by_path(t)[0].items()} for t in (before, after))
    if was == now and same_structure:
        return
    differing = sorted(path for path, _ in was.items() ^ now.items())
    what = f"{differing[0].partition('/')[-1]!r}" if differing else "an attribute"
    raise ValueError(
        f"model: the loss makes, drops or changes {what} in each micro-batch, and of a module only "
        "the values of variables can be carried from one to the next: make the variable before, of "
        "its final shape and type, or loop with adafisher_jax.add_micro_batch"
    )
