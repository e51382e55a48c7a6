"""Diagnostics: what the optimizer does to each layer, and how well diagonals describe it.

- `report`, `table`, `scalars`: a live report from the optimizer's state, inside a jitted step.
- `averages`: the stored averages of each layer.
- `full_factors`, `pool`: the whole Kronecker factors of chosen layers.
- `diagonal_energy`, `gershgorin`, `add_noise`, `eigenvalues`, `kaiser`, `fourier`,
  `signal_to_noise`: how diagonal a whole factor is.
- `compare_steps`: steps of the approximations beside those of the exact empirical Fisher.
- `landscape`: the loss on the plane in which several optimizers moved.
- `pictures`: plots of all of these, with matplotlib.
"""

from adafisher_jax.diagnostics import landscape, pictures
from adafisher_jax.diagnostics.approximation import Comparison, Deviation, compare_steps
from adafisher_jax.diagnostics.concentration import (
    Discs,
    add_noise,
    diagonal_energy,
    eigenvalues,
    fourier,
    gershgorin,
    kaiser,
    signal_to_noise,
)
from adafisher_jax.diagnostics.full_factors import FullFactor, full_factors, pool
from adafisher_jax.diagnostics.live import LayerReport, report, scalars, table
from adafisher_jax.diagnostics.stored import averages

__all__ = [
    "Comparison",
    "Deviation",
    "Discs",
    "FullFactor",
    "LayerReport",
    "add_noise",
    "averages",
    "compare_steps",
    "diagonal_energy",
    "eigenvalues",
    "fourier",
    "full_factors",
    "gershgorin",
    "kaiser",
    "landscape",
    "pictures",
    "pool",
    "report",
    "scalars",
    "signal_to_noise",
    "table",
]
