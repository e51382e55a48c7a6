"""What the training programs share: loop, optimizers, settings, checkpoints and records."""
