# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""What terms have in common whose experts blend bases."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from jaxmoe.torch.runtime.term import Term, state

ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "wavelet": lambda x: x * (1 - x * x) / (1 + x * x) ** 3,
}
"""The functions of blended bases."""


class BlendedTerm(Term, ABC):
    """A term with features f(sum_j alpha_ej B_j) of its experts, `[expert, rank, column]`.

    They are formed in float32, a few experts at a time and only for experts that have rows. With `cache` they are
    formed once for all experts and kept, which costs as much memory as one low-rank factor of every expert; the cache
    serves only where no gradient is recorded and is renewed when a parameter has changed.
    """

    mixing: nn.Parameter
    _kept: Any

    def __init__(self, spec, shape):
        super().__init__(spec)
        self.experts, self.rows, self.columns = (shape[0], shape[2], shape[1]) if spec["transposed"] else shape
        self.transposed, self.cache, self._kept = spec["transposed"], False, None
        if spec["activation"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {spec['activation']!r} of a shared basis: this code knows {known}")
        self.activation = spec["activation"]

    @abstractmethod
    def features(self, mixing):
        """Return f(blend) for some rows of the mixing."""

    def _blend(self, mixing, bases):
        with torch.autocast(bases.device.type, enabled=False):
            blend = mixing.float() @ bases.float().flatten(1)
            return ACTIVATIONS[self.activation](blend).view(-1, *bases.shape[1:]).to(self.dtype)

    def _of(self, experts):
        """Return the features of some experts, from the cache where it may serve."""
        if torch.compiler.is_compiling():
            return self.features(self.mixing)
        if self.cache and not torch.is_grad_enabled():
            return self._cached()[experts]
        return self.features(self.mixing[experts])

    def _cached(self):
        current = state((self.mixing, *self._tensors("bases").values()))
        if self._kept is None or self._kept[0] != current:
            self._kept = current, self.features(self.mixing)
        return self._kept[1]


def cache_blends(model, enabled=True):
    """Keep the blended bases of all experts in memory, or drop them: faster, and larger by a low-rank factor."""
    for module in model.modules():
        if isinstance(module, BlendedTerm):
            module.cache, module._kept = enabled, None
