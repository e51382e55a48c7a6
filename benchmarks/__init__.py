"""Measurements of adafisher_jax: `python -m benchmarks --help`."""
