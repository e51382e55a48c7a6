"""Image classifiers: the models, data and training program of the paper's experiments."""
