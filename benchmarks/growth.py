"""How time, memory and statistics of a train step grow, with factors and without.

The rule is "centered". `statistics` is the optimizer's state beyond the momentum.
"""

from benchmarks import plots, tasks
from benchmarks.measure import Contender, compiled, interleaved, nbytes, temp_bytes, timing
from benchmarks.steps import train_step
from benchmarks.train_step import stepped

COLUMNS = "name ms ms_without ratio temp_mb temp_mb_without statistics_kb weights_kb".split()
RULE = "adafisher:centered"
POINTS = {
    "width": [64, 128, 256, 512, 1024],
    "layers": [1, 2, 4, 8, 16],
    "batch": [2, 4, 8, 16, 32],
    "length": [32, 64, 128, 256, 512],
    "kernel": [1, 3, 5, 7, 9],
}
TRANSFORMER = {"width": 256, "layers": 2, "length": 64, "vocabulary": 1024, "batch": 4}
CONV_NET = {"features": (32, 64, 64, 64), "side": 32, "batch": 16}
TINY = {"width": 64, "layers": 1, "length": 8, "vocabulary": 64, "batch": 1}


def cases(options):
    return {
        axis: [str(point) for point in (points[:2] if options.quick else points)]
        for axis, points in POINTS.items()
    }


def run(case, labels, options):
    for label in labels:
        task = at(case, int(label), options.quick)
        params, batch = task.params(), task.batch()
        contenders, temp = {}, {}
        for name, with_factors in {"with": True, "without": False}.items():
            step, start = train_step(task, RULE, with_factors)
            first = start(params)
            program = compiled(step, first, *batch)
            contenders[name] = Contender(stepped(program, batch), first)
            temp[name] = temp_bytes(program) / 1e6
            state = nbytes(first[1])
        seconds = interleaved(contenders, options.rounds)
        yield (
            label,
            timing(seconds["with"], seconds["without"])
            | {
                "at": int(label),
                "ms_without": timing(seconds["without"], seconds["with"])["ms"],
                "temp_mb": temp["with"],
                "temp_mb_without": temp["without"],
                "statistics_kb": (state - nbytes(params)) / 1e3,
                "weights_kb": nbytes(params) / 1e3,
            },
        )


def at(axis, point, quick):
    if axis == "kernel":
        sizes = CONV_NET | ({"side": 8, "batch": 1} if quick else {})
        return tasks.conv_net(axis, **sizes, kernel=point)
    return tasks.transformer(axis, **(TINY if quick else TRANSFORMER) | {axis: point})


def plot(figure, rows):
    lines = {
        "ms per step": {"ms": "with factors", "ms_without": "without"},
        "temp memory, MB": {"temp_mb": "with factors", "temp_mb_without": "without"},
        "state, kB": {"statistics_kb": "statistics", "weights_kb": "weights, for comparison"},
    }
    plots.lines(figure, rows, lines)
