"""Detects a run that has diverged, so that it stops early."""

import dataclasses
import math

FACTOR, PATIENCE = 2.0, 100


@dataclasses.dataclass
class Watch:
    """Watches the loss of each step.

    Attributes:
      start: the loss of the first step.
      above: the number of losses in a row above `FACTOR` times `start`.
      verdict: how the run diverged, or "".
    """

    start: float | None = None
    above: int = 0
    verdict: str = ""

    def see(self, step: int, loss: float) -> None:
        if self.verdict:
            return
        if not math.isfinite(loss):
            self.verdict = f"the loss is {loss} at step {step}"
            return
        self.start = loss if self.start is None else self.start
        self.above = self.above + 1 if loss > FACTOR * abs(self.start) else 0
        if self.above >= PATIENCE:
            self.verdict = (
                f"for {PATIENCE} steps, at step {step}, the loss is above {FACTOR:g} times its "
                f"start {self.start:.4g}: {loss:.4g}"
            )
