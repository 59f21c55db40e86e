# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Experts that share a matrix, in clusters."""

import torch

from jaxmoe.torch.runtime.matrix import MatrixTerm
from jaxmoe.torch.runtime.term import register


@register("merged")
class MergedTerm(MatrixTerm):
    """One matrix for every cluster of experts (arXiv 2410.08589)."""

    labels: torch.Tensor

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        clusters = spec["clusters"]
        self.shape, self.numbers = shape, shape[1] * shape[2]
        self._add("merged", (clusters, *shape[1:]), options)
        self._add_whole("labels", [expert % clusters for expert in range(shape[0])], options)

    def flat(self):
        """Return nothing: a matrix is formed where an expert of its cluster has rows."""

    def matrices(self, experts, values):
        return self._array("merged", self.labels.flatten()[experts])
