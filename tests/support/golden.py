"""Recorded trajectories: whole ones from beside the checkout, or their first steps, stored here.

The whole ones are `../shared/golden`, an archive for each case. Their main series was recorded from
the authors' released optimizer (github.com/AtlasAnalyticsLab/AdaFisher, at the commit that is
stored with each case), in float64. `paper_zeros` is a separate program's, by eqs. (3) and (4).

`golden.msgpack` has of each case its settings and first steps up to the second refresh: the initial
parameters, the batches, the losses, and the parameters after the last of these steps. It is made by

    python -m tests.support.golden
"""

import pathlib

import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

CASES = ["mlp", "mlp_nobias", "seq_linear", "cnn", "cnn_bn", "ln_block"]
WHOLE = pathlib.Path(__file__).resolve().parents[3] / "shared" / "golden"
STORED = pathlib.Path(__file__).with_name("golden.msgpack")


def load(case):
    """A case by the archives' keys, as much of it as there is."""
    return whole(case) if WHOLE.is_dir() else stored()[case]


def whole(case):
    return np.load(WHOLE / f"{case}.npz")


def stored():
    return msgpack_restore(STORED.read_bytes())


def first_steps(archive):
    """What is stored of a case."""
    steps = int(archive["config/TCov"]) + 1
    kept = {key: archive[key] for key in archive if key.startswith(("config", "names", "layer"))}
    kept |= {"config/num_steps": np.array(steps)}
    for step in range(steps):
        kept |= {key: archive[key] for key in (f"batch/{step}/x", f"batch/{step}/y")}
        kept[f"loss/{step}"] = archive[f"loss/{step}"]
    for name in archive["names/params"]:
        for key in (f"init/{name}", f"param/{steps - 1}/{name}"):
            kept[key] = archive[key]
        kept[f"paper_zeros/param/{name}"] = archive[f"paper_zeros/param/{name}"][steps - 1 : steps]
    kept["paper_zeros/loss"] = archive["paper_zeros/loss"][:steps]
    return {key: value.tolist() if small(value) else value for key, value in kept.items()}


def small(value):
    """Words and numbers are stored as such, as are the few integers."""
    return value.ndim == 0 or value.dtype.kind != "f"


if __name__ == "__main__":
    STORED.write_bytes(msgpack_serialize({case: first_steps(whole(case)) for case in CASES}))
