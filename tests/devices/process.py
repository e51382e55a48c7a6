"""One of several processes that train together: every plan and rule equals one device.

    python -m tests.devices.process <index> <processes> <port>

Started by `tests/devices/test_processes.py`.
"""

import sys

import jax
from jax.experimental import multihost_utils

from tests.devices.sharded import PLANS, make_mesh, place, train_pinned
from tests.devices.tasks import assert_close, make_task, on_one_device


def main(index, processes, port):
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    assert jax.device_count() == 8
    assert jax.local_device_count() == 8 // processes
    task = make_task("perceptron")
    runs = [("centered", plan) for plan in PLANS]
    runs += [(rule, "tensor parallel") for rule in ("paper", "official")]
    for rule, name in runs:
        plan, expected = PLANS[name], on_one_device("perceptron", "float64", rule)
        mesh = make_mesh(plan)
        run = train_pinned(task, rule, mesh, place(plan, mesh, task.params))
        assert_close(multihost_utils.process_allgather(run, tiled=True), expected, 1e-9)
        assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(run))
    print("equal", len(runs))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
