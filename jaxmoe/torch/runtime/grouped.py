# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Groups of experts that share a basis, each with a rank of its own."""

from typing import Any

import torch
from torch.nn import functional as F

from jaxmoe.torch.runtime.blended import ACTIVATIONS, BlendedTerm
from jaxmoe.torch.runtime.term import register, state


@register("grouped")
class GroupedTerm(BlendedTerm):
    """A_e f(B_g(e)) or A_e f(sum_j alpha_ej B_j), each group of experts with a rank of its own.

    Coefficients and bases are stored without padding. The loop over experts multiplies by the stored rows as they are;
    where all experts' products are one call, they are padded to the largest rank first.
    """

    ranks: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, spec, shape, options):
        super().__init__(spec, shape)
        self.size, self.total, self.all_ranks = spec["size"], spec["total"], spec["rows"]
        self.groups = -(-self.experts // self.size)
        self._add("coefficients", (self.all_ranks, self.rows), options)
        self._add("bases", (self.total, self.columns), options)
        self._add_whole("ranks", self._some_ranks(), options)
        if spec["mixing"]:
            self._add("mixing", (self.experts, self.groups), options)
        else:
            self.register_parameter("mixing", None)
        if spec["order"]:
            self._add_whole("order", list(range(self.experts)), options)
        else:
            self.register_buffer("order", None)
        # Older versions did not write the largest rank: there it is known when the ranks are loaded.
        self.widest = spec.get("widest")
        self._known: Any = None

    def _some_ranks(self):
        """Return ranks that fit the sizes."""
        lacking = self.groups * self.size - self.experts
        # Every expert that the last group lacks saves its rank.
        last = [(self.size * self.total - self.all_ranks) // lacking] if lacking else []
        rest = self.groups - len(last)
        share = self.total - sum(last)
        return [share // rest + (group < share % rest) for group in range(rest)] + last

    def prepare(self):
        if not self.ranks.is_meta:
            self._places()

    def _places(self):
        """Return for each expert its rows of coefficients and of bases, from the ranks as they are now."""
        whole = [x for x in (self.ranks, self.order) if x is not None]
        current = state(whole)
        if self._known is None or self._known[0] != current:
            self._known = current, self._read()
        return self._known[1]

    def _read(self):
        ranks = self.ranks.flatten().tolist()
        order = range(self.experts) if self.order is None else self.order.flatten().tolist()
        groups = [position // self.size for position in range(self.experts)]
        if sum(ranks) != self.total or sum(ranks[group] for group in groups) != self.all_ranks or min(ranks) < 0:
            raise ValueError(
                f"ranks {ranks} of groups of {self.size} experts do not add up to {self.total} rows of bases and "
                f"{self.all_ranks} of coefficients. The checkpoint is damaged: fetch or write it again"
            )
        if sorted(order) != list(range(self.experts)):
            raise ValueError(
                f"the order {list(order)} does not name each of {self.experts} experts once. The checkpoint is "
                "damaged: fetch or write it again"
            )
        if self.widest is None:
            self.widest = max(ranks)
        if max(ranks) > self.widest:
            raise ValueError(
                f"the largest rank is {max(ranks)}, and config.json says {self.widest}. The checkpoint is damaged: "
                "fetch or write it again"
            )
        places, first = {}, 0
        for group, expert in zip(groups, order):
            start = sum(ranks[:group])
            places[expert] = (slice(first, first + ranks[group]), slice(start, start + ranks[group]))
            first += ranks[group]
        return places

    def features(self, mixing):
        return self._blend(mixing, self._gather("bases", *self._starts()))

    def forward(self, rows, routing):
        if self.widest is None:
            self._places()
        together = routing.together(rows)
        parts = []
        for experts, own, inner in routing.visits(rows, self.widest * (self.columns + self.rows * together)):
            features = None if self.mixing is None else self._of(experts)
            if together:
                parts.append(self._together(own, inner, experts, features))
            else:
                numbers, places = experts.tolist(), self._places()
                for place, start, stop in inner.spans:
                    blend = None if features is None else features[place]
                    stored, base = places[numbers[place]]
                    parts.append(self._alone(own[start:stop], stored, base, blend))
        return torch.cat(parts) if parts else rows.new_zeros(0, self.columns if self.transposed else self.rows)

    def _alone(self, rows, stored, base, blend):
        """Multiply the rows of one expert by what is stored of it; `blend` is its padded one, None without mixing."""
        coefficients = self._rows("coefficients", stored)
        basis = self._active(self._rows("bases", base)) if blend is None else blend[: stored.stop - stored.start]
        if self.transposed:
            return F.linear(F.linear(rows, coefficients), basis.T)
        return F.linear(F.linear(rows, basis), coefficients.T)

    def _together(self, rows, routing, experts, features):
        """Multiply by padded factors of some experts, or of all."""
        starts, ranks = self._starts()
        position = torch.arange(self.experts, device=rows.device)
        if self.order is not None:
            position = torch.argsort(self.order.flatten())
        position = position[experts]
        group = position // self.size
        # Only the last group can have fewer experts, so that all groups before any other are full.
        own = self.size * starts[group] + (position - group * self.size) * ranks[group]
        coefficients = self._gather("coefficients", own, ranks[group])
        if features is None:
            features = self._active(self._gather("bases", starts[group], ranks[group]))
        if self.transposed:
            return routing.linear(routing.linear(rows, coefficients), features.transpose(1, 2))
        return routing.linear(routing.linear(rows, features), coefficients.transpose(1, 2))

    def _starts(self):
        ranks = self.ranks.flatten().long()
        return torch.cumsum(ranks, 0) - ranks, ranks

    def _gather(self, name, starts, ranks):
        """Return rows of an array from each start, as many as its rank says, then zeros: `[start, widest, ...]`."""
        count, columns = self._shapes[name]
        if not self.widest:
            return torch.zeros(len(starts), 0, columns, dtype=self.dtype, device=starts.device)
        offset = torch.arange(self.widest, device=starts.device)
        index = torch.clamp(starts[:, None] + offset, max=count - 1)
        return torch.where((offset < ranks[:, None])[..., None], self._rows(name, index), 0)

    def _active(self, basis):
        if self.activation == "identity":
            return basis
        with torch.autocast(basis.device.type, enabled=False):
            return ACTIVATIONS[self.activation](basis.float()).to(basis.dtype)
