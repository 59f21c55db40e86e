# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""One matrix of an attention, a shared expert or a dense MLP."""

import itertools
from functools import reduce
from typing import Any

import torch
from torch import nn

from jaxmoe.torch.runtime.routing import OneMatrix
from jaxmoe.torch.runtime.term import build


class FactoredLinear(nn.Module):
    """A linear map as a sum of terms, in place of a stock one; its terms are its children "0", "1", ...

    Args:
        native: the stock module, whose bias is taken over.
        spec: the module's entry in `config.jaxmoe["modules"]`: `shape`, `terms` and `bias`.
    """

    def __init__(self, native, spec):
        super().__init__()
        self.out_features, self.in_features = spec["shape"]["out"], spec["shape"]["in"]
        found = tuple(native.weight.shape), native.bias is not None
        if type(native).forward is not nn.Linear.forward or found != (
            (self.out_features, self.in_features),
            spec["bias"],
        ):
            raise ValueError(
                f"config.jaxmoe gives a linear map of (out, in) {(self.out_features, self.in_features)}, bias "
                f"{spec['bias']}, but the model has a {type(native).__name__} of {found[0]}, {found[1]}"
            )
        if not spec["terms"]:
            raise ValueError("no term for a linear map")
        options = {"dtype": native.weight.dtype, "device": native.weight.device}
        shape = (1, self.out_features, self.in_features)
        for position, term in enumerate(build(spec["terms"], shape, options, "a linear map")):
            self.add_module(str(position), term)
        self.register_parameter("bias", native.bias)

    @property
    def weight(self):
        """The matrix `[out, in]`, formed anew: models ask it for its dtype or device."""
        some: Any = next(self.children())
        device = next(itertools.chain(some.parameters(), some.buffers())).device
        return self._multiply(torch.eye(self.in_features, dtype=some.dtype, device=device)).T

    def forward(self, x):
        out = self._multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _multiply(self, rows):
        routing = OneMatrix(rows)
        return reduce(torch.add, [term(rows, routing) for term in self.children()])
