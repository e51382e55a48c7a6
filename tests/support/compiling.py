"""Programs are compiled in a hurry.

Compiling takes most of the time of tests this small. A program that runs once or twice needs no
tuning, and a CPU's older emitter of fusions is ready sooner.
"""

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
)
