"""Trains a small language model: `python -m examples.language_model --help`."""
