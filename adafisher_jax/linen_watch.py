"""Watching a loss: who calls which Linen layer, and which variables a model was given.

Layers are seen by a method interceptor, which Linen offers. Root scopes are seen by a hook on
`Scope`, there while some thread watches: a model whose own class is lifted is intercepted only
inside the lift, too late to add to its variables.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.core import FrozenDict
from flax.core.scope import Scope
from flax.core.tracers import current_trace

from adafisher_jax.linen_layers import READERS, Reading
from adafisher_jax.uses import Names

_PREFIX = "adafisher:"


def probe_name(kind: str) -> str:
    """The name of a probe beside its weight: no parameter's, and one for each kind of layer."""
    return _PREFIX + kind


def _without_probes(tree: Any) -> Any:
    if type(tree) not in (dict, FrozenDict):
        return tree
    shown = {key: value for key, value in tree.items() if not str(key).startswith(_PREFIX)}
    return type(tree)({key: _without_probes(value) for key, value in shown.items()})


class RootMade(NamedTuple):
    """The making of a root scope: a model is given its variables.

    Attributes:
      call: how many were made before.
      variables: its collections, which may be changed.
      nested: whether JAX is tracing a function inside the loss.
    """

    call: int
    variables: dict[str, Any]
    nested: bool


class _Watcher(NamedTuple):
    """Who is told of the root scopes made and layers called while a loss runs."""

    token: object
    calls: Iterator[int]
    trace_level: Any
    on_root: Callable[[RootMade], None]
    on_layer: Callable[[int, Names, Reading, Mapping[str, Any], Any], Any]

    def root(self, scope: Scope) -> None:
        # Lifted transforms make scopes without a parent too, and hand the flags on to them.
        if scope.parent is None and self.token not in scope.flags:
            call = next(self.calls)
            scope.flags = scope.flags.copy({self.token: call})
            nested = scope.trace_level != self.trace_level
            self.on_root(RootMade(call, scope._variables, nested))

    def intercept(self, run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        scope: Scope | None = context.module.scope
        reader = READERS.get(context.orig_method.func)
        if reader is None or scope is None or self.token not in scope.flags:
            return run(*args, **kwargs)

        def on_call(found: Reading, y: Any) -> Any:
            held = scope._collection("params")
            for name in found.inside:
                held = held.get(name, {})
            if not {found.weight, found.bias} & held.keys():
                return y
            path = (*scope.path, *found.inside)
            return self.on_layer(scope.flags[self.token], path, found, held, y)

        return reader(context.module, run, args, kwargs, on_call)


# Part of the keys of JAX's caches. With a value of its own, a function that was traced before
# is traced again, and what is traced then is used nowhere else.
_trace_key = jax.make_user_context(None)


def watched(
    loss_fn: Callable[..., Any],
    on_root: Callable[..., None],
    on_layer: Callable[..., Any],
    fresh: bool,
) -> Callable[..., Any]:
    """The loss, telling of the root scopes made and the layers called in it.

    With `fresh`, functions inside it are traced anew, jitted ones too.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        watcher = _Watcher(object(), itertools.count(), current_trace(), on_root, on_layer)
        with (
            _scope_hooks.told(watcher),
            nn.intercept_methods(watcher.intercept),
            _trace_key(watcher.token) if fresh else contextlib.nullcontext(),
        ):
            return loss_fn(*args, **kwargs)

    return run


class _ScopeHooks:
    """Tells a thread's watcher of the root scopes it makes, and hides probes from the model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._local = threading.local()
        readers = ("variables", "mutable_variables", "get_variable")
        self._originals = {name: getattr(Scope, name) for name in ("__init__", *readers)}
        self._hooks = {name: self._hide_probes(self._originals[name]) for name in readers}
        self._hooks["__init__"] = self._tell_watcher(self._originals["__init__"])

    def _tell_watcher(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def hook(scope: Scope, *args: Any, **kwargs: Any) -> None:
            init(scope, *args, **kwargs)
            if watcher := getattr(self._local, "watcher", None):
                watcher.root(scope)

        return hook

    @staticmethod
    def _hide_probes(read: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(read)
        def hook(*args: Any, **kwargs: Any) -> Any:
            return _without_probes(read(*args, **kwargs))

        return hook

    @contextlib.contextmanager
    def told(self, watcher: _Watcher) -> Iterator[None]:
        """Tells `watcher` of the root scopes this thread makes."""
        outer = getattr(self._local, "watcher", None)
        self._local.watcher = watcher
        self._change_users(1)
        try:
            yield
        finally:
            self._change_users(-1)
            self._local.watcher = outer

    def _change_users(self, by: int) -> None:
        with self._lock:
            self._users += by
            for name, method in (self._hooks if self._users else self._originals).items():
                setattr(Scope, name, method)


_scope_hooks = _ScopeHooks()
