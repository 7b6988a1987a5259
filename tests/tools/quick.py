"""Programs that run once, compiled in a hurry.

Without the optimiser, without the emitters that write one LLVM module a fusion, and in one part: a
program of one loss and its oracle takes 0.06 s of a core to compile instead of 0.35 s. For answers
that are compared up to a tolerance; what is claimed of bits, of HLO or of memory wants `jax.jit`.
Fusions and collectives are decided on before: `meshes/test_collectives.py` checks the latter.
"""

import functools

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # jaxlib 0.12 has no such option any more
    QUICK["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def run(fun, *args):
    """What `fun` returns, from one program, in NumPy."""
    return jax.device_get(quick_jit(fun)(*args))
