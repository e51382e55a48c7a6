"""A training program for small language models: `python -m examples.language_model --help`."""
