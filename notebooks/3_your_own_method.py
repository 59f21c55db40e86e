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
# # 3. Write your own method
#
# A method is a recipe: which matrices it replaces, which sizes they can take, and how the numbers of one target are
# found. Reading, budgets, calibration, resuming, writing, PyTorch and reports are the same for all methods.
#
# The idea to try: *all experts of a layer read the same few directions*. Every expert keeps a left factor of its own,
# and one right factor serves all, `W_e = L_e R`. A rank is cheaper than in SVD, but no expert has directions to itself.
# Does that pay?

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import jaxmoe
from jaxmoe import methods
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.factors import Grouped
from jaxmoe.methods.svd import SVD
from jaxmoe.report import plots
from jaxmoe.report.comparison import label
from jaxmoe.solvers.shared_right import shared_right

# %% [markdown]
# ## The recipe
#
# `slot` says which sizes a target can take: here a ladder of ranks. Its terms are *abstract*, shapes without numbers,
# so the plan can count them before anything runs. `fit` gets the weights `[expert, out, in]`, the abstract terms of the
# size that was chosen, and the evidence: second moments, routing counts and whatever else was calibrated. The term
# `Grouped` with one group of all experts stores exactly this form, on disk and in PyTorch.


# %%
def slot(target, shape, dtype, settings, kept, *, weighted=False):
    sizes = shape.of(target)
    return methods.Slot(lambda rank: (Grouped.abstract(sizes, dtype, total=rank, size=sizes[0]),), 1, sizes[2] - 1)


def fit(weight, template, settings, *, evidence, key=None):
    (term,) = template
    left, right = shared_right(weight, rank=len(term.bases), moment=evidence.moment)
    return methods.Fit((Grouped.build(left, right[None], [len(right)], size=len(weight), dtype=term.bases.dtype),))


# %% [markdown]
# What it replaces, its settings and the memory that a fit needs are those of SVD. Once registered, the method has a
# name everywhere: in a file of its own, `jaxmoe --import mine.py compress ... --method shared_inputs` finds it too.

# %%
mine = methods.register(
    SVD._replace(name="shared_inputs", summary="one right factor for all experts of a layer", slot=slot, fit=fit)
)

# %% [markdown]
# ## The comparison
#
# All contenders at the same size, calibrated on the same text and measured on the same other text: the first 60 % and
# the rest of each bundled text. The original is always there; of the baselines, pruning of whole experts joins.

# %%
folder = Path(tempfile.mkdtemp())
for text in demo_texts():
    words = text.read_text(encoding="utf-8")
    for part, cut in (("calibration", words[: len(words) * 6 // 10]), ("unseen", words[len(words) * 6 // 10 :])):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / text.name).write_text(cut, encoding="utf-8")

result = jaxmoe.compare(
    demo_checkpoint(),
    folder / "report",
    [mine.name, "svd"],
    ratios=[0.5],
    baselines=["frequency", "reap"],
    text=folder / "unseen",
    calibration_text=folder / "calibration",
    windows=4,
)
for row in result.rows:
    found = row.measured
    print(f"{label(row):22} {found.achieved['experts']:6.1%} removed   {found.geometric_mean_perplexity:8.2f}")

# %%
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
axes.barh([label(row) for row in result.rows], [row.measured.geometric_mean_perplexity for row in result.rows])
axes.invert_yaxis()
axes.set_xlabel("perplexity, half of the experts' bytes removed")
plt.show()

# %% [markdown]
# On this model the idea does not pay: experts with factors of their own are far ahead. It is far ahead of dropping
# whole experts, though. The relative errors of every layer say where it loses: the directions that experts share run
# out first in `down`. (Whole experts that were dropped are wrong in a way of their own, which a mean over experts
# hides.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
plots.plot_layers(result, axes[0], projection="up")
plots.plot_layers(result, axes[1], projection="down")
plt.show()

# %% [markdown]
# With several `ratios`, `plots.plot_pareto(result)` draws quality against size, and `folder / "report" / "index.html"`
# shows all of this in a browser. From here: give the method settings of its own (a frozen dataclass), or a term of its
# own (`jaxmoe.factors`, and its twin in PyTorch).
