# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Matrices as they are."""

from jaxmoe.torch.runtime.term import Term, register


@register("dense")
class DenseTerm(Term):
    """W_e itself."""

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        self._add("dense", shape, options)

    def forward(self, rows, routing):
        return self._linear("dense", rows, routing)
