# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. On a TPU or GPU: mesh, sharding, precision
#
# The numerical functions of jaxmoe are pure functions of arrays with a leading expert axis. They contain nothing about
# devices: where the arrays lie decides where the work is done, and `jit` cuts the program up. This notebook runs on
# eight *virtual* devices of a CPU; on a machine with accelerators the same lines use those.

# %%
import math
import os
import re
from functools import partial

# Both are for the CPU alone, and have to stand before JAX is imported. Devices that wait for each other hold a thread
# each: with no more threads than devices, as on a machine of few cores, they can wait for ever.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "32")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmoe
from jaxmoe.data import demo_checkpoint
from jaxmoe.model import forward
from jaxmoe.recovery.sharding import place_parameters, training_mesh

print(f"{jax.device_count()} devices, {jax.default_backend()}")

# %% [markdown]
# ## A mesh with one axis: experts
#
# The experts of a layer are independent in most methods, so the natural split is along their axis. `Auto` axes let the
# compiler choose the sharding of everything in between.

# %%
mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, PartitionSpec("expert"))

checkpoint = jaxmoe.Checkpoint.open(demo_checkpoint())
layer = checkpoint.layers[1]
matrices = {name: jnp.asarray(checkpoint.projection(layer, name), jnp.float32) for name in ("gate", "up")}
weight = jaxmoe.stack(matrices, "gate_up")
sharded = jax.device_put(weight, spread)
print(f"all experts {weight.shape}, on each device {sharded.addressable_shards[0].data.shape}")

# %% [markdown]
# ## Experts that share nothing: no communication
#
# SVD treats every expert by itself. The compiled program shows it: not one collective operation, and the factors stay
# where their experts are.

# %%
COLLECTIVES = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")


def compare(function, array):
    """Print what a function's program sends between devices, and return its results on all devices and on one."""
    program = jax.jit(function).lower(array).compile()
    moved = {}
    for arrays, name in COLLECTIVES.findall(program.as_text()):
        sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\w\[([\d,]*)\]", arrays)]
        moved[name] = max(moved.get(name, 0), *sizes)
    print("collective operations, and the most numbers that one of them moves:", moved or "none")
    together = jax.block_until_ready(program(array))
    return together, jax.jit(function)(jax.device_put(array, jax.devices()[0]))


together, alone = compare(partial(jaxmoe.weighted_svd, rank=20), sharded)
print(f"left factors lie along {together.left.sharding.spec}")
difference = np.abs(np.asarray(together.left @ together.right) - np.asarray(alone.left @ alone.right)).max()
print(f"largest difference from one device: {difference:.0e}")

# %% [markdown]
# ## Experts that share bases: the bases travel, the weights stay
#
# MoBE learns bases that serve all experts. Every device works on its own experts, the gradients of the bases are added
# up over all devices (all-reduce) and the bases made known to all (all-gather). The weights are ten times as many
# numbers and stay where they are.

# %%
options = {"bases": 5, "rank": 38, "steps": 20, "trial": 5}
together, alone = compare(partial(jaxmoe.variable_projection, **options), sharded)
print(f"{together.bases.size:,} numbers in the bases, {weight.size:,} in the weights")
print(f"coefficients lie along {together.coefficients.sharding.spec}, bases along {together.bases.sharding.spec}")
print(f"relative error {together.error.mean():.5f} on eight devices, {alone.error.mean():.5f} on one")

# %% [markdown]
# The two differ a little: sums in another order round otherwise, and an iterative fit carries that on. Results are the
# same bytes for the same number of devices.
#
# ## A mesh with two axes: rows of text and experts
#
# The model is a pure function too, `forward(tokens, parameters, spec)`. `place_parameters` puts what has an expert axis
# along `expert` and everything else on all devices; the tokens, `[sequence, position]`, lie along `data`. That is what
# `jaxmoe recover --mesh 4x2` trains with.

# %%
model = jaxmoe.StoredModel(demo_checkpoint())
both = training_mesh(4, 2)
tokens = jax.random.randint(jax.random.key(0), (8, 64), 0, 4096)
parameters = model.parameters()
run = jax.jit(forward, static_argnames="spec")

placed = place_parameters(parameters, model.spec, both)
rows = jax.device_put(tokens, NamedSharding(both, PartitionSpec("data")))
logits = jax.block_until_ready(run(rows, placed, model.spec))
difference = jnp.abs(logits - run(tokens, parameters, model.spec)).max()
print(f"logits {logits.shape} along {logits.sharding.spec}, largest difference {float(difference):.1e}")

# %% [markdown]
# ## Precision
#
# A float32 product is not always one: by default a TPU rounds the factors to bfloat16, and a GPU to TF32. Inside jaxmoe
# the products that matter (Gram matrices, projections, reconstruction) ask for `Precision.HIGHEST`, whatever the
# default is. Your own functions have to do that themselves. What is at stake, with the rounding of a TPU done by hand:

# %%
fit = jax.jit(jaxmoe.weighted_svd, static_argnames="rank")(weight, rank=min(weight.shape[1:]))


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def relative(error):
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(weight))


ranks = [16, 32, 64, 96, 120, 126, 128]
exact = [relative(weight - jnp.matmul(fit.left[..., :r], fit.right[:, :r], precision="highest")) for r in ranks]
coarse = [relative(weight - rounded(fit.left[..., :r]) @ rounded(fit.right[:, :r])) for r in ranks]

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.semilogy(ranks, coarse, "o-", label="factors rounded to bfloat16")
axes.semilogy(ranks, exact, "s--", label="Precision.HIGHEST")
axes.set_xlabel("rank")
axes.set_ylabel("relative error")
axes.legend(frameon=False)
plt.show()
print(f"at rank 64: {coarse[2]:.4f} and {exact[2]:.4f}; at full rank: {coarse[-1]:.0e} and {exact[-1]:.0e}")

# %% [markdown]
# At the ranks that save anything, the rounding is nothing beside what truncation costs: storing factors in bfloat16 is
# harmless, and so is running the model in it. It is the *fit* that needs float32: differences of nearly equal numbers,
# and Gram matrices, which square the condition number. Where a second moment weighs an SVD, jaxmoe goes to float64
# inside `jax.enable_x64(True)`; a TPU computes that in software, slowly.
