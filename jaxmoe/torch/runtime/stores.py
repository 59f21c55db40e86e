# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Arrays that lie in few bits: codes, packed as streams of bits, scales, zeros and codebooks."""

from math import gcd, prod
from statistics import NormalDist
from typing import Any

import torch
from torch.nn import functional as F

FLOATS = ("bfloat16", "float16", "float32")
"""The kinds of scales that are floats."""

SCALES = 256
"""Scales of a matrix that share a unit, where they are held in 8 bits."""


FORMED = 1 << 19
"""Numbers of a matrix that are formed at a time to be multiplied by: so many stay in a processor's cache."""


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
        # Codes that are looked up at once: all pairs of short ones are few.
        self.together = 2 if self.bits <= 4 and self.columns % 2 == 0 and self.table != "row" else 1

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
        own = self._chosen(tensors, slice(None) if items is None else items)
        return self._numbers(own, self._grid(own), rows, planar=False)

    def product(self, tensors, item, entering, transposed):
        """Multiply rows by one of the matrices, or by its transpose, of which few numbers are formed at a time.

        Args:
            tensors: by the names of `tensors`.
            item: which matrix.
            entering: `[row, column]`; with `transposed`, as many columns as the matrix has rows.
            transposed: multiply by the matrix as it stands, `x W`, instead of `x W^T`.
        """
        own = self._chosen(tensors, slice(item, item + 1))
        grid, planes = self._grid(own), _planes(self.bits * self.together)
        # Columns may stay in the order in which codes leave their words, if every group has its part in every plane.
        planar = self.columns % (planes * self.together * max(1, self.groups)) == 0
        if planar and not transposed:
            entering = entering.unflatten(1, (-1, planes, self.together)).transpose(1, 2).flatten(1)
        parts, step = [], max(1, FORMED // self.columns)
        for part in (slice(first, first + step) for first in range(0, self.rows, step)):
            weight = self._numbers(own, grid, part, planar=planar)[0].to(entering.dtype)
            parts.append(entering[:, part] @ weight if transposed else F.linear(entering, weight))
        if not transposed:
            return torch.cat(parts, 1)
        out = sum(parts[1:], parts[0])
        return out.unflatten(1, (planes, -1, self.together)).transpose(1, 2).flatten(1) if planar else out

    def _chosen(self, tensors, items):
        return {name: x.view(self.matrices, -1, x.shape[1])[items] for name, x in tensors.items()}

    def _grid(self, own):
        """Return zeros and scales, `[matrix, row, group, 1]`, or None in their places."""
        zeros = self._zeros(own) if self.zero != "none" else None
        return zeros, self._scales(own) if self.groups else None

    def _numbers(self, own, grid, rows, planar):
        """Return some rows in float32, `[matrix, row, column]`: columns in their order, or plane after plane."""
        levels = self._levels(own, rows)
        if not planar:
            levels = levels.transpose(2, 3).flatten(2)[:, :, None, : self.columns]
        levels = levels.flatten(3)
        if self.groups:
            zeros, scales = grid
            levels = levels.unflatten(3, (self.groups, -1))
            if zeros is not None:
                levels = levels.sub_(zeros[:, rows, None])
            levels = levels.mul_(scales[:, rows, None]).flatten(3)
        return levels.flatten(2)

    def _levels(self, own, rows):
        """Return the codes of some rows, or their entries in the codebook: `[matrix, row, plane, unit, code]`."""
        fields = _in_planes(own["codes"][:, rows], self.bits * self.together, -(-self.columns // self.together))
        if self.table == "row":
            books = own["table"][:, rows].float().flatten(0, 1)
        elif self.table == "matrix":
            books = own["table"][:, 0].float()
        elif self.table is not None:
            books = torch.tensor([_fixed(self.table, self.bits)], device=fields.device)
        else:
            # Without zeros of their own, codes count from the middle one.
            zero = 2 ** (self.bits - 1) if self.zero == "none" else 0
            if self.together == 1:
                return fields.float().sub_(zero)[..., None]
            books = torch.arange(-zero, 2**self.bits - zero, dtype=torch.float32, device=fields.device)[None]
        index = fields.int()
        if len(books) > 1:
            first = torch.arange(len(books), dtype=torch.int32, device=fields.device) * 2 ** (self.bits * self.together)
            index += first.view(fields.shape[0], -1, 1, 1)
        if self.together == 1:
            return books.flatten().index_select(0, index.flatten()).view(*fields.shape, 1)
        # Two codes are looked up at once, as one number of 64 bits; the first is in the lower bits.
        codes = 2**self.bits
        pairs = torch.stack((books[:, None].expand(-1, codes, -1), books[..., None].expand(-1, -1, codes)), -1)
        found = pairs.flatten(0, 2).view(torch.int64).flatten().index_select(0, index.flatten())
        return found.view(torch.float32).view(*fields.shape, 2)

    def _zeros(self, own):
        if self.zero == "real":
            return own["zero"].float()[..., None]
        # A copy whatever the sizes: words can be seen as octets only where they are next to each other.
        zeros = own["zero"].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        zeros = _in_planes(zeros, self.bits, self.rows).transpose(2, 3).flatten(2)[..., : self.rows]
        return zeros.transpose(1, 2).float()[..., None]

    def _scales(self, own):
        scale = own["scale"]
        if self.kind == "exponent":
            # The exponents of floats, with which they are just the powers of two.
            scale = (scale.int() << 23).view(torch.float32)
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

    def product(self, tensors, item, entering, transposed):
        """Multiply rows by one of the matrices, as `StoredArray` does."""
        (weight,) = self.values(tensors, torch.tensor([item], device=entering.device)).to(entering.dtype)
        return entering @ weight if transposed else F.linear(entering, weight)


def stored_array(record, shape):
    """Return what a record in `config.jaxmoe` says of an array in few bits."""
    return (MixedArray if "parts" in record else StoredArray)(record, shape)


def _words(codes, bits):
    """Return how many words of 32 bits a row of codes takes."""
    return -(-codes * bits // 32)


def _planes(bits):
    """Return after how many codes the next one begins an octet again."""
    return 8 // gcd(8, bits)


def _in_planes(words, bits, count):
    """Return the codes in streams of bits, the first in the lowest bits of the first word, as `[..., plane, unit]`.

    Code i is at plane i % planes of unit i // planes: within a plane all codes lie in the same bits of their octets,
    and whole planes are moved at once. The last unit may hold more codes than there are.
    """
    planes = _planes(bits)
    units, size = -(-count // planes), planes * bits // 8
    octets = words.view(torch.uint8)
    octets = F.pad(octets, (0, max(0, units * size - octets.shape[-1])))[..., : units * size]
    lanes = [octets[..., lane::size] for lane in range(size)]
    found = []
    for lane, first in (divmod(plane * bits, 8) for plane in range(planes)):
        code = lanes[lane] >> first
        if first + bits > 8:
            code = code | (lanes[lane + 1] << (8 - first))
        found.append(code if bits == 8 else code & (2**bits - 1))
    return torch.stack(found, -2)


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
