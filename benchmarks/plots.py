"""Two kinds of plot: bars of ratios, and lines of growth."""

import numpy as np

COLOURS = ["#4477aa", "#66ccee", "#228833", "#bbbbbb", "#ccbb44", "#ee6677"]
BAR = "crimson"


def ratios(figure, rows, title, bar="to_reach", log=False, beside=None):
    """A bar for each row, with its quartiles, a line at one, and a mark where it is to be.

    `beside`: key → (title, bar) of further ratios, in panels of their own.
    """
    rows = [row for row in rows if "ratio" in row]
    if not rows:
        return
    cases = list(dict.fromkeys(row["case"] for row in rows))
    places = np.array([place + cases.index(row["case"]) for place, row in enumerate(rows)])
    colours = [COLOURS[cases.index(row["case"]) % len(COLOURS)] for row in rows]
    beside = beside or {}
    figure.set_size_inches(8 + 2 * len(beside), 0.9 + 0.26 * (len(rows) + len(cases)))
    sizes = [3] + [1] * len(beside)
    first, *others = figure.subplots(1, len(sizes), sharey=True, width_ratios=sizes, squeeze=False)[
        0
    ]

    low, high = np.array([row["quartiles"] for row in rows]).T
    middle = np.array([row["ratio"] for row in rows])
    error = np.maximum([middle - low, high - middle], 0)
    first.barh(places, middle, color=colours, xerr=error, error_kw={"lw": 1, "ecolor": "0.25"})
    marked = [(row[bar], place) for row, place in zip(rows, places, strict=True) if row.get(bar)]
    if marked:
        x, y = np.array(marked).T
        first.vlines(x, y - 0.45, y + 0.45, color=BAR, lw=2, label=bar.replace("_", " "))
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    first.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    first.invert_yaxis()
    first.set_title(title, fontsize=10)
    if log:
        first.set_xscale("log")
    for axes, (key, (name, value)) in zip(others, beside.items(), strict=True):
        axes.barh(places, [row[key] for row in rows], color=colours)
        axes.axvline(value, color=BAR, lw=1)
        axes.set_title(name, fontsize=10)
    for axes in [first, *others]:
        axes.axvline(1, color="0.4", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def lines(figure, rows, wanted):
    """A column for each case, a line of panels for each quantity, of one or more keys."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure.set_size_inches(2.8 * len(cases), 2.3 * len(wanted))
    grid = figure.subplots(len(wanted), len(cases), squeeze=False)
    for panels, (quantity, keys) in zip(grid, wanted.items(), strict=True):
        panels[0].set_ylabel(quantity)
        for axes, case in zip(panels, cases, strict=True):
            points = [row for row in rows if row["case"] == case]
            for colour, (key, label) in zip(("#4477aa", "#ee6677"), keys.items(), strict=True):
                at = [row["at"] for row in points]
                axes.plot(at, [row[key] for row in points], "o-", color=colour, label=label, ms=4)
            axes.set_xscale("log", base=2)
            values = [row[key] for row in points for key in keys]
            if min(values) > 0 and max(values) > 10 * min(values):
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.1 * max(values))
            axes.set_xticks(at, at)
            axes.xaxis.minorticks_off()
            axes.tick_params(labelsize=7)
        panels[0].legend(fontsize=7)
    for axes, case in zip(grid[-1], cases, strict=True):
        axes.set_xlabel(case)
