"""MoBE's published algorithm in plain PyTorch: what the benchmarks of basis learning compare with.

Written from the publication (arXiv 2508.05257) and from a description of the authors' release, in the way such a
trainer is usually written: parameters, autograd, `torch.optim.Adam`. Weights are divided by their standard deviation
only; A and B start from an SVD of consecutive groups of the *raw* weights; one-hot logits pass through a softmax;
Adam(.9, .999, 1e-8) at a constant rate of .07, full batch, no decay and no early stop. The best loss of all steps
counts (the release looks at every 200th step only).
"""

import time
from typing import NamedTuple

import numpy as np
import torch

ACTIVATIONS = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda x: x}


class ReferenceFit(NamedTuple):
    """Relative error and CPU seconds since the start, before each step, and what is fitted at the end."""

    errors: np.ndarray
    seconds: np.ndarray
    coefficients: torch.Tensor
    bases: torch.Tensor
    logits: torch.Tensor


def start(weight: torch.Tensor, bases: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A, B and the logits of the release's start: the SVD of every consecutive group of raw experts."""
    experts, rows, columns = weight.shape
    owner = np.repeat(np.arange(bases), [len(block) for block in np.array_split(np.arange(experts), bases)])
    coefficients = torch.zeros(experts, rows, rank)
    basis = torch.zeros(bases, rank, columns)
    for group in range(bases):
        members = np.flatnonzero(owner == group)
        u, s, vt = torch.linalg.svd(weight[members].reshape(-1, columns), full_matrices=False)
        kept = min(rank, len(s))
        coefficients[members, :, :kept] = (u[:, :kept] * s[:kept]).reshape(len(members), rows, kept)
        basis[group, :kept] = vt[:kept]
    logits = torch.nn.functional.one_hot(torch.from_numpy(owner), bases).float()
    return coefficients, basis, logits


def fit(
    weight: np.ndarray,
    *,
    bases: int,
    rank: int,
    activation: str = "silu",
    steps: int = 10_000,
    learning_rate: float = 0.07,
    progress=None,
) -> ReferenceFit:
    """Fit `weight [expert, row, column]` and return the history of the relative error over CPU seconds."""
    function = ACTIVATIONS[activation]
    raw = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    begin = time.process_time()
    target = raw / raw.std(correction=0)
    parameters = [torch.nn.Parameter(x) for x in start(raw, bases, rank)]
    coefficients, basis, logits = parameters
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    scale = float(torch.mean(target.double() ** 2))
    errors, seconds = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        optimizer.zero_grad()
        blend = torch.einsum("em,mrq->erq", torch.softmax(logits, dim=-1), basis)
        loss = torch.nn.functional.mse_loss(torch.bmm(coefficients, function(blend)), target)
        loss.backward()
        errors[step] = (loss.item() / scale) ** 0.5
        seconds[step] = time.process_time() - begin
        optimizer.step()
        if progress is not None:
            progress(step)
    return ReferenceFit(errors, seconds, *(x.detach() for x in parameters))
