"""The models, the data and the training program of the paper's image experiments."""
