"""Plots of training: what the optimizer reports at each step, and its path over the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adafisher_jax.diagnostics.landscape import Plane
from adafisher_jax.diagnostics.live import QUANTILES, LayerReport
from adafisher_jax.diagnostics.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = 20  # the number of levels of a landscape

_LOW, _MIDDLE, _HIGH = (f"{quantile:.0%}" for quantile in QUANTILES)
FIELDS = {
    "above_damping": "share above damping",
    "rate_low": f"effective rate, {_LOW} quantile",
    "rate_median": f"effective rate ({_LOW}, {_MIDDLE}, {_HIGH})",
    "rate_high": f"effective rate, {_HIGH} quantile",
    "condition": "condition of h ⊗ s",
    "relative_step": "step / weight (rms)",
    "age": "age of averages (steps)",
    "skipped": "skipped refreshes",
}
LINEAR = ("above_damping", "age", "skipped")
_START: dict[str, Any] = {"markersize": 4, "markeredgecolor": "black", "linestyle": "none"}
_END: dict[str, Any] = {**_START, "markersize": 8, "markeredgewidth": 0.7}


def over_training(
    axes: Axes, reports: Sequence[tuple[int, Mapping[str, LayerReport]]], field: str
) -> None:
    """Draws a field of `report` over the steps, with a line for each layer.

    The median rate has a band of its quantiles. The legend has the layers in the order in which
    their lines end. Values that are not finite, or not positive on a logarithmic axis, are left
    out.

    Args:
      axes: the axes to draw on.
      reports: pairs of a step and what `report` returned then.
      field: a field of `LayerReport`.

    Raises:
      ValueError: if the field is unknown or was not reported, or there are no reports.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> found = [(step, {"up": LayerReport(*map(jnp.float32, range(8)))}) for step in (0, 10)]
      >>> over_training(axes, found, "age")
      >>> axes.lines[0].get_xdata().tolist(), axes.lines[0].get_ydata().tolist()
      ([0, 10], [6.0, 6.0])
    """
    if field not in FIELDS:
        raise ValueError(f"field: got {field!r}, wanted one of {', '.join(FIELDS)}")
    if not reports:
        raise ValueError("reports: got none")
    steps = [step for step, _ in reports]
    paths = list(reports[0][1])
    drawn: dict[Any, np.ndarray] = {}
    for path, colour in zip(paths, style.colours(len(paths)), strict=True):
        values = _values(reports, path, field)
        label = path or "(root)"
        if np.isnan(values).all():
            label += f" ({float(getattr(reports[-1][1][path], field)):g})"
        (line,) = axes.plot(steps, values, color=colour, label=label, linewidth=1.2)
        drawn[line] = values
        if field == "rate_median":
            low, high = (_values(reports, path, name) for name in ("rate_low", "rate_high"))
            axes.fill_between(steps, low, high, color=colour, alpha=0.08, linewidth=0)
            axes.plot(steps, np.stack([low, high], 1), color=colour, linewidth=0.5)
    everything = np.concatenate(list(drawn.values()))
    if field in LINEAR:
        top = np.nanmax([1, *everything])
        axes.set_ylim(-0.04 * top, 1.04 * top)
        axes.locator_params(axis="y", integer=field != "above_damping")
    elif not np.isnan(everything).all():
        axes.set_yscale("log")
    style.label(axes, "step", FIELDS[field])
    handles = sorted(drawn, key=lambda line: -np.nan_to_num(drawn[line][-1], nan=-np.inf))
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "labelspacing": 0.3}
    axes.legend(handles=handles, fontsize="x-small", frameon=False, **place)


def trajectories(
    axes: Axes,
    plane: Plane,
    losses: jax.typing.ArrayLike,
    xs: jax.typing.ArrayLike,
    ys: jax.typing.ArrayLike,
    paths: Mapping[str, jax.typing.ArrayLike],
) -> None:
    """Draws the paths of several optimizers over the loss, which is lighter where it is lower.

    Both axes have one scale, so distances are those between parameters. The colours are logarithmic
    if all losses are positive.

    Args:
      axes: the axes to draw on.
      plane: from `principal_plane`.
      losses: from `evaluate`, (len(ys), len(xs)).
      xs: the coordinates along the first axis, from `frame`.
      ys: the coordinates along the second axis.
      paths: the `coordinates` of each trajectory, (points, 2), by the name of the optimizer.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> plane = Plane(jnp.zeros(2), jnp.eye(2), jnp.array([0.8, 0.2]))
      >>> trajectories(axes, plane, jnp.eye(3), [0, 1, 2], [0, 1, 2], {"sgd": jnp.ones((4, 2))})
      >>> axes.get_xlabel()
      'PC 1 (80% of variance)'
    """
    _landscape(axes, losses, xs, ys)
    for (name, path), colour in zip(paths.items(), style.colours(len(paths)), strict=True):
        x, y = np.asarray(path).T
        axes.plot(x, y, ".-", color=colour, label=name, linewidth=1.2, markersize=3)
        axes.plot(x[-1:], y[-1:], "*", color=colour, zorder=3, **_END)
        axes.plot(x[:1], y[:1], "o", color="white", zorder=3, **_START)
    axes.plot([], [], "o", color="white", label="start", **_START)
    axes.plot([], [], "*", color="white", label="end", **_END)
    axes.set_aspect("equal")
    first, second = (f"{share:.0%} of variance" for share in plane.shares.tolist())
    style.label(axes, f"PC 1 ({first})", f"PC 2 ({second})")
    style.legend_above(axes)


def _values(
    reports: Sequence[tuple[int, Mapping[str, LayerReport]]], path: str, field: str
) -> np.ndarray:
    """Returns a layer's field at every step, with NaN for values that are not drawn."""
    values = [getattr(found[path], field) for _, found in reports]
    if any(value is None for value in values):
        raise ValueError(f"field: {field!r} was not reported, which takes params and updates")
    numbers = np.array([float(value) for value in values])
    drawn = np.isfinite(numbers) & ((numbers > 0) | (field in LINEAR))
    return np.where(drawn, numbers, np.nan)


def _landscape(axes: Axes, losses: Any, xs: Any, ys: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    values = np.ma.masked_invalid(np.asarray(losses, np.float64))
    low, high = values.min(), values.max()
    if not high > low:
        return
    positive = low > 0
    levels = (np.geomspace if positive else np.linspace)(low, high, LEVELS)
    norm = (LogNorm if positive else Normalize)(low, high)
    greys = LinearSegmentedColormap.from_list("light greys", ["1.0", "0.55"])
    axes.contourf(xs, ys, values, levels, norm=norm, cmap=greys)
    axes.contour(xs, ys, values, levels[1:-1], colors="0.5", linewidths=0.4)
    style.colour_bar(axes, ScalarMappable(norm, greys), "loss")
