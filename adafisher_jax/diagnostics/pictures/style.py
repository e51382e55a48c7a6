"""What all pictures share: their colours, fonts and legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "bright" colours, which do not need red to be told from green.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
GREY = "0.4"


def colours(count: int) -> list[Any]:
    """Told apart up to six, beyond that in an order."""
    import matplotlib

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))


def colour_bar(axes: Axes, drawn: Any, label: str) -> Any:
    """As high as the axes, whatever the figure's layout."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(which="both", labelsize="x-small")
    return bar


def label(axes: Axes, x: str, y: str) -> None:
    """Of both axes."""
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(which="both", labelsize="x-small")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize("x-small")


def note(axes: Axes, text: str) -> None:
    """One number that sums the picture up."""
    axes.set_title(text, loc="right", fontsize="x-small")


def legend_above(axes: Axes) -> None:
    """Where it hides nothing."""
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3}
    axes.legend(fontsize="x-small", frameon=False, **place)
