"""What a study found, as pictures."""

import math

import numpy as np

from benchmarks.plots import COLOURS

COLOURS = [*COLOURS, "#aa3377", "#000000", "#994455", "#997700", "#88ccaa", "#771155"]


def curves(figure, by, results):
    """Training losses on the way, means over seeds; `by`: (problem, optimizer) → trials."""
    for axes, problem, names in _panels(figure, by):
        for name in names:
            runs = [results[trial]["curve"] for trial in by[problem, name]]
            shortest = min(map(len, runs))
            steps, losses = np.mean([run[:shortest] for run in runs], 0).T
            axes.plot(steps, losses, color=_colour(name, by), label=name, lw=1.2)
        axes.set(title=problem, xlabel="step", yscale="log")
    _legend(figure)


def robustness(figure, by, results):
    """Training loss at the end against the learning rate, the best over other settings."""
    for axes, problem, names in _panels(figure, by):
        for name in names:
            ends = {}
            for trial in by[problem, name]:
                loss = results[trial].get("train_loss", math.nan)
                ends[trial.rate] = np.fmin(ends.get(trial.rate, math.nan), loss)
            points = zip(*sorted(ends.items()), strict=True)
            axes.plot(*points, "o-", ms=3, lw=1.2, color=_colour(name, by), label=name)
        axes.set(title=problem, xlabel="learning rate", xscale="log", yscale="log")
    _legend(figure)


def _panels(figure, by_problem):
    problems = list(dict.fromkeys(problem for problem, _ in by_problem))
    columns = min(len(problems), 4)
    lines = math.ceil(len(problems) / columns)
    figure.set_size_inches(3 * columns, 2.6 * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(problems) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("training loss")
    for axes, problem in zip(grid, problems, strict=False):
        axes.tick_params(labelsize=7)
        yield axes, problem, [name for at, name in by_problem if at == problem]


def _colour(name, by_problem):
    names = list(dict.fromkeys(name for _, name in by_problem))
    return COLOURS[names.index(name) % len(COLOURS)]


def _legend(figure):
    found = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    figure.legend(found.values(), found, loc="outside lower center", ncols=5, fontsize=7)
