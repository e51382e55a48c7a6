"""What makes the documentation site from docs/ and the docstrings."""
