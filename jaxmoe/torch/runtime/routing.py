# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Which rows belong to which expert, and products of all of them with the experts' own matrices."""

from functools import cached_property

import torch
from torch.nn import functional as F

BLEND_NUMBERS = 1 << 26
"""At most so many float32 numbers of blended bases are formed at a time, one expert's at least."""

try:
    # Private, but traceable and fast on accelerators. Without it the experts that have tokens are visited one by one.
    from transformers.integrations.moe import _grouped_linear
except ImportError:
    _grouped_linear = None


class Routing:
    """Which of the rows, sorted by group, belong to which group; a group is an expert.

    Args:
        offsets: the end of each group's rows, int32, `[group]`.
    """

    def __init__(self, offsets):
        self.offsets = offsets

    @cached_property
    def spans(self):
        """The groups that have rows, as `(group, start, stop)`."""
        stops = self.offsets.tolist()
        return [(group, a, b) for group, (a, b) in enumerate(zip([0, *stops], stops)) if a < b]

    def together(self, rows):
        """Tell whether one call is to multiply the rows of all groups, instead of a loop."""
        return _grouped_linear is not None and (rows.device.type != "cpu" or torch.compiler.is_compiling())

    def linear(self, rows, weight):
        """Multiply the rows `[row, in]` of each group by its own matrix of `weight`, `[group, out, in]`."""
        if self.together(rows):
            return _grouped(rows, weight, self.offsets)
        parts = [F.linear(rows[start:stop], weight[group]) for group, start, stop in self.spans]
        return torch.cat(parts) if parts else rows.new_zeros(0, weight.shape[1])

    def visits(self, rows, numbers):
        """Cut rows into parts of the experts that have any, as `(experts, rows, routing)`.

        As many experts go together as keep what is formed for them, `numbers` each, below `BLEND_NUMBERS`.
        """
        if torch.compiler.is_compiling():  # which experts have rows is not known to a traced program
            return [(torch.arange(len(self.offsets), device=rows.device), rows, self)]
        parts, at_a_time = [], max(1, BLEND_NUMBERS // max(1, numbers))
        for first in range(0, len(self.spans), at_a_time):
            block = self.spans[first : first + at_a_time]
            experts = torch.tensor([expert for expert, _, _ in block], device=rows.device)
            start, stop = block[0][1], block[-1][2]
            parts.append((experts, rows[start:stop], Routing(self.offsets[experts] - start)))
        return parts


class OneMatrix(Routing):
    """All rows belong to the one matrix that there is; no number has to be read from the device to know it."""

    def __init__(self, rows):
        super().__init__(torch.full((1,), len(rows), dtype=torch.int32, device=rows.device))
        self.spans = [(0, 0, len(rows))] if len(rows) else []

    def together(self, rows):
        return torch.compiler.is_compiling()

    def linear(self, rows, weight):
        return F.linear(rows, weight[0])

    def visits(self, rows, numbers):
        return [(torch.arange(1, device=rows.device), rows, self)] if len(rows) else []


def _grouped(rows, weight, offsets):
    # The grouped kernels want rows of a multiple of 16 bytes, which a rank need not be: zeros fill them up.
    assert _grouped_linear is not None
    out, multiple = weight.shape[1], 16 // weight.element_size()
    fill_out, fill_in = -out % multiple, -weight.shape[2] % multiple
    if fill_out or fill_in:
        rows, weight = F.pad(rows, (0, fill_in)), F.pad(weight, (0, fill_in, 0, fill_out))
    return _grouped_linear(rows, weight, offsets)[:, :out]
