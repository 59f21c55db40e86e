# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""A thin pair of factors for every expert."""

from jaxmoe.torch.runtime.term import Term, register


@register("low_rank")
class LowRankTerm(Term):
    """L_e R_e."""

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        experts, out, in_ = shape
        self._add("left", (experts, out, spec["rank"]), options)
        self._add("right", (experts, spec["rank"], in_), options)

    def forward(self, rows, routing):
        return self._linear("left", self._linear("right", rows, routing), routing)
