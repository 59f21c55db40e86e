# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Vectors that compensate for experts that do not run."""

import torch
from torch import nn


class SkippedExperts(nn.Module):
    """Vectors that compensate for experts that do not run, one for the inputs of each of an expert's projections.

    Args:
        experts: how many there are.
        inputs: what each projection reads, by its name: how many numbers.
        main: how many of a token's experts run.
        renorm: "main" scales the weights of those that run to the sum of all, "none" leaves them.
        device: of the vectors.
    """

    LEAST = 1e-12
    """Sums of router weights below this are taken for nothing."""

    def __init__(self, experts, inputs, main, renorm, device):
        super().__init__()
        if renorm not in ("none", "main"):
            raise ValueError(f"unknown renorm {renorm!r}: this code knows none, main")
        self.experts, self.inputs, self.main, self.renorm = experts, dict(inputs), main, renorm
        for name, size in self.inputs.items():
            self.register_parameter(name, nn.Parameter(torch.ones(experts, size, dtype=torch.float32, device=device)))

    def forward(self, index, weights):
        """Return the experts that run, their weights, and the factors of each projection's inputs, token by token."""
        if index.shape[-1] <= self.main:
            return index, weights, {}
        # Of equal weights the lower index comes first.
        index, order = torch.sort(index, dim=-1)
        weights, order = torch.sort(weights.gather(-1, order), dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
        first, rest = weights[:, : self.main], weights[:, self.main :].float()
        if self.renorm == "main":
            total, own = (part.float().sum(-1, keepdim=True) for part in (weights, first))
            first = (first * (total / own.clamp(min=self.LEAST))).to(weights.dtype)
        with torch.autocast(weights.device.type, enabled=False):
            total = rest.sum(-1, keepdim=True)
            enough = (total > self.LEAST) & (rest.shape[-1] > 1)
            share = torch.where(enough, rest / torch.where(enough, total, 1), 1 / rest.shape[-1])
            mixing = share.new_zeros(len(index), self.experts).scatter_add(1, index[:, self.main :], share)
            vectors = torch.cat([getattr(self, name).float() for name in self.inputs], 1)
            scales = (mixing @ vectors).split(list(self.inputs.values()), 1)
        return index[:, : self.main], first, dict(zip(self.inputs, scales))
