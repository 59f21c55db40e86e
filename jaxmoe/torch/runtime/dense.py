# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Matrices as they are."""

from torch import nn

from jaxmoe.torch.runtime.term import Term, register


@register("dense")
class DenseTerm(Term):
    """W_e itself."""

    dense: nn.Parameter

    def __init__(self, spec, shape, options):
        super().__init__()
        self.shape = shape
        self._add("dense", shape[0] * shape[1], shape[2], options)

    def forward(self, rows, routing):
        return routing.linear(rows, self.dense.view(self.shape))
