# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Blends of bases that all experts share."""

import torch
from torch import nn

from jaxmoe.torch.runtime.blended import BlendedTerm
from jaxmoe.torch.runtime.term import register


@register("shared_basis")
class SharedBasisTerm(BlendedTerm):
    """A_e f(sum_j alpha_ej B_j), optionally plus one constant, optionally transposed (MoBE, arXiv 2508.05257)."""

    mean: nn.Parameter

    def __init__(self, spec, shape, options):
        super().__init__(spec, shape)
        self.rank = spec["rank"]
        self._add("coefficients", (self.experts, self.rows, self.rank), options)
        self._add("bases", (spec["bases"], self.rank, self.columns), options)
        self._add("mixing", (self.experts, spec["bases"]), options)
        if spec["mean"]:
            self._add("mean", (1, 1), options)

    def features(self, mixing):
        return self._blend(mixing, self._array("bases", dtype=torch.float32))

    def forward(self, rows, routing):
        if self.transposed:
            out = self._multiply(self._linear("coefficients", rows, routing, transposed=True), routing)
        else:
            out = self._linear("coefficients", self._multiply(rows, routing), routing)
        if hasattr(self, "mean"):
            # A constant matrix maps a row to its sum times the constant, for every output.
            out = out + (rows.float().sum(-1, keepdim=True) * self.mean.float()).to(out.dtype)
        return out

    def _multiply(self, rows, routing):
        if self.cache and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return routing.linear(rows, self._oriented(self._cached()))
        parts = [
            inner.linear(own, self._oriented(self._of(experts)))
            for experts, own, inner in routing.visits(rows, self.rank * self.columns)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.columns if self.transposed else self.rank)

    def _oriented(self, features):
        return features.transpose(1, 2) if self.transposed else features
