"""Many devices, in processes of their own: how many there are is settled before JAX starts."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.support.compiling import FLAGS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(*command, devices=8):
    """A Python process with virtual CPU devices."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    """What they print, if all end well."""
    try:
        printed = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("mapped", ["-m", ""]),
        ("sharded", ["-m", "not slow"]),
        *(("sharded", ["-m", "slow", "--slow-share", f"{i}/6"]) for i in range(1, 7)),
    ],
    ids=lambda one: one if isinstance(one, str) else one[-1],
)
def test_on_eight_devices(name, marked):
    options = ("-n", "0", "-q", "-p", "no:cacheprovider", *marked)
    (printed,) = finish(start("-m", "pytest", *options, f"tests/devices/{name}.py"))
    assert " passed" in printed


@pytest.mark.slow
def test_on_two_processes_of_four_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ("-m", "tests.devices.process")
    printed = finish(*(start(*command, index, 2, port, devices=4) for index in range(2)))
    assert all("equal 5" in text for text in printed)


@pytest.mark.slow
def test_factors_add_less_than_a_hundredth_to_the_gradients_bytes(tmp_path):
    options = ("--quick", "--only", "width 256", "--out", tmp_path)
    finish(start("-m", "benchmarks", "communication", *options))
    rows = json.loads((tmp_path / "communication.json").read_text())["rows"]
    without, _, added = (row["of_parameters"] for row in rows)
    assert without >= 1
    assert 0 < added < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_example_equals_one_device(processes):
    (printed,) = finish(start("examples/many_devices.py", "--processes", processes))
    assert f"{processes} processes, 8 devices" in printed
