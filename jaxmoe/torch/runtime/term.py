# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""One summand of the experts' matrices, and the registry of its kinds."""

import torch
from torch import nn

TERMS = {}
"""The terms by the name of their kind, which stands in `config.jaxmoe`."""


def register(kind):
    """Register the class that follows under the name of its kind."""

    def registered(cls):
        TERMS[kind] = cls
        return cls

    return registered


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


def state(tensors):
    """Return what differs when tensors have been replaced or written to."""
    # An inference tensor has no version; it cannot be written to outside inference mode either.
    return [(x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) for x in tensors]


def build(entries, shape, options, where):
    """Return the modules of a sum of terms.

    Args:
        entries: of the terms in `config.jaxmoe`.
        shape: `(experts, out, in)`.
        options: dtype and device of the parameters.
        where: what the terms stand for, for the message.

    Raises:
        ValueError: a term is unknown.
    """
    if unknown := [entry.get("kind") for entry in entries if entry.get("kind") not in TERMS]:
        raise ValueError(f"unknown term {unknown[0]!r} in {where}: this code knows {', '.join(sorted(TERMS))}")
    return nn.ModuleList(TERMS[entry["kind"]](entry, shape, options) for entry in entries)
