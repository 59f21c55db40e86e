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
# # 2. The methods on one layer, function by function
#
# Each method writes the experts of a layer as a sum of a few stored terms and differs in which terms, who shares them
# and how they are fitted. Below, every method is two or three calls of pure functions on arrays, at the same number of
# stored parameters, so that the errors can be compared.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxmoe
from jaxmoe import scores
from jaxmoe.allocation import ranks_by_importance, water_fill
from jaxmoe.comparison.diagnostics import spectra
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.report import plots
from jaxmoe.solvers.basis_size import choose_bases
from jaxmoe.solvers.group_spectra import group_energies
from jaxmoe.solvers.merging import regmean, shared_energy

# %% [markdown]
# ## One layer
#
# `gate` and `up` read the same tokens, so they are stacked along their outputs into one matrix per expert, `[expert,
# out, in]`. What the experts of this layer read is known from calibration: `C_e = E[x xᵀ]`, one second moment `[in,
# in]` per expert, pulled towards the mean of all experts where an expert saw few tokens.

# %%
checkpoint = jaxmoe.Checkpoint.open(demo_checkpoint())
layer = checkpoint.layers[1]
matrices = {name: jnp.asarray(checkpoint.projection(layer, name), jnp.float32) for name in ("gate", "up")}
weight = jaxmoe.stack(matrices, "gate_up")
experts, out, in_ = weight.shape

statistics = jaxmoe.calibrate(checkpoint.folder, f"{tempfile.mkdtemp()}/statistics", text=demo_texts(), sequences=8)
sums = statistics.layer(layer.index)
moment = jnp.asarray(jaxmoe.expert_moments(sums.weighted_input_moments, sums.counts), jnp.float32)
print(f"weights {weight.shape}, second moments {moment.shape}, {sums.tokens:,} tokens")

# %% [markdown]
# ## Why low rank is hard, and why tokens help
#
# The singular values of trained experts fall slowly: a quarter of them cannot stand for all. Weighed by the second
# moment they fall much faster, because tokens live in few directions.

# %%
plain = jax.jit(jaxmoe.weighted_svd, static_argnames="rank")(weight, rank=1).energies
seen = jax.jit(jaxmoe.weighted_svd, static_argnames="rank")(weight, rank=1, column_moment=moment).energies

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
plots.plot_spectra(spectra(checkpoint), axes[0], projection="up")
for name, energies in (("plain", plain), ("weighted by C", seen)):
    left = 1 - np.cumsum(energies, axis=1) / np.sum(energies, axis=1, keepdims=True)
    axes[1].plot(np.sqrt(np.maximum(left, 0)).mean(0), label=name)
axes[1].set_xlabel("rank kept, gate and up stacked")
axes[1].set_ylabel("relative error")
axes[1].legend(frameon=False)
plt.show()
print(f"effective rank of {min(out, in_)}: {float(scores.effective_rank(plain).mean()):.0f} plain,")
print(f"{float(scores.effective_rank(seen).mean()):.0f} weighted, mean over experts")

# %% [markdown]
# ## The budget
#
# 40 % of the numbers may be kept. The error of all methods is measured alike: how far the experts' outputs are off on
# real tokens, `|| (W - What) C^(1/2) || / || W C^(1/2) ||`, beside the plain relative error of the weights.

# %%
budget = int(0.4 * weight.size)
rows = {}


@jax.jit
def relative_error(matrices, c):
    def energy(x):
        return jnp.einsum("eoi,eij,eoj->", x, c, x, precision="highest")

    return jnp.sqrt(energy(weight - matrices) / energy(weight))


def record(name, *terms):
    """Note the stored numbers of a sum of terms and its two errors."""
    matrices = sum(term.materialize() for term in terms)
    count = sum(term.count().numbers for term in terms)
    even = jnp.broadcast_to(jnp.eye(in_), moment.shape)
    rows[name] = (count / weight.size, float(relative_error(matrices, even)), float(relative_error(matrices, moment)))
    print(f"{name:30} keeps {rows[name][0]:.4f}   weights {rows[name][1]:.3f}   outputs {rows[name][2]:.3f}")


# %% [markdown]
# ## `svd`: a pair of thin factors for every expert
#
# `W_e = L_e R_e`. Plain, then weighted by what the expert reads, then with ranks that go to the experts where they keep
# most energy (`water_fill`), one total for all.

# %%
svd = jax.jit(jaxmoe.weighted_svd, static_argnames="rank")
rank = budget // (experts * (out + in_))
fit = svd(weight, rank=rank)
record("svd, plain", jaxmoe.LowRank(left=fit.left, right=fit.right))

fit = svd(weight, rank=rank, column_moment=moment)
record("svd, weighted", jaxmoe.LowRank(left=fit.left, right=fit.right))

fit = svd(weight, rank=min(out, in_), column_moment=moment)
ranks, _ = water_fill(fit.energies, 1, (budget - experts) // (out + in_), minimum=1)
record("svd, weighted, own ranks", jaxmoe.Grouped.build(fit.left, fit.right, ranks, dtype=weight.dtype))
print(f"ranks {ranks.min()} to {ranks.max()}")

# %% [markdown]
# ## `d2moe`: a base that all experts share, and a thin deviation for each
#
# `W_e = B + L_e R_e`. The base here is the one whose outputs are closest to all experts' (RegMean). It pays only if the
# experts have something in common: the share of their energy that it explains says so. Unrelated experts share `1 / E`
# with their mean, and what a base explains, a few ranks of each expert may explain for less.

# %%
base = regmean(weight, moment)
fit = svd(weight - base, rank=(budget - base.size) // (experts * (out + in_)), column_moment=moment)
record("d2moe", jaxmoe.Shared.build(base, experts=experts), jaxmoe.LowRank(left=fit.left, right=fit.right))
print(f"the base explains {float(shared_energy(weight, base, moment)):.3f}; 1 / E = {1 / experts:.3f}")

# %% [markdown]
# ## `mobe`: mixtures of shared bases
#
# `W_e = A_e f(sum_j alpha_ej B_j)`: `M` bases `[r, in]` for the layer, and a small factor `[out, r]` and `M` mixing
# coefficients for each expert. A base costs as much as a right factor but serves all experts, so the rank may be
# higher. `variable_projection` solves for `A` exactly in every step and learns only the bases and the mixing.

# %%
bases = choose_bases((experts, out, in_), 0.4, weighted=True)
rank = (budget - experts * bases) // (experts * out + bases * in_)
fit = jaxmoe.variable_projection(weight, bases=bases, rank=rank, steps=300, moment=moment)
mixture = jaxmoe.SharedBasis(
    coefficients=fit.coefficients, bases=fit.bases, mixing=fit.mixing, activation="wavelet", transposed=False
)
record("mobe, 300 steps", mixture)
print(f"{bases} bases of rank {rank}")

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.semilogy(np.sqrt(fit.losses))
axes.set_xlabel("step")
axes.set_ylabel("weighted relative error")
plt.show()

# %% [markdown]
# ## `rfid`: unequal bases for groups of experts
#
# Experts are sorted by how often the router picks them and cut into groups; each group owns one base of the mixture.
# Its rank follows from two scores: the effective rank of the stacked group, and its routing frequency.

# %%
size, groups = experts // 4, 4
order = np.argsort(-sums.counts, kind="stable")
frequency = scores.routing_frequency(jnp.asarray(sums.counts[order])).reshape(groups, size).sum(1)
information = scores.effective_rank(group_energies(weight[order], size=size, moment=moment[order]))
importance = scores.fused_importance(information, frequency, xi=0.7)
extra = experts * groups + groups + experts  # mixing coefficients, ranks and the order are stored too
ranks = ranks_by_importance(importance, size * out + in_, min(size * out, in_), budget - extra)
print("effective rank ", np.asarray(information).round(0))
print("frequency      ", np.asarray(frequency).round(3))
print("ranks          ", ranks)

# %% [markdown]
# The recipe of the method does the rest: the same solver with these ranks, and the term that stores them. Every recipe
# is three functions: what it replaces, which sizes that can take, and the fit of one target.

# %%
rfid = jaxmoe.methods.get("rfid")
settings = rfid.settings(steps=300, group=size, xi=0.7)
slot = rfid.slot("gate_up", layer.shape, weight.dtype, settings, 0.4, weighted=True)
template = slot.at(slot.ladder().floor(budget))
evidence = jaxmoe.methods.Evidence(target="gate_up", moment=moment, counts=sums.counts)
found = rfid.fit(weight, template, settings, evidence=evidence, key=jax.random.key(0))
record("rfid, 300 steps", *found.terms)
print(f"ranks of its groups: {found.terms[0].group_ranks}, those found above: {tuple(map(int, ranks))}")

# %% [markdown]
# ## Side by side

# %%
figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
places = np.arange(len(rows))
axes.barh(places - 0.2, [row[1] for row in rows.values()], height=0.38, label="weights")
axes.barh(places + 0.2, [row[2] for row in rows.values()], height=0.38, label="outputs on real tokens")
axes.set_yticks(places, list(rows))
axes.invert_yaxis()
axes.set_xlabel("relative error, 40 % of gate and up kept")
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# The error of the weights and that of the outputs rank the methods differently, and neither is the perplexity of the
# whole model: `down`, the other layers and the budget that each of them gets matter too. Notebook 3 measures that.
#
# `compressed_experts` is missing here because it stores all experts: it runs fewer of them for every token.
