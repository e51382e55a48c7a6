"""Plots of the curvature, drawn on matplotlib's axes.

Each function draws the numbers that another function of this package computes. The caller makes the
figure and sets its size, layout, titles and file. Fonts are relative to `font.size`. matplotlib
comes with the extra `examples`.
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
