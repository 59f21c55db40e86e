"""The PyTorch twin of blocks on the diagonal."""

import torch

from jaxmoe.torch.runtime.term import Term, register


@register("block_diagonal")
class BlockDiagonalTerm(Term):
    """diag(B_e1, ..., B_en) for every expert."""

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        self.count, (self.experts, self.out, self.in_) = spec["blocks"], shape
        self._add("blocks", (self.experts, self.out, self.in_ // self.count), options)

    def forward(self, rows, routing):
        blocks = self._array("blocks").view(self.experts, self.count, self.out // self.count, -1)
        parts = rows.view(len(rows), self.count, -1).unbind(1)
        return torch.cat([routing.linear(part, blocks[:, index]) for index, part in enumerate(parts)], 1)
