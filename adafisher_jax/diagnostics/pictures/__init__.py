"""Pictures of the curvature, drawn on matplotlib's axes.

Each function draws the numbers of another one of this package. The figure is the caller's, with
its size, layout, titles and file; fonts are relative to `font.size`. matplotlib comes with the
extra `examples`.
"""

from adafisher_jax.diagnostics.pictures.matrices import discs, eigenvalues, fourier, heat_map
from adafisher_jax.diagnostics.pictures.style import COLOURS
from adafisher_jax.diagnostics.pictures.training import over_training, trajectories

__all__ = [
    "COLOURS",
    "discs",
    "eigenvalues",
    "fourier",
    "heat_map",
    "over_training",
    "trajectories",
]
