"""Programs that are compiled in a hurry.

Compiling takes most of the time of tests this small. A program that runs once or twice needs no
tuning, and a CPU's older emitter of fusions is ready sooner.
"""

import functools

import jax

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
fast_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
