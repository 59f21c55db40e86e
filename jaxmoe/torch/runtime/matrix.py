# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""What terms have in common whose matrices are formed to be multiplied by."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from jaxmoe.torch.runtime.term import Term


class MatrixTerm(Term, ABC):
    """A term whose matrices are formed for the experts that have rows, a few at a time."""

    shape: Any
    numbers: int

    def flat(self):
        """Return the values as they stand in the matrices, the same for all experts."""
        return self._array("values").flatten()

    @abstractmethod
    def matrices(self, experts, values):
        """Return the matrices of some experts, `[expert, out, in]`."""

    def forward(self, rows, routing):
        # What is formed on the way, indices among it, takes several times as much as the matrices.
        visits, values = routing.visits(rows, 8 * self.numbers), self.flat()
        parts = [inner.linear(own, self.matrices(experts, values)) for experts, own, inner in visits]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.shape[1])
