"""Plots of whole factors: heat maps, discs over eigenvalues, and spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from adafisher_jax.diagnostics import concentration
from adafisher_jax.diagnostics.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINEAR_BELOW = 1e-3  # relative to the largest entry; smaller entries have linear colours
FLOOR = -60.0  # dB; magnitudes below it have the colour of the floor
_HOLLOW: dict[str, Any] = {"markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.7}
_TICK: dict[str, Any] = {"markersize": 8, "markeredgewidth": 1.0, "linestyle": "none"}


def heat_map(axes: Axes, matrix: jax.typing.ArrayLike) -> None:
    """Draws the entries of a matrix over the largest, in symmetric logarithmic colours.

    Args:
      axes: the axes to draw on.
      matrix: a matrix (n, n), such as a whole factor.

    Raises:
      ValueError: if the matrix is not square or not finite, as all functions here.

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
    bar = style.colour_bar(axes, image, "entry / largest")
    bar.set_ticks([-1, -0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1])
    bar.minorticks_off()
    style.label(axes, "column", "row")
    energy = concentration.diagonal_energy(jnp.asarray(scaled)).item()
    if np.isfinite(energy):
        style.note(axes, f"{energy:.0%} of squares on the diagonal")


def discs(
    axes: Axes, matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None = None
) -> None:
    """Draws Gershgorin's discs in the complex plane, and the eigenvalues in them.

    Args:
      axes: the axes to draw on.
      matrix: a symmetric matrix, (n, n).
      noisy: the matrix after `add_noise`. Half-discs above the real axis are then those of
        `matrix`, and half-discs below it those of `noisy`.

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
    axes.axhline(0, color=style.GREY, linewidth=0.5)
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
    style.label(axes, "real part", "imaginary part")
    style.legend_above(axes)


def eigenvalues(
    axes: Axes, matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None = None
) -> None:
    """Draws the eigenvalues, the largest first, and counts those above average (the Kaiser rule).

    The axis is logarithmic if the average is positive. It leaves out eigenvalues that are not
    positive or are round-off: below `n` times the type's precision, relative to the largest.

    Args:
      axes: the axes to draw on.
      matrix: a symmetric matrix, (n, n).
      noisy: the matrix after `add_noise`, drawn beside the first.

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
    average = np.mean(values)  # noise beside the diagonal does not change it
    if average > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=floor / 2)
    axes.axhline(average, color=style.GREY, linestyle="--", linewidth=0.8)
    axes.text(
        0.99,
        average,
        "average",
        fontsize="x-small",
        color=style.GREY,
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
    )
    axes.locator_params(axis="x", integer=True)
    style.label(axes, "index", "eigenvalue")
    axes.legend(loc="upper right", fontsize="x-small", frameon=False)


def fourier(axes: Axes, matrix: jax.typing.ArrayLike) -> None:
    """Draws the magnitudes of a matrix's Fourier transform, in decibels below the largest.

    The frequencies of rows rise upwards, so the line of a diagonal falls as the diagonal does.

    Args:
      axes: the axes to draw on.
      matrix: a matrix (n, n), such as a whole factor.

    Example:
      >>> import jax.numpy as jnp, matplotlib.figure
      >>> axes = matplotlib.figure.Figure().add_subplot()
      >>> fourier(axes, jnp.eye(2))
      >>> axes.images[0].get_array().round(3).tolist(), axes.images[0].get_extent()
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
    style.colour_bar(axes, image, "magnitude / largest (dB)")
    style.label(axes, "cycles per column", "cycles per row")
    ratio = concentration.signal_to_noise(scaled).item()
    if not np.isnan(ratio):
        style.note(axes, f"SNR {ratio:.1f} dB".replace("-", "−"))


def _checked(matrix: jax.typing.ArrayLike) -> np.ndarray:
    found = np.asarray(matrix)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"matrix: got shape {found.shape}, wanted a square one")
    if not np.isfinite(found).all():
        raise ValueError("matrix: got entries that are not finite")
    return found.astype(np.promote_types(found.dtype, np.float32))


def _relative(values: np.ndarray) -> np.ndarray:
    """Returns the values over the largest magnitude."""
    largest = np.max(np.abs(values))
    return values / (largest if largest > 0 else 1)


def _cases(
    matrix: jax.typing.ArrayLike, noisy: jax.typing.ArrayLike | None
) -> list[tuple[str, str, jax.Array]]:
    """Returns the label, colour and matrix of each matrix that is given."""
    first, second, *_ = style.COLOURS
    found = [("eigenvalues", first, jnp.asarray(_checked(matrix)))]
    if noisy is not None:
        found.append(("with noise", second, jnp.asarray(_checked(noisy))))
    return found
