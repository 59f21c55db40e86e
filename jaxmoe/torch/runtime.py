# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Run a checkpoint whose experts are stored as sums of factored terms.

This file is copied into every factored checkpoint, so it imports nothing but torch and transformers. A factored model
is the stock model of its architecture in which the experts modules that `config.jaxmoe` names are replaced by
`FactoredExperts`. Router, gating rule, activation and biases remain those of transformers.

The matrix of an expert's projection is the sum of the terms of all targets that cover it: `gate`, `up`, `gate_up` (the
two stacked along their outputs, gate first) and `down`. All parameters are two-dimensional, experts stacked along the
rows: serving engines take an experts module whose parameters are all three-dimensional for a stock one and replace it.
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

    def linear(self, rows, weight):
        """Multiply the rows `[row, in]` of each group by its own matrix of `weight`, `[group, out, in]`."""
        if _grouped_linear is not None and (rows.device.type != "cpu" or torch.compiler.is_compiling()):
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


class Term(nn.Module):
    """One summand of the experts' matrices `[expert, out, in]`: maps rows sorted by expert.

    Args:
        spec: the term's entry in `config.jaxmoe`.
        shape: `(experts, out, in)`.
        options: dtype and device of the parameters.
    """

    def _add(self, name, rows, columns, options):
        # Of use only to train from scratch: loading overwrites it or fails (`Factored.from_pretrained`).
        self.register_parameter(name, nn.Parameter(torch.empty(rows, columns, **options).normal_(std=0.02)))


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


class SharedBasisTerm(Term):
    """A_e f(sum_j alpha_ej B_j), optionally plus one constant, optionally transposed (MoBE, arXiv 2508.05257).

    f(blend) is formed in float32, a few experts at a time and only for experts that have rows. With `cache` it is
    formed once for all experts and kept, which costs as much memory as one low-rank factor of every expert; the cache
    serves only where no gradient is recorded and is renewed when a parameter has changed.
    """

    coefficients: nn.Parameter
    bases: nn.Parameter
    mixing: nn.Parameter
    mean: nn.Parameter

    activations = {  # noqa: RUF012
        "identity": lambda x: x,
        "silu": F.silu,
        "tanh": torch.tanh,
        "gelu": F.gelu,
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "wavelet": lambda x: x * (1 - x * x) / (1 + x * x) ** 3,
    }

    def __init__(self, spec, shape, options):
        super().__init__()
        experts, rows, columns = (shape[0], shape[2], shape[1]) if spec["transposed"] else shape
        self.experts, self.bases_count, self.rank, self.columns = experts, spec["bases"], spec["rank"], columns
        self.transposed, self.cache, self._kept = spec["transposed"], False, None
        if spec["activation"] not in self.activations:
            known = ", ".join(self.activations)
            raise ValueError(f"unknown activation {spec['activation']!r} of a shared basis: this file knows {known}")
        self.activation = spec["activation"]
        self._add("coefficients", experts * rows, self.rank, options)
        self._add("bases", self.bases_count * self.rank, columns, options)
        self._add("mixing", experts, self.bases_count, options)
        if spec["mean"]:
            self._add("mean", 1, 1, options)

    def features(self, mixing):
        """Return f(blend) for some rows of the mixing, `[expert, rank, column]`."""
        with torch.autocast(self.bases.device.type, enabled=False):
            blend = mixing.float() @ self.bases.float().view(self.bases_count, -1)
            return self.activations[self.activation](blend).view(-1, self.rank, self.columns).to(self.bases.dtype)

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
        if torch.compiler.is_compiling():  # which experts have rows is not known to a traced program
            return routing.linear(rows, self._oriented(self.features(self.mixing)))
        if self.cache and not torch.is_grad_enabled():
            return routing.linear(rows, self._oriented(self._cached()))
        parts, at_a_time = [], max(1, BLEND_NUMBERS // (self.rank * self.columns))
        for first in range(0, len(routing.spans), at_a_time):
            block = routing.spans[first : first + at_a_time]
            experts = torch.tensor([expert for expert, _, _ in block], device=rows.device)
            start, stop = block[0][1], block[-1][2]
            inner = Routing(routing.offsets[experts] - start)
            parts.append(inner.linear(rows[start:stop], self._oriented(self.features(self.mixing[experts]))))
        return torch.cat(parts) if parts else rows.new_zeros(0, self.columns if self.transposed else self.rank)

    def _oriented(self, features):
        return features.transpose(1, 2) if self.transposed else features

    def _cached(self):
        # An inference tensor has no version; it cannot be written to outside inference mode either.
        state = [
            (p.data_ptr(), p.dtype, p.device, 0 if p.is_inference() else p._version) for p in (self.mixing, self.bases)
        ]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.features(self.mixing)
        return self._kept[1]


TERMS = {"dense": DenseTerm, "low_rank": LowRankTerm, "shared_basis": SharedBasisTerm}
"""The terms by the name that stands in `config.jaxmoe`."""

TARGETS = ("gate", "up", "gate_up", "down")
WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class FactoredExperts(nn.Module):
    """The routed experts of one layer as sums of terms; called like the transformers module that it replaces.

    Args:
        native: that module, from which gating rule, activation, biases and flags are taken over.
        spec: the layer's entry in `config.jaxmoe["experts"]`: `shape` and `terms`.
    """

    down: nn.ModuleList
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

    def _activate(self, rows, routing, experts):
        outs = {target: [term(rows, routing) for term in getattr(self, target, ())] for target in ("gate", "up")}
        if not self.gated:
            return self.act_fn(reduce(torch.add, outs["up"]) + self._bias("up_proj_bias", experts))
        for term in getattr(self, "gate_up", ()):
            for target, part in zip(("gate", "up"), term(rows, routing).chunk(2, -1)):
                outs[target].append(part)
        both = [reduce(torch.add, parts) for parts in outs.values()]
        # The gating rule and its bias see the outputs in the native order: concatenated, or interleaved (gpt_oss).
        concatenated = getattr(self, "is_concatenated", True)
        gate_up = torch.cat(both, -1) if concatenated else torch.stack(both, -1).flatten(-2)
        return self.native._apply_gate(self, gate_up + self._bias("gate_up_proj_bias", experts))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        top_k = top_k_index.shape[-1]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.experts, device=experts.device), right=True)
        routing = Routing(ends.to(torch.int32))
        inner = self._activate(tokens[order // top_k], routing, experts)
        out = reduce(torch.add, [term(inner, routing) for term in self.down]) + self._bias("down_proj_bias", experts)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order, None]
        summed = weighted[torch.argsort(order)].view(-1, top_k, out.shape[-1]).sum(1)
        return summed.to(hidden_states.dtype).view_as(hidden_states)


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
        if isinstance(module, SharedBasisTerm):
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
