"""How things are measured: steps taken in turn, and what compiled programs tell of themselves."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

WARM_UP = 2  # rounds
SAMPLE = 0.1  # seconds, at least: what another contender left in the caches matters little


class Contender:
    """A step and the state it replaces; `cycle`: after how many steps its cost repeats."""

    def __init__(self, step: Callable[[Any], Any], state: Any = None, cycle: int = 1):
        self.step, self.state, self.cycle = step, state, cycle

    def run(self, steps: int) -> float:
        """Seconds for each of some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.state)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps

    def steps(self) -> int:
        """How many make up a sample: whole cycles."""
        self.run(1)
        return self.cycle * math.ceil(max(SAMPLE / self.run(1) / self.cycle, 1))


def interleaved(contenders: Mapping[str, Contender], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step of each contender in each round, taken in turn, forth and back."""
    steps = {name: contender.steps() for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            seconds[name].append(contenders[name].run(steps[name]))
    return {name: np.array(found[WARM_UP:]) for name, found in seconds.items()}


def timing(seconds: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """A row's columns: the median, and the median and quartiles of the rounds' ratios."""
    low, middle, high = np.quantile(seconds / baseline, [0.25, 0.5, 0.75])
    return {
        "ms": 1e3 * float(np.median(seconds)),
        "ratio": float(middle),
        "quartiles": [float(low), float(high)],
    }


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """A function of a state and of arguments, compiled to donate the state."""
    return jax.jit(function, donate_argnums=0).lower(*args).compile()


def contender(function: Callable[..., Any], state: Any, *args: Any) -> Contender:
    """Of a function of a state, which becomes its own, and of arguments."""
    program = compiled(function, state, *args)
    return Contender(lambda state: program(state, *args), state)


def temp_bytes(program: Any) -> int:
    """What a compiled program needs beside arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
