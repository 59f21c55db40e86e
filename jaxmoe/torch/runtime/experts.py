# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""The routed experts of a layer."""

from functools import reduce
from typing import Any

import torch
from torch import nn

from jaxmoe.torch.runtime.compressed_experts import SkippedExperts
from jaxmoe.torch.runtime.routing import Routing
from jaxmoe.torch.runtime.term import build

TARGETS = ("gate", "up", "gate_up", "down")

WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class FactoredExperts(nn.Module):
    """The routed experts of one layer as sums of terms; called like the transformers module that it replaces.

    Args:
        native: that module, from which gating rule, activation, biases and flags are taken over.
        spec: the module's entry in `config.jaxmoe["modules"]`: `shape`, `terms` and, where not all of a token's experts
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
                raise ValueError(f"unknown target {target!r}: this code knows {', '.join(TARGETS)}")
            shape = (self.experts, outs[target], intermediate if target == "down" else hidden)
            self.add_module(target, build(terms, shape, options, target))
        self.auxiliary = None
        if (main := spec.get("main_experts")) is not None:
            inputs = {**({"gate": hidden} if self.gated else {}), "up": hidden, "down": intermediate}
            self.auxiliary = SkippedExperts(self.experts, inputs, main, spec.get("renorm", "none"), options["device"])

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
