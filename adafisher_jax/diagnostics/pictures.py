"""Pictures of the curvature, drawn on matplotlib's axes.

Each function draws the numbers of another one of this package. The figure is the caller's, with
its size, layout, titles and file; fonts are relative to `font.size`. matplotlib comes with the
extra `examples`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.diagnostics import concentration
from adafisher_jax.diagnostics.landscape import Plane
from adafisher_jax.diagnostics.live import QUANTILES, LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "bright" colours, which do not need red to be told from green.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
GREY = "0.4"
LINEAR_BELOW = 1e-3  # of the largest entry: where a heat map's colours stop being logarithmic
FLOOR = -60.0  # dB: magnitudes below it look alike
LEVELS = 20  # of a landscape

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
_HOLLOW: dict[str, Any] = {"markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.7}
_TICK: dict[str, Any] = {"markersize": 8, "markeredgewidth": 1.0, "linestyle": "none"}
_START: dict[str, Any] = {"markersize": 4, "markeredgecolor": "black", "linestyle": "none"}
_END: dict[str, Any] = {**_START, "markersize": 8, "markeredgewidth": 0.7}


def heat_map(axes: Axes, matrix: jax.typing.ArrayLike) -> None:
    """A matrix's entries relative to the largest, on a symmetric logarithmic scale of colours.

    Args:
      axes: to draw on.
      matrix: (n, n), such as a whole factor.

    Raises:
      ValueError: for a matrix that is not square or not finite, as from all functions here.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> heat_map(axes, jnp.array([[4.0, 1.0], [1.0, 2.0]]))
      >>> axes.images[0].get_array().tolist()
      [[1.0, 0.25], [0.25, 0.5]]
    """
    from matplotlib.colors import SymLogNorm

    scaled = _relative(_checked(matrix))
    norm = SymLogNorm(LINEAR_BELOW, linscale=0.5, vmin=-1, vmax=1)
    image = axes.imshow(scaled, norm=norm, cmap="RdBu_r")
    bar = _colour_bar(axes, image, "entry / largest")
    bar.set_ticks([-1, -0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1])
    bar.minorticks_off()
    _label(axes, "column", "row")
    energy = concentration.diagonal_energy(jnp.asarray(scaled)).item()
    if np.isfinite(energy):
        _note(axes, f"{energy:.0%} of squares on the diagonal")


def discs(
    axes: Axes, matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None = None
) -> None:
    """Gershgorin's discs in the complex plane, and the eigenvalues in them.

    Args:
      axes: to draw on.
      matrix: symmetric, (n, n).
      noisy: the same after `add_noise`. The halves above the real axis are then those of
        `matrix`, the halves below it these.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> discs(axes, jnp.array([[4.0, 1.0], [1.0, 2.0]]))
      >>> axes.collections[0].get_offsets().tolist(), axes.collections[0].get_widths().tolist()
      ([[4.0, 0.0], [2.0, 0.0]], [2.0, 2.0])
    """
    from matplotlib.collections import EllipseCollection
    from matplotlib.markers import TICKDOWN, TICKUP
    from matplotlib.path import Path

    cases = _cases(matrix, noisy)
    axes.axhline(0, color=GREY, linewidth=0.5)
    for (label, colour, one), side, tick in zip(cases, (1, -1), (TICKUP, TICKDOWN), strict=False):
        centers, radii = (np.asarray(part, np.float64) for part in concentration.gershgorin(one))
        low, high, highest = np.min(centers - radii), np.max(centers + radii), np.max(radii)
        circles = EllipseCollection(
            2 * radii,
            2 * radii,
            np.zeros_like(radii),
            units="xy",
            offsets=np.stack([centers, np.zeros_like(centers)], 1),
            offset_transform=axes.transData,
            facecolor="none",
            edgecolor=(colour, 0.35),
            linewidth=0.5,
        )
        axes.add_collection(circles, autolim=False)
        axes.update_datalim([(low, -highest), (high, highest)])
        if len(cases) > 1:
            far = 2 * side * highest
            half = Path(np.array([(0, 0), (1, 0), (1, far), (0, far)]))
            circles.set_clip_path(half, axes.get_yaxis_transform())
        values = np.asarray(concentration.eigenvalues(one))
        marker = tick if len(cases) > 1 else "|"
        axes.plot(values, np.zeros_like(values), color=colour, marker=marker, **_TICK)
        axes.plot([], [], color=colour, marker="|", label=label, **_TICK)
    axes.set_aspect("equal", adjustable="datalim")
    axes.autoscale_view()
    _label(axes, "real part", "imaginary part")
    _legend_above(axes)


def eigenvalues(
    axes: Axes, matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None = None
) -> None:
    """The eigenvalues, the largest first, and how many the Kaiser rule keeps: those above average.

    The axis is logarithmic where that average is positive. It leaves out eigenvalues that are not
    positive or round-off, below `n` times the type's precision relative to the largest.

    Args:
      axes: to draw on.
      matrix: symmetric, (n, n).
      noisy: the same after `add_noise`, drawn beside it.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> eigenvalues(axes, jnp.diag(jnp.array([1.0, 8.0])))
      >>> axes.lines[0].get_ydata().tolist(), axes.lines[0].get_label()
      ([8.0, 1.0], 'eigenvalues: 1 of 2 above average')
    """
    floor = np.inf
    for (label, colour, one), marker in zip(_cases(matrix, noisy), "ox", strict=False):
        found = concentration.eigenvalues(one)
        n, kept = len(found), np.count_nonzero(concentration.kaiser(found))
        values = np.asarray(found)
        label = f"{label}: {kept} of {n} above average"
        axes.plot(np.arange(1, n + 1), values, marker, color=colour, label=label, **_HOLLOW)
        if values[0] > 0:
            above = values[values > n * np.finfo(values.dtype).eps * values[0]]
            floor = min(floor, above[-1])
    average = np.mean(values)  # which noise beside the diagonal leaves as it is
    if average > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=floor / 2)
    axes.axhline(average, color=GREY, linestyle="--", linewidth=0.8)
    axes.text(
        0.99,
        average,
        "average",
        fontsize="x-small",
        color=GREY,
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
    )
    axes.locator_params(axis="x", integer=True)
    _label(axes, "index", "eigenvalue")
    axes.legend(loc="upper right", fontsize="x-small", frameon=False)


def fourier(axes: Axes, matrix: jax.typing.ArrayLike) -> None:
    """The magnitudes of a matrix's Fourier transform, in decibels below the largest.

    Rows' frequencies rise upwards, so that a diagonal's line falls, as the diagonal does.

    Args:
      axes: to draw on.
      matrix: (n, n), such as a whole factor.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> fourier(axes, jnp.eye(2))
      >>> axes.images[0].get_array().tolist(), axes.images[0].get_extent()
      ([[0.0, -60.0], [-60.0, 0.0]], [-0.75, 0.25, -0.75, 0.25])
    """
    scaled = jnp.asarray(_relative(_checked(matrix)))
    magnitudes = _relative(np.asarray(concentration.fourier(scaled)))
    decibels = 20 * np.log10(np.maximum(magnitudes, 10 ** (FLOOR / 20)))
    n = len(scaled)
    start = -(n // 2 + 0.5) / n
    image = axes.imshow(
        decibels,
        cmap="viridis",
        vmin=FLOOR,
        vmax=0,
        origin="lower",
        extent=(start, start + 1, start, start + 1),
    )
    _colour_bar(axes, image, "magnitude / largest (dB)")
    _label(axes, "cycles per column", "cycles per row")
    ratio = concentration.signal_to_noise(scaled).item()
    if not np.isnan(ratio):
        _note(axes, f"SNR {ratio:.1f} dB".replace("-", "−"))


def over_training(
    axes: Axes, reports: Sequence[tuple[int, Mapping[str, LayerReport]]], field: str
) -> None:
    """A field of `report`, a line for each layer; around the median rate, a band of its quantiles.

    The legend has the layers in the order in which their lines end. What is not finite, or not
    positive on a logarithmic axis, is left out.

    Args:
      axes: to draw on.
      reports: some steps, each with what `report` found then.
      field: of `LayerReport`.

    Raises:
      ValueError: for an unknown field, one that was not reported, or without reports.

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
    for path, colour in zip(paths, _colours(len(paths)), strict=True):
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
    _label(axes, "step", FIELDS[field])
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
    """Paths of several optimizers through the landscape of the loss, lighter where it is lower.

    Both axes have one scale, so that distances are those between parameters. The colours are
    logarithmic where all losses are positive.

    Args:
      axes: to draw on.
      plane: from `principal_plane`.
      losses: from `evaluate`, (len(ys), len(xs)).
      xs: coordinates along the first axis, from `frame`.
      ys: those along the second.
      paths: `coordinates` of each trajectory, by the optimizer's name, (points, 2).

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> plane = Plane(jnp.zeros(2), jnp.eye(2), jnp.array([0.8, 0.2]))
      >>> trajectories(axes, plane, jnp.eye(3), [0, 1, 2], [0, 1, 2], {"sgd": jnp.ones((4, 2))})
      >>> axes.get_xlabel()
      'PC 1 (80% of variance)'
    """
    _landscape(axes, losses, xs, ys)
    for (name, path), colour in zip(paths.items(), _colours(len(paths)), strict=True):
        x, y = np.asarray(path).T
        axes.plot(x, y, ".-", color=colour, label=name, linewidth=1.2, markersize=3)
        axes.plot(x[-1:], y[-1:], "*", color=colour, zorder=3, **_END)
        axes.plot(x[:1], y[:1], "o", color="white", zorder=3, **_START)
    axes.plot([], [], "o", color="white", label="start", **_START)
    axes.plot([], [], "*", color="white", label="end", **_END)
    axes.set_aspect("equal")
    first, second = (f"{share:.0%} of variance" for share in plane.shares.tolist())
    _label(axes, f"PC 1 ({first})", f"PC 2 ({second})")
    _legend_above(axes)


def _checked(matrix: jax.typing.ArrayLike) -> np.ndarray:
    found = np.asarray(matrix)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"matrix: got shape {found.shape}, wanted a square one")
    if not np.isfinite(found).all():
        raise ValueError("matrix: got entries that are not finite")
    return found.astype(np.promote_types(found.dtype, np.float32))


def _relative(values: np.ndarray) -> np.ndarray:
    """To the largest magnitude."""
    largest = np.max(np.abs(values))
    return values / (largest if largest > 0 else 1)


def _cases(
    matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None
) -> list[tuple[str, str, jax.Array]]:
    """The label, colour and matrix of each there is."""
    first, second, *_ = COLOURS
    found = [("eigenvalues", first, jnp.asarray(_checked(matrix)))]
    if noisy is not None:
        found.append(("with noise", second, jnp.asarray(_checked(noisy))))
    return found


def _values(
    reports: Sequence[tuple[int, Mapping[str, LayerReport]]], path: str, field: str
) -> np.ndarray:
    """A layer's field at every step, NaN where it is not to be drawn."""
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
    _colour_bar(axes, ScalarMappable(norm, greys), "loss")


def _colours(count: int) -> list[Any]:
    """Told apart up to six, beyond that in an order."""
    import matplotlib

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))


def _colour_bar(axes: Axes, drawn: Any, label: str) -> Any:
    """As high as the axes, whatever the figure's layout."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(which="both", labelsize="x-small")
    return bar


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(which="both", labelsize="x-small")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize("x-small")


def _note(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", fontsize="x-small")


def _legend_above(axes: Axes) -> None:
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3}
    axes.legend(fontsize="x-small", frameon=False, **place)
