"""Initial weights from a `.npz` or `.safetensors` file.

The file contains a model's variables by path, such as `params/stem/Conv_0/kernel`. The paths are
those of `flax.traverse_util.flatten_dict(variables, sep="/")`.
"""

import pathlib

import numpy as np
from flax import traverse_util

HEAD = "params/head/"


def load(path, variables):
    """Reads the arrays of a model, by path. A head for other classes is ignored, with a message.

    Args:
      path: the file.
      variables: the model's variables, or their shapes.

    Raises:
      ValueError: if the file is from another model.
    """
    wanted = traverse_util.flatten_dict(variables, sep="/")
    found = _read(pathlib.Path(path))
    wrong = {}
    for name in sorted(wanted | found):
        got, want = (
            np.shape(arrays[name]) if name in arrays else None for arrays in (found, wanted)
        )
        if got != want:
            wrong[name] = f"{name}: got {got}, wanted {want}"
    in_head = [name for name in wrong if name.startswith(HEAD)]
    if rest := [wrong[name] for name in wrong if name not in in_head]:
        raise ValueError(f"{path} is not of this model. " + "; ".join(rest))
    if in_head:
        print(f"{path}: the head starts anew. " + "; ".join(wrong[name] for name in in_head))
        found = {name: x for name, x in found.items() if not name.startswith(HEAD)}
    return {name: np.asarray(x, wanted[name].dtype) for name, x in found.items()}


def _read(path):
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return dict(stored)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    raise ValueError(f"weights in {path}: wanted .npz or .safetensors")


def put(arrays, variables):
    """The variables, with the arrays of the file in their places."""
    flat = traverse_util.flatten_dict(variables, sep="/") | arrays
    return traverse_util.unflatten_dict(flat, sep="/")
