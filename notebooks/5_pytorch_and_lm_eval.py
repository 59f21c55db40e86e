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
# # 5. From a compressed checkpoint to PyTorch and lm-evaluation-harness
#
# What jaxmoe writes is a Hugging Face checkpoint. This notebook compresses the bundled model, loads it with
# transformers, checks that both frameworks compute the same, writes it once more for programs that know nothing of
# jaxmoe, and scores it with lm-evaluation-harness. It needs `pip install "jaxmoe[torch,eval]"`.

# %%
import json
import tempfile
from pathlib import Path

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import jaxmoe
import jaxmoe.torch  # transformers now knows factored checkpoints
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.evaluation.lm_eval import JaxmoeLM

logging.disable_progress_bar()
folder = Path(tempfile.mkdtemp())
report = jaxmoe.compress(demo_checkpoint(), folder / "small", "mobe", ratio=0.6, set={"steps": 100})
print({scope: round(removed, 3) for scope, removed in report.achieved.items()})

# %% [markdown]
# ## PyTorch
#
# `import jaxmoe.torch` registers the factored architectures. On a machine without jaxmoe, `from_pretrained(...,
# trust_remote_code=True)` runs the code that lies in the checkpoint; it does the same.

# %%
tokenizer = AutoTokenizer.from_pretrained(folder / "small")
model = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32).eval()
print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters in memory")

prompt = tokenizer("The king said to the", return_tensors="pt")
with torch.inference_mode():
    logits = model(**prompt).logits[0].numpy()
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(answer[0]))

# %% [markdown]
# The same logits in JAX, from the same files:

# %%
decoder = jaxmoe.StoredModel(folder / "small").decoder()
difference = np.abs(np.asarray(decoder(prompt["input_ids"].numpy()))[0] - logits).max()
print(f"largest difference of the logits: {difference:.1e}, their size: {np.abs(logits).max():.1f}")

# %% [markdown]
# The experts stay factored in memory. A mixture of bases is blended anew at every call, for each expert that has
# tokens, which slows small batches down. `cache_blends` keeps the blends: faster, but then memory is not saved.

# %%
jaxmoe.torch.cache_blends(model)
with torch.inference_mode():
    print(f"difference with cached blends: {np.abs(model(**prompt).logits[0].numpy() - logits).max():.1e}")

# %% [markdown]
# ## The original architecture
#
# Serving engines and quantisers often know the original architecture only. `densify` (`jaxmoe convert --to dense`)
# multiplies the factors out: the size is the original's again, nothing is saved on disk, and anything loads it.

# %%
jaxmoe.densify(folder / "small", folder / "dense")
dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
with torch.inference_mode():
    difference = np.abs(dense(**prompt).logits[0].numpy() - logits).max()
print(f"{type(dense).__name__}: largest difference {difference:.2f}, from rounding the products to bfloat16")

# %% [markdown]
# ## lm-evaluation-harness
#
# `JaxmoeLM` is a model for the harness that streams the checkpoint layer by layer, without PyTorch. Usual tasks are
# fetched from the hub: `lm_eval.simple_evaluate(model=JaxmoeLM(folder), tasks=["hellaswag"])`. Here there is no
# network, so a task is made of the bundled text: which of four pieces goes on from this one?

# %%
questions = []
for path in demo_texts():
    text = path.read_text(encoding="utf-8")
    pieces = [text[start : start + 120] for start in range(0, 160 * 120, 120)]
    for index in range(0, 150, 15):
        choices = [pieces[(index + 1 + 37 * other) % 160] for other in range(4)]
        questions.append({"question": pieces[index], "choices": choices, "answer": 0})
(folder / "goes_on.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))

files = {"data_files": {"test": str(folder / "goes_on.jsonl")}, "cache_dir": str(folder / "cache")}
task = {
    "task": "goes_on",
    "dataset_path": "json",
    "dataset_kwargs": files,
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
(folder / "goes_on.yaml").write_text(json.dumps(task))
tasks = TaskManager(include_path=str(folder), include_defaults=False)

for name in (demo_checkpoint(), folder / "small"):
    result = lm_eval.simple_evaluate(
        model=JaxmoeLM(name), tasks=["goes_on"], task_manager=tasks, bootstrap_iters=0, log_samples=False
    )
    accuracy = result["results"]["goes_on"]["acc,none"]
    print(f"{'original' if name == demo_checkpoint() else '60 % removed':14} {accuracy:.0%} of {len(questions)} right")

# %% [markdown]
# Four choices, so chance is 25 %. A task of 50 questions is a check that everything runs, not a measurement: for that,
# take the usual tasks, and perplexity (`jaxmoe evaluate`), which sees small losses long before accuracies do.
