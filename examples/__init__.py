"""Programs that use adafisher_jax: `quickstart.py`, `many_devices.py`, training programs."""
