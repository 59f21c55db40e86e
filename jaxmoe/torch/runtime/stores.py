# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Arrays that lie in few bits: codes, packed as streams of bits, scales, zeros and codebooks."""

from math import prod
from statistics import NormalDist
from typing import Any

import torch
from torch.nn import functional as F

FLOATS = ("bfloat16", "float16", "float32")
"""The kinds of scales that are floats."""

SCALES = 256
"""Scales of a matrix that share a unit, where they are held in 8 bits."""


class StoredArray:
    """Matrices whose numbers lie in few bits: which tensors they take, and how their values follow from these.

    A code of b bits stands for s (q - z), or for s table[q]; see `jaxmoe.factors.store`. All tensors have two
    dimensions: axes are stacked along the rows, and whole zeros are packed along the rows of each matrix.

    Args:
        record: of the array, under `stores` of its term in `config.jaxmoe`.
        shape: `[..., row, column]`.
    """

    def __init__(self, record, shape):
        self.bits, self.zero, self.table, self.kind = (record[key] for key in ("bits", "zero", "table", "scale"))
        self.shape, self.matrices = tuple(shape), prod(shape[:-2])
        self.rows, self.columns = shape[-2:]
        self.groups = 0 if self.table == "row" else self.columns // (record["group"] or self.columns)

    def tensors(self):
        """Return rows, columns and dtype of each tensor by name."""
        rows, found = self.matrices * self.rows, {}
        kind = getattr(torch, self.kind) if self.kind in FLOATS else torch.bfloat16
        found["codes"] = rows, _words(self.columns, self.bits), torch.int32
        if self.groups:
            found["scale"] = rows, self.groups, kind if self.kind in FLOATS else torch.uint8
            if self.kind == "quantised":
                found["unit"] = self.matrices, -(-self.rows * self.groups // SCALES), torch.bfloat16
            if self.zero == "integer":
                found["zero"] = self.matrices * _words(self.rows, self.bits), self.groups, torch.int32
            elif self.zero == "real":
                found["zero"] = rows, self.groups, kind
        if self.table in ("row", "matrix"):
            found["table"] = rows if self.table == "row" else self.matrices, 2**self.bits, torch.bfloat16
        return found

    def values(self, tensors, items=None, rows: Any = slice(None)):
        """Return the numbers in float32, `[matrix, row, column]`.

        Args:
            tensors: by the names of `tensors`.
            items: the matrices to form, by their indices; None for all.
            rows: those to form of each, a slice or indices.
        """
        own = {name: x.view(self.matrices, -1, x.shape[1]) for name, x in tensors.items()}
        if items is not None:
            own = {name: x[items] for name, x in own.items()}
        own["codes"] = own["codes"][:, rows]
        codes = _unpacked(own["codes"], self.bits, self.columns)
        if self.table == "row":
            return own["table"][:, rows].float().gather(2, codes.long())
        if self.table == "matrix":
            levels = own["table"].float()[:, 0].gather(1, codes.long().flatten(1)).view(codes.shape)
        elif self.table is not None:
            levels = torch.tensor(_fixed(self.table, self.bits), device=codes.device)[codes.int()]
        else:
            levels = codes.float()
        levels = levels.unflatten(2, (self.groups, -1))
        if self.table is None:
            zeros = self._zeros(own)
            levels = levels - (zeros if isinstance(zeros, int) else zeros[:, rows])
        return (levels * self._scales(own)[:, rows]).flatten(2)

    def _zeros(self, own):
        if self.zero == "none":
            return 2 ** (self.bits - 1)
        if self.zero == "real":
            return own["zero"].float()[..., None]
        # A copy whatever the sizes: words can be seen as octets only where they are next to each other.
        zeros = own["zero"].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        zeros = _unpacked(zeros, self.bits, self.rows)
        return zeros.transpose(1, 2).float()[..., None]

    def _scales(self, own):
        scale = own["scale"]
        if self.kind == "exponent":
            # The exponents of floats, with which they are just the powers of two.
            return (scale.int() << 23).view(torch.float32)[..., None]
        elif self.kind == "quantised":
            unit = own["unit"].float().flatten(1).repeat_interleave(SCALES, 1)[:, : self.rows * self.groups]
            scale = scale.float() * unit.view(scale.shape)
        return scale.float()[..., None]


class MixedArray:
    """Matrices of which blocks of columns lie in different widths: `parts` hold them in the order of `order`.

    Args:
        record: of the array, under `stores` of its term in `config.jaxmoe`.
        shape: `[expert, row, column]`.
    """

    def __init__(self, record, shape):
        self.shape, (self.matrices, self.rows, self.columns) = tuple(shape), shape
        self.width = record["width"]
        self.blocks = self.columns // self.width
        self.parts = [StoredArray(part, (part["blocks"], self.rows, self.width)) for part in record["parts"]]

    def tensors(self):
        """Return rows, columns and dtype of each tensor by name."""
        found = {
            f"{number}_{name}": sizes
            for number, part in enumerate(self.parts)
            for name, sizes in part.tensors().items()
        }
        return found | {"order": (1, self.matrices * self.blocks, torch.int32)}

    def values(self, tensors, items=None):
        """Return the numbers of all matrices, or of some by their indices, in float32: `[matrix, row, column]`."""
        places = torch.argsort(tensors["order"].flatten()).view(self.matrices, self.blocks)
        wanted = (places if items is None else places[items]).flatten()
        found, first = tensors["order"].new_zeros(len(wanted), self.rows, self.width, dtype=torch.float32), 0
        for number, part in enumerate(self.parts):
            own = {name: tensors[f"{number}_{name}"] for name in part.tensors()}
            if torch.compiler.is_compiling():  # which blocks of the part are wanted is not known to a traced program
                inside = (wanted >= first) & (wanted < first + part.matrices)
                blocks = part.values(own)[(wanted - first).clamp(0, part.matrices - 1)]
                found = torch.where(inside[:, None, None], blocks, found)
            else:
                chosen = torch.nonzero((wanted >= first) & (wanted < first + part.matrices)).flatten()
                if len(chosen):
                    found = found.index_copy(0, chosen, part.values(own, wanted[chosen] - first))
            first += part.matrices
        return found.view(-1, self.blocks, self.rows, self.width).transpose(1, 2).flatten(2)


def stored_array(record, shape):
    """Return what a record in `config.jaxmoe` says of an array in few bits."""
    return (MixedArray if "parts" in record else StoredArray)(record, shape)


def _words(codes, bits):
    """Return how many words of 32 bits a row of codes takes."""
    return -(-codes * bits // 32)


def _unpacked(words, bits, count):
    """Return the codes in streams of bits: the first is in the lowest bits of the first word."""
    octets = words.view(torch.uint8)
    if bits == 8:
        return octets[..., :count]
    if 8 % bits:
        # 8 codes take as many octets as a code has bits; zeros fill these up to one number of 64 bits.
        units = -(-count // 8)
        octets = F.pad(octets, (0, max(0, units * bits - octets.shape[-1])))[..., : units * bits]
        whole = F.pad(octets.unflatten(-1, (units, bits)), (0, 8 - bits)).view(torch.int64)
        shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    else:
        whole, shifts = octets[..., None], torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return ((whole >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]


def _fixed(table, bits):
    """Return the values of a codebook that is not stored, by code."""
    if table == "mxfp4":
        magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        return [*magnitudes, *(-x for x in magnitudes)]
    half = 2 ** (bits - 1)
    edge = (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2
    above = [NormalDist().inv_cdf(1 - edge - (0.5 - edge) * place / half) for place in range(half)]
    below = [NormalDist().inv_cdf(1 - edge - (0.5 - edge) * place / (half - 1)) for place in range(half - 1)]
    return [x / above[0] for x in (*(-x for x in below), 0.0, *reversed(above))]
