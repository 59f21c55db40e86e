# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""One matrix for all experts."""

import torch
from torch.nn import functional as F

from jaxmoe.torch.runtime.term import Term, register


@register("shared")
class SharedTerm(Term):
    """One matrix for all experts, with or without all channels of an axis; further ones may be masked in every call."""

    kept: torch.Tensor | None
    for_all = True

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        _, self.out, in_ = shape
        self.axis, self.parts, self.dynamic = spec["axis"], spec["parts"], spec["dynamic"]
        rows, columns = self.out, in_
        if spec["kept"] is None:
            self.register_buffer("kept", None)
        else:
            self._add_whole("kept", list(range(spec["kept"])), options)
            rows, columns = (rows, spec["kept"]) if self.axis == "in" else (self.parts * spec["kept"], columns)
        self._add("weight", (rows, columns), options)

    def forward(self, rows, routing=None):
        if self.kept is not None and self.axis == "in":
            rows = rows[:, self.kept.flatten().long()]
        weight = self._array("weight")
        if self.dynamic:
            rows = rows * self._mask(rows, weight)
        y = F.linear(rows, weight)
        if self.kept is None or self.axis == "in":
            return y
        first = torch.arange(self.parts, device=y.device)[:, None] * (self.out // self.parts)
        places = (first + self.kept.flatten()).flatten()
        return y.new_zeros(len(y), self.out).index_copy(1, places, y)

    @torch.no_grad()
    def _mask(self, rows, weight):
        """Return zeros for the channels that contribute least to these rows."""
        scores = rows.float().square().sum(0) * weight.float().square().sum(0)
        order = torch.sort(scores, descending=True, stable=True).indices
        mask = torch.zeros(len(scores), dtype=rows.dtype, device=rows.device)
        mask[order[: len(scores) - self.dynamic]] = 1
        return mask
