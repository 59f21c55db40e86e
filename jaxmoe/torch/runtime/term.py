# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""One summand of the experts' matrices, and the registry of its kinds."""

from math import prod

import torch
from torch import nn

from jaxmoe.torch.runtime.stores import stored_array

TERMS = {}
"""The terms by the name of their kind, which stands in `config.jaxmoe`."""

UNPACKED = 8
"""What a number that is formed from few bits counts in `Routing.visits`, with all that is formed on the way."""


def register(kind):
    """Register the class that follows under the name of its kind."""

    def registered(cls):
        TERMS[kind] = cls
        return cls

    return registered


class Term(nn.Module):
    """One summand of the experts' matrices `[expert, out, in]`: maps rows sorted by expert.

    Every array is a parameter, or lies in few bits in buffers that its entry under `stores` describes; `_array` and
    what is built on it give the numbers of either.

    Args:
        spec: the term's entry in `config.jaxmoe`.
        shape: `(experts, out, in)`.
        options: dtype and device of the parameters.
    """

    _cast: torch.Tensor
    for_all = False
    """Whether the matrix is the same for all experts: the rows then may come in any order, without routing."""

    def __init__(self, spec):
        super().__init__()
        self._stores, self._shapes, self._stored = spec.get("stores", {}), {}, {}

    def _add(self, name, shape, options):
        self._shapes[name] = shape
        if name not in self._stores:
            # Of use only to train from scratch: loading overwrites it or fails (`Factored.from_pretrained`).
            start = torch.empty(prod(shape[:-1]), shape[-1], **options).normal_(std=0.02)
            self.register_parameter(name, nn.Parameter(start))
            return
        self._stored[name] = stored_array(self._stores[name], shape)
        device = _device(options)
        for tensor, (rows, columns, dtype) in self._stored[name].tensors().items():
            self.register_buffer(f"{name}_{tensor}", torch.zeros(rows, columns, dtype=dtype, device=device))
        # What is formed from codes has the dtype to which the model is cast, which whole numbers do not show.
        self.register_buffer("_cast", torch.zeros(0, dtype=options["dtype"], device=device), persistent=False)

    def _add_whole(self, name, values, options):
        # These values too are only a start that fits the sizes: nothing may be derived from them here.
        own = torch.as_tensor(values, dtype=torch.int32, device=_device(options))
        self.register_buffer(name, own.view(1, -1))

    @property
    def dtype(self):
        """Of what is multiplied by rows."""
        return self._cast.dtype if self._stored else next(self.parameters()).dtype

    def _tensors(self, name):
        """Return the tensors in which an array lies, by the names of its store; a parameter has none."""
        if name not in self._stored:
            return {"": getattr(self, name)}
        return {tensor: getattr(self, f"{name}_{tensor}") for tensor in self._stored[name].tensors()}

    def _array(self, name, items=None, dtype=None):
        """Return an array, or some items of its first axis by their indices; one in few bits as numbers of a dtype."""
        if name in self._stored:
            found = self._stored[name].values(self._tensors(name), items).to(dtype or self.dtype)
            return found.view(self._shapes[name]) if items is None else found
        whole = getattr(self, name).view(self._shapes[name])
        return whole if items is None else whole[items]

    def _rows(self, name, index):
        """Return rows of an array `[row, column]` by a slice or by their indices, `[..., column]`."""
        if name not in self._stored:
            return getattr(self, name)[index]
        stored, tensors = self._stored[name], self._tensors(name)
        if isinstance(index, slice):
            return stored.values(tensors, rows=index)[0].to(self.dtype)
        return stored.values(tensors, rows=index.flatten()).to(self.dtype).view(*index.shape, -1)

    def _linear(self, name, rows, routing, transposed=False):
        """Multiply rows by their experts' matrices; those in few bits are formed a few at a time."""

        def oriented(matrices):
            return matrices.transpose(1, 2) if transposed else matrices

        if name not in self._stored:
            return routing.linear(rows, oriented(self._array(name)))
        _, out, in_ = self._shapes[name]
        if routing.together(rows):
            visits = routing.visits(rows, UNPACKED * out * in_)
            parts = [inner.linear(own, oriented(self._array(name, experts))) for experts, own, inner in visits]
        else:
            stored, tensors = self._stored[name], self._tensors(name)
            parts = [stored.product(tensors, own, rows[first:last], transposed) for own, first, last in routing.spans]
        return torch.cat(parts) if parts else rows.new_zeros(0, in_ if transposed else out)

    def prepare(self):
        """Check whole numbers and read what has to be known of them before anything is traced, when they are loaded."""

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()


def _device(options):
    # Programs that start parameters on the meta device may fill those alone: then buffers lie where others are made.
    return None if torch.device(options["device"]).type == "meta" else options["device"]


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
