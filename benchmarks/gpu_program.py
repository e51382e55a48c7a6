"""What XLA compiles for an H200: kernels, and the bytes that they read and write.

No GPU is needed, but the compiler: `pip install -e '.[benchmarks,cuda]'`. A kernel's operands and
results are counted once each, a loop's as often as it runs. A call of cuBLAS, cuDNN or cuSOLVER
counts as one kernel, without its workspace, and an array of which a kernel reads a slice as if it
read the whole. Nothing is run, so that no time is measured.
"""

import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import optimizers, plots, tasks
from benchmarks.measure import temp_bytes
from benchmarks.steps import gradient, update_step
from benchmarks.update import PLAIN

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there need be no driver

PACKAGES = ["jax-cuda13-plugin"]
COLUMNS = "name kernels kernel_ratio mb ratio to_reach temp_mb".split()
UPDATED = ["wide_mlp", "resnet50", "transformer24", "scanned_transformer24", "gpt2_small"]
CAPTURED = ["mlp", "conv_net", "resnet50", "transformer", "gpt2_small"]
GPU = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
# Autotuning would need the device; without it, products are better left to cuBLAS.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# An array of bytes is workspace.
BYTES = {"s8": 0, "u8": 0, "pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{$(.*?)^\}$", re.M | re.S)
INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.-]+) = (.*?) ([a-z-]+)\((.*?)\)(.*)$", re.M)
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")


def cases(options):
    kept = [rule + optimizers.KEPT for rule in optimizers.RULES]
    return {f"update of {name}": [*optimizers.RULES, *kept, *PLAIN] for name in UPDATED} | {
        f"gradient of {name}": ["with factors", "alone"] for name in CAPTURED
    }


def run(case, labels, options):
    kind, _, name = case.partition(" of ")
    task = tasks.make(name, options.quick)
    baseline = "adamw" if kind == "update" else "alone"
    found = {label: compiled(task, kind, label) for label in dict.fromkeys([baseline, *labels])}
    kernels, moved = cost(found[baseline].as_text())
    for label in labels:
        own_kernels, own_moved = cost(found[label].as_text())
        to_reach = 0.72 if kind == "update" and label not in PLAIN else None
        yield (
            label,
            {
                "kernels": own_kernels,
                "kernel_ratio": own_kernels / kernels,
                "mb": own_moved / 1e6,
                "ratio": own_moved / moved,
                "quartiles": [own_moved / moved] * 2,  # it is the same each time
                "to_reach": to_reach,
                "temp_mb": temp_bytes(found[label]) / 1e6,
            },
        )


def compiled(task, kind, label):
    """An optimizer's update of a task's parameters, or their gradient, for the GPU above."""
    params, batch = task.shapes(), jax.eval_shape(task.batch)
    if kind == "update":
        tx = optimizers.make(label.removesuffix(optimizers.KEPT), task.layout)
        zeros = {layer.path: jax.eval_shape(layer.zeros) for layer in task.layout.layers}
        factors = zeros if label in optimizers.RULES else None
        state = params, jax.eval_shape(tx.init, params)
        program, arguments = jax.jit(update_step(tx), donate_argnums=0), (state, params, factors)
    else:
        program, arguments = jax.jit(gradient(task, label == "with factors")), (params, *batch)
    return program.lower(*on_gpu(arguments)).compile(compiler_options=OPTIONS)


def on_gpu(shapes):
    try:
        topology = topologies.get_topology_desc("", "cuda", target_config=GPU, topology="1x1x1")
    except (NotImplementedError, RuntimeError) as error:
        raise SystemExit("gpu_program: needs pip install -e '.[benchmarks,cuda]'") from error
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def cost(program):
    """How many kernels the text of a compiled program runs, and the bytes they read and write."""
    computations = {name: INSTRUCTION.findall(text) for name, text in COMPUTATION.findall(program)}

    def of(computation):
        sizes, kernels, moved = {}, 0, 0
        for name, shape, operation, operands, rest in computations[computation]:
            sizes[name] = nbytes(shape)
            if operation == "while":
                (body,) = re.findall(r"body=%([\w.-]+)", rest)
                (times,) = re.findall(r'"known_trip_count":\{"n":"(\d+)"', rest)
                found = [int(times) * part for part in of(body)]
            elif operation in FREE:
                found = [0, 0]
            else:
                read = set(re.findall(r"%([\w.-]+)", operands))
                found = [1, sizes[name] + sum(sizes[one] for one in read)]
            kernels, moved = kernels + found[0], moved + found[1]
        return kernels, moved

    (entry,) = re.findall(r"^ENTRY %([\w.-]+)", program, re.M)
    return of(entry)


def nbytes(shape):
    """Of an array or a tuple of arrays."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES[kind] * math.prod(map(int, re.findall(r"\d+", n))) for kind, n in arrays)


def plot(figure, rows):
    beside = {"kernel_ratio": ("kernels", 1)}
    plots.ratios(
        figure, rows, "bytes moved on an H200, against AdamW's or no factors'", beside=beside
    )
