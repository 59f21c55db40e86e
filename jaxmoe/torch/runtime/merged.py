# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Experts that share a matrix, in clusters."""

import torch
from torch import nn

from jaxmoe.torch.runtime.matrix import MatrixTerm
from jaxmoe.torch.runtime.term import register


@register("merged")
class MergedTerm(MatrixTerm):
    """One matrix for every cluster of experts (arXiv 2410.08589)."""

    merged: nn.Parameter
    labels: torch.Tensor

    def __init__(self, spec, shape, options):
        super().__init__()
        clusters = spec["clusters"]
        self.shape, self.numbers = shape, shape[1] * shape[2]
        self._add("merged", clusters * shape[1], shape[2], options)
        self._add_whole("labels", [expert % clusters for expert in range(shape[0])], options)

    def flat(self):
        return self.merged.view(-1, *self.shape[1:])

    def matrices(self, experts, values):
        return values[self.labels.flatten()[experts]]
