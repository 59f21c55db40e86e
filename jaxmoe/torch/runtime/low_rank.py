# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""A thin pair of factors for every expert."""

from torch import nn

from jaxmoe.torch.runtime.term import Term, register


@register("low_rank")
class LowRankTerm(Term):
    """L_e R_e."""

    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, spec, shape, options):
        super().__init__()
        experts, out, in_ = shape
        self.experts, self.rank = experts, spec["rank"]
        self._add("left", experts * out, self.rank, options)
        self._add("right", experts * self.rank, in_, options)

    def forward(self, rows, routing):
        inner = routing.linear(rows, self.right.view(self.experts, self.rank, -1))
        return routing.linear(inner, self.left.view(self.experts, -1, self.rank))
