"""Notebooks as Python files, in jupytext's percent format: `python -m examples.notebooks`."""
