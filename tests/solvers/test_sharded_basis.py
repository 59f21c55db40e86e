"""Both basis solvers with the experts spread over eight virtual devices: the same fit as on one."""

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.variable_projection import variable_projection

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
weight = (np.random.default_rng(0).normal(size=(16, 6, 20)) * 0.02).astype(np.float32)
moment = np.stack([np.diag(np.geomspace(1, 0.1, 20))] * 16).astype(np.float32)
spread = NamedSharding(mesh, PartitionSpec("expert"))

# Few steps: another order of sums is another rounding, and rounding grows along the path.
for solve, options in ((learn_basis, {"steps": 10}), (variable_projection, {"steps": 10, "trial": 3})):
    fit = lambda w, c: solve(w, bases=3, rank=5, moment=c, **options)
    alone = jax.jit(fit)(weight, moment)
    compiled = jax.jit(fit).lower(jax.device_put(weight, spread), jax.device_put(moment, spread)).compile()
    together = compiled(jax.device_put(weight, spread), jax.device_put(moment, spread))
    assert together.coefficients.sharding.spec[0] == "expert", together.coefficients.sharding
    for name in ("losses", "error", "coefficients", "bases", "mixing"):
        a, b = np.asarray(getattr(alone, name)), np.asarray(getattr(together, name))
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(a).max(), err_msg=f"{solve.__name__} {name}")
    assert float(together.losses[-1]) < float(together.losses[0])
    # No device ever gathers the weights of all experts.
    assert "f32[16,6,20]" not in compiled.as_text(), solve.__name__
print("equal")
"""


def test_eight_devices_equal_one():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    # Eight devices that wait for each other need as many threads, however few cores there are.
    environment["NPROC"] = "32"
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == "equal", ran.stderr
