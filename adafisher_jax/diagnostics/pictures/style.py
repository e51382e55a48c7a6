"""The colours, fonts and legends that all plots share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "bright" colours, which do not need red to be told from green.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
GREY = "0.4"


def colours(count: int) -> list[Any]:
    """Returns distinct colours for up to six lines, and a sequence of colours for more."""
    import matplotlib

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))


def colour_bar(axes: Axes, drawn: Any, label: str) -> Any:
    """Draws a colour bar as high as the axes, in any layout of the figure."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(which="both", labelsize="x-small")
    return bar


def label(axes: Axes, x: str, y: str) -> None:
    """Labels both axes."""
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(which="both", labelsize="x-small")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize("x-small")


def note(axes: Axes, text: str) -> None:
    """Writes a short note above the axes, at the right."""
    axes.set_title(text, loc="right", fontsize="x-small")


def legend_above(axes: Axes) -> None:
    """Draws the legend above the axes, where it covers nothing."""
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3}
    axes.legend(fontsize="x-small", frameon=False, **place)
