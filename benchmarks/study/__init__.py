"""Optimizers side by side on real tasks, each at its own best learning rate.

`problems` → `trial` (one run) → `plan` (which runs) → `results` (kept) → `tables`, `figures`.
"""
