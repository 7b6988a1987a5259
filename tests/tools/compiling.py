"""How to compile what is run once."""

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""`compiler_options` for XLA's older emitter of kernels, unoptimised: a third of the time.

Fusions and collectives were decided on before: `meshes/test_collectives.py` checks the latter.
"""
