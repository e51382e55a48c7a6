"""What a study found, as pictures of its rows."""

import math

from benchmarks.plots import COLOURS

COLOURS = [*COLOURS, *"#aa3377 #000000 #994455 #997700 #88ccaa #771155 #ff8800".split()]


def curves(figure, rows):
    """Training losses on the way, means over seeds of which none diverged."""
    for axes, row, colour in _panels(figure, rows):
        if row["curve"] and not row["diverged"]:
            axes.plot(
                *zip(*row["curve"], strict=True), color=colour, label=row["optimizer"], lw=1.2
            )
        axes.set(xlabel="step", yscale="log")
    _legend(figure)


def robustness(figure, rows):
    """Training loss at the end against the learning rate, the best over other settings."""
    for axes, row, colour in _panels(figure, rows):
        rates, losses, _ = zip(*row["tuning"], strict=True)
        shown = [math.nan if loss is None else loss for loss in losses]
        axes.plot(rates, shown, "o-", ms=3, lw=1.2, color=colour, label=row["optimizer"])
        axes.set(xlabel="learning rate", xscale="log", yscale="log")
    _legend(figure)


def _panels(figure, rows):
    """Each row with the panel of its problem and the colour of its optimizer."""
    problems, optimizers = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("problem", "optimizer")
    )
    columns = min(len(problems), 4)
    lines = math.ceil(len(problems) / columns)
    figure.set_size_inches(3 * columns, 2.6 * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(problems) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("training loss")
    for axes, problem in zip(grid, problems, strict=False):
        axes.set_title(problem)
        axes.tick_params(which="both", labelsize=7)
    for row in rows:
        colour = COLOURS[optimizers.index(row["optimizer"]) % len(COLOURS)]
        yield grid[problems.index(row["problem"])], row, colour


def _legend(figure):
    found = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    figure.legend(found.values(), found, loc="outside upper center", ncols=5, fontsize=7)
