"""What a training program needs besides its model and its data."""
