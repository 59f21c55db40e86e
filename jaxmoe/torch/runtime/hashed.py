# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Few values at many places."""

import torch

from jaxmoe.torch.runtime.matrix import MatrixTerm
from jaxmoe.torch.runtime.term import register


@register("hashed")
class HashedTerm(MatrixTerm):
    """P eta for each group of experts: few values, each at many places that a hash chooses (arXiv 2602.09316)."""

    seed: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, spec, shape, options):
        super().__init__(spec)
        self.shape, self.numbers = shape, shape[1] * shape[2]
        self.size, self.buckets, self.last, self.balanced = (
            spec[key] for key in ("size", "buckets", "last", "balanced")
        )
        self.groups = -(-shape[0] // self.size)
        self._add("values", (1, (self.groups - 1) * self.buckets + self.last), options)
        self._add_whole("seed", [0], options)
        if spec["order"]:
            self._add_whole("order", list(range(shape[0])), options)
        else:
            self.register_buffer("order", None)

    def flat(self):
        return (self._array("values").flatten().float() * self._scales()).to(self.dtype)

    def matrices(self, experts, values):
        position = experts if self.order is None else torch.argsort(self.order.flatten())[experts]
        group = position // self.size
        entries = torch.arange(self.numbers, device=experts.device)
        entries = entries + ((position - group * self.size) * self.numbers)[:, None]
        count = torch.where(group == self.groups - 1, self.last, self.buckets)[:, None]
        places = (group * self.buckets)[:, None] + self._bucket(entries, count)
        return values[places].view(-1, *self.shape[1:])

    def _bucket(self, entries, count):
        seed = self.seed.flatten().long()
        if not self.balanced:
            return _mixed(seed, entries) % count
        return (entries % count + _mixed(seed, entries // count) % count) % count

    def _scales(self):
        members = self.shape[0] - (self.groups - 1) * self.size
        sizes = [self._sizes(self.size * self.numbers, self.buckets)] * (self.groups - 1)
        counts = torch.cat([*sizes, self._sizes(members * self.numbers, self.last)]).float()
        return torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0)

    def _sizes(self, entries, count):
        """Return how many of a group's entries lie in each bucket."""
        device = self.seed.device
        if not self.balanced:
            own = self._bucket(torch.arange(entries, device=device), count)
            return torch.zeros(count, dtype=torch.int64, device=device).index_add(0, own, torch.ones_like(own))
        runs, rest = divmod(entries, count)
        start = _mixed(self.seed.flatten().long(), torch.tensor(runs, device=device)) % count
        place = (torch.arange(count, device=device) + count - start) % count
        return runs + (place < rest).long()


def _mixed(seed, number):
    """Return the hash of a seed and a number in 32 bits, which int64 holds; its products may wrap around above them."""

    def finalized(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return x ^ (x >> 16)

    return finalized(number ^ finalized((seed + 0x9E3779B9) & 0xFFFFFFFF))
