# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Run a checkpoint whose experts are stored as sums of factored terms.

This file is copied into every factored checkpoint, so it imports nothing but torch and transformers. A factored model
is the stock model of its architecture in which the experts modules that `config.jaxmoe` names are replaced by
`FactoredExperts`. Router, gating rule, activation and biases remain those of transformers.

The matrix of an expert's projection is the sum of the terms of all targets that cover it: `gate`, `up`, `gate_up` (the
two stacked along their outputs, gate first) and `down`. All parameters are two-dimensional, experts stacked along the
rows: serving engines take an experts module whose parameters are all three-dimensional for a stock one and replace it.
Whole numbers, such as ranks and places, are buffers: casts leave them alone.

A term whose matrix is the same for all experts is applied to every token once, whatever the number of its experts.

With `main_experts` in a module's record only so many of a token's experts run, those of the largest weights. Vectors of
the others, averaged by their weights, scale the inputs of the projections instead (Compressed Experts, arXiv
2503.00634). The stock router chooses and weighs; vectors and averages are float32 whatever the model is.
"""

from functools import cached_property, reduce
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, conversion_mapping

FORMAT_VERSION = 1
"""The newest layout of factored checkpoints that this file reads."""

MINIMUM_TRANSFORMERS = "5.16"
"""Older versions have other experts modules, or none, and some would compute wrong numbers in silence."""

BLEND_NUMBERS = 1 << 26
"""At most so many float32 numbers of blended bases are formed at a time, one expert's at least."""

if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"this checkpoint's experts are factored by jaxmoe and need transformers {MINIMUM_TRANSFORMERS} or newer, but "
        f"{transformers.__version__} is installed: pip install --upgrade transformers"
    )

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


def _grouped(rows, weight, offsets):
    # The grouped kernels want rows of a multiple of 16 bytes, which a rank need not be: zeros fill them up.
    assert _grouped_linear is not None
    out, multiple = weight.shape[1], 16 // weight.element_size()
    fill_out, fill_in = -out % multiple, -weight.shape[2] % multiple
    if fill_out or fill_in:
        rows, weight = F.pad(rows, (0, fill_in)), F.pad(weight, (0, fill_in, 0, fill_out))
    return _grouped_linear(rows, weight, offsets)[:, :out]


def _visits(rows, routing, numbers):
    """Cut rows into parts of the experts that have any, as `(experts, rows, routing)`.

    As many experts go together as keep what is formed for them, `numbers` each, below `BLEND_NUMBERS`.
    """
    if torch.compiler.is_compiling():  # which experts have rows is not known to a traced program
        return [(torch.arange(len(routing.offsets), device=rows.device), rows, routing)]
    parts, at_a_time = [], max(1, BLEND_NUMBERS // max(1, numbers))
    for first in range(0, len(routing.spans), at_a_time):
        block = routing.spans[first : first + at_a_time]
        experts = torch.tensor([expert for expert, _, _ in block], device=rows.device)
        start, stop = block[0][1], block[-1][2]
        parts.append((experts, rows[start:stop], Routing(routing.offsets[experts] - start)))
    return parts


class Term(nn.Module):
    """One summand of the experts' matrices `[expert, out, in]`: maps rows sorted by expert.

    Args:
        spec: the term's entry in `config.jaxmoe`.
        shape: `(experts, out, in)`.
        options: dtype and device of the parameters.
    """

    for_all = False
    """Whether the matrix is the same for all experts: the rows then may come in any order, without routing."""

    def _add(self, name, rows, columns, options):
        # Of use only to train from scratch: loading overwrites it or fails (`Factored.from_pretrained`).
        self.register_parameter(name, nn.Parameter(torch.empty(rows, columns, **options).normal_(std=0.02)))

    def _add_whole(self, name, values, options):
        # These values too are only a start that fits the sizes: nothing may be derived from them here. Programs that
        # start parameters on the meta device may fill those alone: then buffers lie where others are made.
        device = None if torch.device(options["device"]).type == "meta" else options["device"]
        self.register_buffer(name, torch.as_tensor(values, dtype=torch.int32, device=device).view(1, -1))

    def prepare(self):
        """Check whole numbers and read what has to be known of them before anything is traced, when they are loaded."""

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()


def _state(tensors):
    """Return what differs when tensors have been replaced or written to."""
    # An inference tensor has no version; it cannot be written to outside inference mode either.
    return [(x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) for x in tensors]


class DenseTerm(Term):
    """W_e itself."""

    dense: nn.Parameter

    def __init__(self, spec, shape, options):
        super().__init__()
        self.shape = shape
        self._add("dense", shape[0] * shape[1], shape[2], options)

    def forward(self, rows, routing):
        return routing.linear(rows, self.dense.view(self.shape))


class LowRankTerm(Term):
    """L_e R_e."""

    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, spec, shape, options):
        super().__init__()
        experts, out, in_ = shape
        self.experts, self.rank = experts, spec["rank"]
        self._add("left", experts * out, self.rank, options)
        self._add("right", experts * self.rank, in_, options)

    def forward(self, rows, routing):
        inner = routing.linear(rows, self.right.view(self.experts, self.rank, -1))
        return routing.linear(inner, self.left.view(self.experts, -1, self.rank))


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


class BlendedTerm(Term):
    """A term with features f(sum_j alpha_ej B_j) of its experts, `[expert, rank, column]`.

    They are formed in float32, a few experts at a time and only for experts that have rows. With `cache` they are
    formed once for all experts and kept, which costs as much memory as one low-rank factor of every expert; the cache
    serves only where no gradient is recorded and is renewed when a parameter has changed.
    """

    bases: nn.Parameter
    mixing: nn.Parameter

    def __init__(self, spec, shape):
        super().__init__()
        self.experts, self.rows, self.columns = (shape[0], shape[2], shape[1]) if spec["transposed"] else shape
        self.transposed, self.cache, self._kept = spec["transposed"], False, None
        if spec["activation"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {spec['activation']!r} of a shared basis: this file knows {known}")
        self.activation = spec["activation"]

    def features(self, mixing):
        """Return f(blend) for some rows of the mixing."""
        raise NotImplementedError

    def _blend(self, mixing, bases):
        with torch.autocast(bases.device.type, enabled=False):
            blend = mixing.float() @ bases.float().flatten(1)
            return ACTIVATIONS[self.activation](blend).view(-1, *bases.shape[1:]).to(bases.dtype)

    def _of(self, experts):
        """Return the features of some experts, from the cache where it may serve."""
        if torch.compiler.is_compiling():
            return self.features(self.mixing)
        if self.cache and not torch.is_grad_enabled():
            return self._cached()[experts]
        return self.features(self.mixing[experts])

    def _cached(self):
        state = _state((self.mixing, self.bases))
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.features(self.mixing)
        return self._kept[1]


class SharedBasisTerm(BlendedTerm):
    """A_e f(sum_j alpha_ej B_j), optionally plus one constant, optionally transposed (MoBE, arXiv 2508.05257)."""

    coefficients: nn.Parameter
    mean: nn.Parameter

    activations = ACTIVATIONS

    def __init__(self, spec, shape, options):
        super().__init__(spec, shape)
        self.bases_count, self.rank = spec["bases"], spec["rank"]
        self._add("coefficients", self.experts * self.rows, self.rank, options)
        self._add("bases", self.bases_count * self.rank, self.columns, options)
        self._add("mixing", self.experts, self.bases_count, options)
        if spec["mean"]:
            self._add("mean", 1, 1, options)

    def features(self, mixing):
        return self._blend(mixing, self.bases.view(self.bases_count, self.rank, self.columns))

    def forward(self, rows, routing):
        coefficients = self.coefficients.view(self.experts, -1, self.rank)
        if self.transposed:
            out = self._multiply(routing.linear(rows, coefficients.transpose(1, 2)), routing)
        else:
            out = routing.linear(self._multiply(rows, routing), coefficients)
        if hasattr(self, "mean"):
            # A constant matrix maps a row to its sum times the constant, for every output.
            out = out + (rows.float().sum(-1, keepdim=True) * self.mean.float()).to(out.dtype)
        return out

    def _multiply(self, rows, routing):
        if self.cache and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return routing.linear(rows, self._oriented(self._cached()))
        parts = [
            inner.linear(own, self._oriented(self._of(experts)))
            for experts, own, inner in _visits(rows, routing, self.rank * self.columns)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.columns if self.transposed else self.rank)

    def _oriented(self, features):
        return features.transpose(1, 2) if self.transposed else features


class GroupedTerm(BlendedTerm):
    """A_e f(B_g(e)) or A_e f(sum_j alpha_ej B_j), each group of experts with a rank of its own.

    Coefficients and bases are stored without padding. The loop over experts multiplies by the stored rows as they are;
    where all experts' products are one call, they are padded to the largest rank first.
    """

    coefficients: nn.Parameter
    ranks: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, spec, shape, options):
        super().__init__(spec, shape)
        self.size, self.total, self.all_ranks = spec["size"], spec["total"], spec["rows"]
        self.groups = -(-self.experts // self.size)
        self._add("coefficients", self.all_ranks, self.rows, options)
        self._add("bases", self.total, self.columns, options)
        self._add_whole("ranks", self._some_ranks(), options)
        if spec["mixing"]:
            self._add("mixing", self.experts, self.groups, options)
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
        state = _state(whole)
        if self._known is None or self._known[0] != state:
            self._known = state, self._read()
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
        return self._blend(mixing, self._gather(self.bases, *self._starts()))

    def forward(self, rows, routing):
        if self.widest is None:
            self._places()
        together = routing.together(rows)
        parts = []
        for experts, own, inner in _visits(rows, routing, self.widest * (self.columns + self.rows * together)):
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
        coefficients = self.coefficients[stored]
        basis = self._active(self.bases[base]) if blend is None else blend[: stored.stop - stored.start]
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
        coefficients = self._gather(self.coefficients, own, ranks[group])
        if features is None:
            features = self._active(self._gather(self.bases, starts[group], ranks[group]))
        if self.transposed:
            return routing.linear(routing.linear(rows, coefficients), features.transpose(1, 2))
        return routing.linear(routing.linear(rows, features), coefficients.transpose(1, 2))

    def _starts(self):
        ranks = self.ranks.flatten().long()
        return torch.cumsum(ranks, 0) - ranks, ranks

    def _gather(self, flat, starts, ranks):
        """Return rows from each start, as many as its rank says, then zeros: `[start, widest, ...]`."""
        if not self.widest:
            return flat.new_zeros(len(starts), 0, flat.shape[1])
        offset = torch.arange(self.widest, device=flat.device)
        index = torch.clamp(starts[:, None] + offset, max=len(flat) - 1)
        return torch.where((offset < ranks[:, None])[..., None], flat[index], 0)

    def _active(self, basis):
        if self.activation == "identity":
            return basis
        with torch.autocast(basis.device.type, enabled=False):
            return ACTIVATIONS[self.activation](basis.float()).to(basis.dtype)


class SharedTerm(Term):
    """One matrix for all experts, with or without all channels of an axis; further ones may be masked in every call."""

    weight: nn.Parameter
    kept: torch.Tensor | None
    for_all = True

    def __init__(self, spec, shape, options):
        super().__init__()
        _, self.out, in_ = shape
        self.axis, self.parts, self.dynamic = spec["axis"], spec["parts"], spec["dynamic"]
        rows, columns = self.out, in_
        if spec["kept"] is None:
            self.register_buffer("kept", None)
        else:
            self._add_whole("kept", list(range(spec["kept"])), options)
            rows, columns = (rows, spec["kept"]) if self.axis == "in" else (self.parts * spec["kept"], columns)
        self._add("weight", rows, columns, options)

    def forward(self, rows, routing=None):
        if self.kept is not None and self.axis == "in":
            rows = rows[:, self.kept.flatten().long()]
        if self.dynamic:
            rows = rows * self._mask(rows)
        y = F.linear(rows, self.weight)
        if self.kept is None or self.axis == "in":
            return y
        first = torch.arange(self.parts, device=y.device)[:, None] * (self.out // self.parts)
        places = (first + self.kept.flatten()).flatten()
        return y.new_zeros(len(y), self.out).index_copy(1, places, y)

    @torch.no_grad()
    def _mask(self, rows):
        """Return zeros for the channels that contribute least to these rows."""
        scores = rows.float().square().sum(0) * self.weight.float().square().sum(0)
        order = torch.sort(scores, descending=True, stable=True).indices
        mask = torch.zeros(len(scores), dtype=rows.dtype, device=rows.device)
        mask[order[: len(scores) - self.dynamic]] = 1
        return mask


class MatrixTerm(Term):
    """A term whose matrices are formed for the experts that have rows, a few at a time."""

    shape: Any
    numbers: int
    values: nn.Parameter

    def flat(self):
        """Return the values as they stand in the matrices, the same for all experts."""
        return self.values.flatten()

    def matrices(self, experts, values):
        """Return the matrices of some experts, `[expert, out, in]`."""
        raise NotImplementedError

    def forward(self, rows, routing):
        # What is formed on the way, indices among it, takes several times as much as the matrices.
        visits, values = _visits(rows, routing, 8 * self.numbers), self.flat()
        parts = [inner.linear(own, self.matrices(experts, values)) for experts, own, inner in visits]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.shape[1])


class HashedTerm(MatrixTerm):
    """P eta for each group of experts: few values, each at many places that a hash chooses (arXiv 2602.09316)."""

    seed: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, spec, shape, options):
        super().__init__()
        self.shape, self.numbers = shape, shape[1] * shape[2]
        self.size, self.buckets, self.last, self.balanced = (
            spec[key] for key in ("size", "buckets", "last", "balanced")
        )
        self.groups = -(-shape[0] // self.size)
        self._add("values", 1, (self.groups - 1) * self.buckets + self.last, options)
        self._add_whole("seed", [0], options)
        if spec["order"]:
            self._add_whole("order", list(range(shape[0])), options)
        else:
            self.register_buffer("order", None)

    def flat(self):
        return (self.values.flatten().float() * self._scales()).to(self.values.dtype)

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
        device = self.values.device
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


class SparseTerm(MatrixTerm):
    """Single entries: values, their places in the matrix row by row, and how many each expert has."""

    indices: torch.Tensor
    counts: torch.Tensor

    def __init__(self, spec, shape, options):
        super().__init__()
        self.shape, self.numbers, entries = shape, shape[1] * shape[2], spec["entries"]
        self._add("values", 1, entries, options)
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


class MergedTerm(MatrixTerm):
    """One matrix for every cluster of experts (arXiv 2410.08589)."""

    merged: nn.Parameter
    labels: torch.Tensor

    def __init__(self, spec, shape, options):
        super().__init__()
        clusters = spec["clusters"]
        self.shape, self.numbers = shape, shape[1] * shape[2]
        self._add("merged", clusters * shape[1], shape[2], options)
        self._add_whole("labels", [expert % clusters for expert in range(shape[0])], options)

    def flat(self):
        return self.merged.view(-1, *self.shape[1:])

    def matrices(self, experts, values):
        return values[self.labels.flatten()[experts]]


TERMS = {
    "dense": DenseTerm,
    "low_rank": LowRankTerm,
    "shared_basis": SharedBasisTerm,
    "grouped": GroupedTerm,
    "shared": SharedTerm,
    "hashed": HashedTerm,
    "sparse": SparseTerm,
    "merged": MergedTerm,
}
"""The terms by the name that stands in `config.jaxmoe`."""


class StandIn(nn.Module):
    """Vectors that stand in for experts that do not run, one for the inputs of each of an expert's projections.

    Args:
        experts: how many there are.
        inputs: what each projection reads, by its name: how many numbers.
        main: how many of a token's experts run.
        renorm: "main" scales the weights of those that run to the sum of all, "none" leaves them.
        device: of the vectors.
    """

    LEAST = 1e-12
    """Sums of router weights below this are taken for nothing."""

    def __init__(self, experts, inputs, main, renorm, device):
        super().__init__()
        if renorm not in ("none", "main"):
            raise ValueError(f"unknown renorm {renorm!r}: this file knows none, main")
        self.experts, self.inputs, self.main, self.renorm = experts, dict(inputs), main, renorm
        for name, size in self.inputs.items():
            self.register_parameter(name, nn.Parameter(torch.ones(experts, size, dtype=torch.float32, device=device)))

    def forward(self, index, weights):
        """Return the experts that run, their weights, and the factors of each projection's inputs, token by token."""
        if index.shape[-1] <= self.main:
            return index, weights, {}
        # Of equal weights the lower index comes first.
        index, order = torch.sort(index, dim=-1)
        weights, order = torch.sort(weights.gather(-1, order), dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
        first, rest = weights[:, : self.main], weights[:, self.main :].float()
        if self.renorm == "main":
            total, own = (part.float().sum(-1, keepdim=True) for part in (weights, first))
            first = (first * (total / own.clamp(min=self.LEAST))).to(weights.dtype)
        with torch.autocast(weights.device.type, enabled=False):
            total = rest.sum(-1, keepdim=True)
            enough = (total > self.LEAST) & (rest.shape[-1] > 1)
            share = torch.where(enough, rest / torch.where(enough, total, 1), 1 / rest.shape[-1])
            mixing = share.new_zeros(len(index), self.experts).scatter_add(1, index[:, self.main :], share)
            vectors = torch.cat([getattr(self, name).float() for name in self.inputs], 1)
            scales = (mixing @ vectors).split(list(self.inputs.values()), 1)
        return index[:, : self.main], first, dict(zip(self.inputs, scales))


TARGETS = ("gate", "up", "gate_up", "down")
WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class FactoredExperts(nn.Module):
    """The routed experts of one layer as sums of terms; called like the transformers module that it replaces.

    Args:
        native: that module, from which gating rule, activation, biases and flags are taken over.
        spec: the layer's entry in `config.jaxmoe["experts"]`: `shape`, `terms` and, where not all of a token's experts
            run, `main_experts`.
    """

    down: Any
    down_proj_bias: torch.Tensor | None
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, native, spec):
        super().__init__()
        for name, value in vars(native).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in native.named_children():
            self.add_module(name, child)
        for name, parameter in native.named_parameters(recurse=False):
            if name not in WEIGHTS:
                self.register_parameter(name, parameter)
        self.native = type(native)
        self.experts, hidden, intermediate, self.gated = (
            spec["shape"][key] for key in ("experts", "hidden", "intermediate", "gated")
        )
        self._check(native, (self.experts, hidden, intermediate))
        covered = {projection for target, terms in spec["terms"].items() if terms for projection in target.split("_")}
        if missing := {"gate", "up", "down"} - covered - (set() if self.gated else {"gate"}):
            raise ValueError(f"no term for {', '.join(sorted(missing))}")
        outs = {"gate": intermediate, "up": intermediate, "gate_up": 2 * intermediate, "down": hidden}
        options = {"dtype": native.down_proj.dtype, "device": native.down_proj.device}
        for target, terms in spec["terms"].items():
            if target not in TARGETS:
                raise ValueError(f"unknown target {target!r}: this file knows {', '.join(TARGETS)}")
            shape = (self.experts, outs[target], intermediate if target == "down" else hidden)
            if unknown := [term.get("kind") for term in terms if term.get("kind") not in TERMS]:
                raise ValueError(f"unknown term {unknown[0]!r} in {target}: this file knows {', '.join(TERMS)}")
            self.add_module(target, nn.ModuleList(TERMS[term["kind"]](term, shape, options) for term in terms))
        self.auxiliary = None
        if (main := spec.get("main_experts")) is not None:
            inputs = {**({"gate": hidden} if self.gated else {}), "up": hidden, "down": intermediate}
            self.auxiliary = StandIn(self.experts, inputs, main, spec.get("renorm", "none"), options["device"])

    def _check(self, native, shape):
        found = tuple(native.down_proj.shape)
        if getattr(native, "is_transposed", False):
            found = (found[0], found[2], found[1])
        if found != shape or self.gated != hasattr(native, "gate_up_proj"):
            raise ValueError(
                f"config.jaxmoe gives (experts, hidden, intermediate) {shape}, gated {self.gated}, but the model's are "
                f"{found}, {hasattr(native, 'gate_up_proj')}"
            )

    def _bias(self, name, experts):
        bias = getattr(self, name, None)
        return 0 if bias is None else bias[experts]

    def _multiply(self, target, read, token, routing):
        tokens, rows = read
        # What is the same for all experts is computed once for a token, however many experts it has.
        return [term(tokens)[token] if term.for_all else term(rows, routing) for term in getattr(self, target, ())]

    def _activate(self, tokens, scales, token, routing, experts):
        projections = ("gate", "up") if self.gated else ("up",)
        scaled = [tokens * scales[name].to(tokens.dtype) for name in projections] if scales else [tokens]
        reads = [(own, own[token]) for own in scaled]
        outs = {name: self._multiply(name, read, token, routing) for name, read in zip(projections, reads * 2)}
        if not self.gated:
            return self.act_fn(reduce(torch.add, outs["up"]) + self._bias("up_proj_bias", experts))
        # Terms of both are applied twice where gate and up read different rows.
        both = [self._multiply("gate_up", read, token, routing) for read in reads] * 2
        for half, name in enumerate(projections):
            outs[name] += [out.chunk(2, -1)[half] for out in both[half]]
        both = [reduce(torch.add, parts) for parts in outs.values()]
        # The gating rule and its bias see the outputs in the native order: concatenated, or interleaved (gpt_oss).
        concatenated = getattr(self, "is_concatenated", True)
        gate_up = torch.cat(both, -1) if concatenated else torch.stack(both, -1).flatten(-2)
        return self.native._apply_gate(self, gate_up + self._bias("gate_up_proj_bias", experts))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        scales = {}
        if self.auxiliary is not None:
            top_k_index, top_k_weights, scales = self.auxiliary(top_k_index, top_k_weights)
        top_k = top_k_index.shape[-1]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.experts, device=experts.device), right=True)
        routing = Routing(ends.to(torch.int32))
        token = order // top_k
        inner = self._activate(tokens, scales, token, routing, experts)
        if scales:
            inner = inner * scales["down"].to(inner.dtype)[token]
        weights, back = top_k_weights.reshape(-1)[order, None], torch.argsort(order)

        def summed(rows):
            return (rows * weights)[back].view(-1, top_k, rows.shape[-1]).sum(1)

        normed = getattr(self, "has_post_expert_norm", False)
        # A matrix of all experts may wait until their activations are one weighted sum, if nothing stands between.
        once = [] if normed else [term for term in self.down if term.for_all]
        parts = [term(inner, routing) for term in self.down if normed or not term.for_all]
        if (bias := getattr(self, "down_proj_bias", None)) is not None:
            parts.append(bias[experts])
        outs = []
        if parts:
            out = reduce(torch.add, parts)
            outs.append(summed(self.post_expert_norm(out) if normed else out))
        if once:
            entered = summed(inner).to(inner.dtype)
            outs += [term(entered) for term in once]
        return reduce(torch.add, outs).to(hidden_states.dtype).view_as(hidden_states)


def swap_experts(model, experts):
    """Replace the experts modules that `experts` names, on whatever device they are, the meta device too.

    Args:
        model: a causal language model or its base model.
        experts: for each module, by its path in the causal language model, its `shape` and `terms`.

    Raises:
        ValueError: if a module is missing or a spec does not fit it.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    paths = {path: path if path in modules else path.removeprefix(prefix) for path in experts}
    if missing := [path for path in experts if paths[path] not in modules]:
        raise ValueError(f"{type(model).__name__} has no module {', '.join(missing)} that config.jaxmoe names")
    for path, spec in experts.items():
        try:
            factored = FactoredExperts(modules[paths[path]], spec)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error
        model.set_submodule(paths[path], factored)


def cache_blends(model, enabled=True):
    """Keep the blended bases of all experts in memory, or drop them: faster, and larger by a low-rank factor."""
    for module in model.modules():
        if isinstance(module, BlendedTerm):
            module.cache, module._kept = enabled, None


class Factored(PreTrainedModel):
    """Mixed into a stock model class: swaps the experts and refuses to run without their tensors."""

    def __init__(self, config, *args, **kwargs):
        spec = config.jaxmoe
        if spec["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has jaxmoe's format {spec['format_version']}, and this code reads up to "
                f"{FORMAT_VERSION}: pip install --upgrade jaxmoe, or use the code inside the checkpoint"
            )
        super().__init__(config, *args, **kwargs)
        swap_experts(self, spec["experts"])
        cache_blends(self, spec.get("cache_blends", False))
        if any("main_experts" in entry for entry in spec["experts"].values()):
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), "experts.auxiliary"}
        # Factors are replicated, not split over devices, and the stock plans would sum or mask the replicas' outputs.
        plan = self._tp_plan or {}
        self._tp_plan = {name: rule for name, rule in plan.items() if "experts" not in name.split(".")}
        self._ep_plan = {}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load as transformers does, but never leave an expert with missing, mismatched or stray tensors."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        prefix = f"{model.base_model_prefix}."
        paths = tuple(f"{path}." for path in model.config.jaxmoe["experts"])
        paths += tuple(path.removeprefix(prefix) for path in paths)
        lost = []
        for trouble in ("missing", "mismatched", "unexpected"):
            names = (name if isinstance(name, str) else name[0] for name in info[f"{trouble}_keys"])
            lost += [f"{name} ({trouble})" for name in sorted(names) if name.startswith(paths)]
        if lost:
            raise ValueError(
                f"{len(lost)} tensors of factored experts do not agree with config.json: {', '.join(lost[:20])}"
                f"{', ...' if len(lost) > 20 else ''}. The checkpoint is damaged or incomplete: fetch or write it again"
            )
        for module in model.modules():
            if isinstance(module, Term):
                module.prepare()
        return (model, info) if output_loading_info else model


def copy_conversions(config, *models):
    """Convert names on disk for factored classes as for the stock classes that they extend.

    Args:
        config: the factored configuration class, whose parent is the stock one.
        models: the factored model classes, `Factored` and a stock class their parents.
    """
    pairs = [(config.model_type, config.__base__.model_type)]
    pairs += [(model.__name__, model.__bases__[-1].__name__) for model in models]
    for factored, stock in pairs:
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(factored, mapping, overwrite=True)


from transformers.models.qwen3_moe.modeling_qwen3_moe import (  # noqa: E402
    Qwen3MoeModel,
    Qwen3MoeForCausalLM,
)

from .configuration_jaxmoe import FactoredQwen3MoeConfig  # noqa: E402


class FactoredQwen3MoeModel(Factored, Qwen3MoeModel):
    config_class = FactoredQwen3MoeConfig
    config: FactoredQwen3MoeConfig


class FactoredQwen3MoeForCausalLM(Factored, Qwen3MoeForCausalLM):
    config_class = FactoredQwen3MoeConfig
    config: FactoredQwen3MoeConfig


copy_conversions(FactoredQwen3MoeConfig, FactoredQwen3MoeModel, FactoredQwen3MoeForCausalLM)
