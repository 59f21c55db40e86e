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
# # 1. Quickstart
#
# In a Mixture-of-Experts model nearly all parameters lie in the routed experts, and a token uses a few of them only.
# jaxmoe replaces the experts with fewer numbers and writes a checkpoint that still loads and runs.
#
# This notebook does the whole job on a small, really trained model that comes with the package: look at a checkpoint,
# plan a size, compress, and measure what that costs. `jaxmoe inspect`, `plan`, `compress` and `evaluate` do the same on
# the command line. It takes less than a minute on a CPU.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import jaxmoe
from jaxmoe.data import demo_checkpoint, demo_texts

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Look
#
# Opening reads the headers of the files, not their numbers, so a checkpoint may be larger than memory.

# %%
checkpoint = jaxmoe.Checkpoint.open(demo_checkpoint())
experts = sum(layer.shape.numbers for layer in checkpoint.layers)
print(f"{checkpoint.model_type}, {len(checkpoint.layers)} layers of {checkpoint.layers[0].shape.experts} experts")
print(f"{checkpoint.parameters:,} parameters, {experts / checkpoint.parameters:.0%} of them in routed experts")
print(f"down projections of one layer, [expert, out, in]: {checkpoint.projection(checkpoint.layers[0], 'down').shape}")

# %% [markdown]
# ## Plan
#
# A ratio is the **removed** fraction, here half of the routed experts' parameters. The same size is a smaller fraction
# of the whole model, and publications differ in which of the two they mean. So a plan always says all three: of the
# matrices that the method touches, of all routed experts, of the model.
#
# The method is `svd`, a pair of thin factors for every expert matrix, because it takes seconds. `mobe` takes minutes
# and keeps much more; the rest is the same.

# %%
plan = jaxmoe.plan(checkpoint.folder, "svd", ratio=0.5)
print({scope: round(removed, 4) for scope, removed in plan.achieved.items()})
print(f"{plan.bytes.before / 1e6:.2f} MB become {plan.bytes.after / 1e6:.2f} MB")

# %% [markdown]
# ## Compress
#
# One layer at a time: memory holds one layer, whatever the depth of the model. What the plan counted is what the files
# hold.

# %%
report = jaxmoe.compress(checkpoint.folder, folder / "plain", "svd", ratio=0.5)
print(f"{report.bytes.after:,} bytes written, {plan.bytes.after:,} planned")
for layer in report.layers:
    errors = {name: round(own.error, 3) for name, own in layer.projections.items()}
    print(f"layer {layer.layer}: relative error {errors}")

# %% [markdown]
# ## Let text say what matters
#
# The fit above weighed all directions of a weight matrix alike, but tokens use few of them much. *Calibration* runs
# text through the original and keeps the second moments of what every expert reads. The same method then minimises the
# error of what the experts make of such tokens.
#
# Two rules for this text. It must not be the text that we measure on: here the first 60 % of each of the five bundled
# texts calibrate, and the rest stays unseen. And it should be of the kind that the model is to serve: text of other
# kinds, and little of it, can do harm.

# %%
for text in demo_texts():
    words = text.read_text(encoding="utf-8")
    for part, cut in (("calibration", words[: len(words) * 6 // 10]), ("unseen", words[len(words) * 6 // 10 :])):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / text.name).write_text(cut, encoding="utf-8")

options = {"ratio": 0.5, "text": folder / "calibration"}
report = jaxmoe.compress(checkpoint.folder, folder / "calibrated", "svd", **options)
print(f"{report.calibration.tokens:,} tokens; {report.achieved['experts']:.4f} of the experts removed")

# %% [markdown]
# ## Measure
#
# Perplexity on the unseen text, and the distance from the original: the KL divergence of its next-token distribution,
# and how often both hold the same token for the most likely one.

# %%
found = {
    name: jaxmoe.evaluate(path, text=folder / "unseen", against=checkpoint.folder, generate=0)
    for name, path in {"plain": folder / "plain", "calibrated": folder / "calibrated"}.items()
}
original = found["plain"].against
print(f"original    perplexity {original.geometric_mean_perplexity:5.2f}")
for name, result in found.items():
    print(
        f"{name:10}  perplexity {result.geometric_mean_perplexity:5.2f}   KL divergence {result.kl:.3f} nats"
        f"   same top token {result.top1_agreement:.1%}"
    )

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for offset, (name, result) in enumerate({"original": original, **found}.items()):
    places = [index + 0.27 * (offset - 1) for index in range(len(result.texts))]
    axes.bar(places, [text.perplexity for text in result.texts], width=0.25, label=name)
axes.set_xticks(range(len(original.texts)), [text.name for text in original.texts])
axes.set_ylabel("perplexity")
axes.set_title("half of the experts' parameters removed, svd", loc="left")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Use
#
# What was written is a Hugging Face checkpoint with a report and a model card. After `import jaxmoe.torch`,
# transformers loads it (notebook 5). In JAX, `jaxmoe.StoredModel(folder).decoder()` is a Flax NNX module, and the same
# as a pure function of its arrays.
#
# Next: what the methods do inside, on one layer (notebook 2), and which method is best at which size for a model of
# yours: `jaxmoe compare`, used in notebook 3.
