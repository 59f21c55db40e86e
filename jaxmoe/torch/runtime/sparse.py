# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Single entries."""

import torch

from jaxmoe.torch.runtime.matrix import MatrixTerm
from jaxmoe.torch.runtime.term import register


@register("sparse")
class SparseTerm(MatrixTerm):
    """Single entries: values, their places in the matrix row by row, and how many each expert has."""

    indices: torch.Tensor
    counts: torch.Tensor

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        self.shape, self.numbers, entries = shape, shape[1] * shape[2], spec["entries"]
        self._add("values", (1, entries), options)
        self._add_whole("indices", torch.arange(entries) % self.numbers, options)
        share, more = divmod(entries, shape[0])
        self._add_whole("counts", [share + (expert < more) for expert in range(shape[0])], options)

    def matrices(self, experts, values):
        ends = torch.cumsum(self.counts.flatten().long(), 0)
        entries = torch.arange(len(values), device=experts.device)
        owner = torch.searchsorted(ends, entries, right=True)
        # Entries of experts that are not asked for go to a matrix behind the last one.
        row = torch.full((self.shape[0],), len(experts), device=experts.device)
        row[experts] = torch.arange(len(experts), device=experts.device)
        place = row[owner] * self.numbers + self.indices.flatten()
        dense = values.new_zeros((len(experts) + 1) * self.numbers)
        return dense.index_add(0, place, values).view(-1, *self.shape[1:])[:-1]
