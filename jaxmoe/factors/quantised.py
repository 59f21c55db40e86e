"""Arrays held in few bits: packed codes, scales, zeros and tables, as they lie in files.

    {name}_codes   int32 [row, word]          b-bit codes of each row as one stream, see `packing`
    {name}_scale   bf16 [row, group]          or f16, f32; uint8 where scales are exponents or 8 bits of a unit
    {name}_unit    bf16 [matrix, block]       what these 8 bits count, one for each `BLOCK` scales of a matrix
    {name}_zero    int32 [word, group]        integer zeros of each matrix, packed along its rows
                   bf16 [row, group]          or real ones
    {name}_table   bf16 [row or matrix, 2^b]  learned codebooks

All axes but the last are stacked along rows. A `MixedArray` is one of matrices that are cut into blocks of columns, or
left whole, and held in several widths: a part for each, and the order in which the parts' blocks come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Held, pytree
from jaxmoe.factors.packing import pack, unpack, words
from jaxmoe.factors.spec import Number, Size, as_spec, check_order
from jaxmoe.factors.store import Rounded, Scale, Store, Table, Zero

BLOCK = 256
"""Scales of a matrix, row by row, that share a unit where they are held in 8 bits."""

CODED = ("_codes", "_scale", "_zero")
"""Ends of the names of tensors whose whole numbers stand for floats."""

FLOATS = ("bfloat16", "float16", "float32")
"""The kinds of scales that are floats."""


def held_scales(scale: Float[AnyArray, "expert out group"], store: Store) -> Float[Array, "expert out group"]:
    """Return the nearest positive numbers that the store's scales can hold, in float32; a second time changes nothing.

    Exponents are rounded up. Scales of 8 bits are 1 to 255 times a unit, the largest of a block being 255 units.

    Example:
        >>> held_scales(jnp.array([[[0.3, 0.1]]]), Store(bits=4, scale="exponent")).tolist()
        [[[0.5, 0.125]]]
    """
    scale = jnp.asarray(scale, jnp.float32)
    if store.scale == "quantised":
        codes, unit = _counted(scale)
        return codes.astype(jnp.float32) * _spread(unit, scale.shape[1:])
    if store.scale == "exponent":
        return jnp.ldexp(jnp.float32(1), _exponents(scale))
    kind = jnp.finfo(store.scale)
    return jnp.clip(scale, float(kind.tiny), float(kind.max)).astype(store.scale).astype(jnp.float32)


def held_zeros(zero: Float[AnyArray, "..."], store: Store) -> Float[Array, "..."]:
    """Return the nearest real zeros that the store can hold, in float32: in the type of its scales, or in bfloat16.

    Example:
        >>> held_zeros(jnp.array([1.001]), Store(bits=4, zero="real")).tolist()
        [1.0]
    """
    largest = float(jnp.finfo(_zero_dtype(store)).max)
    return jnp.clip(jnp.asarray(zero, jnp.float32), -largest, largest).astype(_zero_dtype(store)).astype(jnp.float32)


def _zero_dtype(store: Store) -> str:
    return store.scale if store.scale in FLOATS else "bfloat16"


def _exponents(scale):
    """Return the least e with 2^e >= scale, from -126 to 127."""
    mantissa, exponent = jnp.frexp(scale)
    return jnp.clip(exponent - (mantissa == 0.5), -126, 127)


def _blocked(scale):
    """Return scales `[expert, out, group]` as `[expert, block, scale of the block]`, with zeros at the end."""
    flat = scale.reshape(len(scale), -1)
    blocks = -(-flat.shape[1] // BLOCK)
    return jnp.pad(flat, ((0, 0), (0, blocks * BLOCK - flat.shape[1]))).reshape(len(flat), blocks, BLOCK)


def _spread(unit, shape):
    return jnp.repeat(unit.astype(jnp.float32), BLOCK, axis=1)[:, : prod(shape)].reshape(-1, *shape)


def _counted(scale):
    """Return scales as numbers of 1 to 255 units, and the units `[expert, block]`."""
    # Cut off, not rounded: so the largest scale is 255 units, and the same unit is found again.
    wide = jnp.max(_blocked(scale), axis=2) / 255
    unit = jnp.maximum((wide.view(jnp.int32) & -(2**16)).view(jnp.float32), float(jnp.finfo(jnp.bfloat16).tiny))
    codes = jnp.clip(jnp.round(scale / _spread(unit, scale.shape[1:])), 1, 255).astype(jnp.uint8)
    return codes, unit.astype(jnp.bfloat16)


class StoreRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A `Store` as it stands in `config.json`."""

    bits: int
    group: Number
    zero: Zero
    table: Table | None
    scale: Scale


class PartRecord(StoreRecord):
    """One part of a `MixedArray`, with the number of its blocks."""

    blocks: Size


class MixedRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A `MixedArray` as it stands in `config.json`."""

    width: Size
    parts: list[PartRecord]


def held_array(record: Mapping[str, Any], shape: tuple[int, ...]) -> "QuantisedArray | MixedArray":
    """Return the abstract array that a record stands for, of decoded JSON.

    Raises:
        JaxmoeError: it is no record of one, or does not fit the shape.

    Example:
        >>> array = QuantisedArray.abstract((2, 3, 64), Store(bits=4))
        >>> held_array(array.record(), array.shape) == array
        True
    """
    if "parts" not in record:
        return QuantisedArray.abstract(shape, _store(as_spec(record, StoreRecord, "its store")))
    mixed = as_spec(record, MixedRecord, "its stores")
    parts = [(_store(own), own.blocks) for own in mixed.parts]
    return MixedArray.abstract(shape, parts, width=mixed.width)


def _store(record: StoreRecord) -> Store:
    return Store(**{name: getattr(record, name) for name in StoreRecord.__struct_fields__})


@pytree(static=("store", "shape"))
@dataclass(frozen=True, kw_only=True)
class QuantisedArray(Held):
    """Codes of few bits in the place of floats.

    Args:
        codes: of each row, packed, int32, `[row, word]`.
        store: what they stand for.
        shape: of the array, `[..., in]`; the axis before the last two counts matrices.
        scale: of each group, in the file's type, `[row, group]`; None where each row has a table.
        unit: of scales in 8 bits, bfloat16, `[matrix, block]`.
        zero: integer zeros, packed, int32, `[word, group]`, or real ones, `[row, group]`.
        table: bfloat16, `[row or matrix, code]`.

    Example:
        >>> store = Store(bits=4, group=2, zero="none")
        >>> array = QuantisedArray.pack(Rounded(jnp.array([[[9, 7, 8, 15]]]), jnp.array([[[1.0, 0.5]]])), store)
        >>> array.values().tolist(), array.count()
        ([[[1.0, -1.0, 0.0, 3.5]]], Count(numbers=3, bytes=8))
    """

    codes: Int[AnyArray | Abstract, "row word"]
    store: Store
    shape: tuple[int, ...]
    scale: Shaped[AnyArray | Abstract, "row group"] | None = None
    unit: Float[AnyArray | Abstract, "matrix block"] | None = None
    zero: Shaped[AnyArray | Abstract, "zeros group"] | None = None
    table: Float[AnyArray | Abstract, "entry code"] | None = None

    @classmethod
    def abstract(cls, shape: tuple[int, ...], store: Store) -> "QuantisedArray":
        """Return the array without values.

        Raises:
            JaxmoeError: the store's groups do not divide the rows.
        """
        shape = tuple(shape)
        matrices, out, in_ = _matrices(shape)
        groups, rows = store.groups(in_), matrices * out
        scale = unit = zero = table = None
        if store.table != "row":
            scale = Abstract((rows, groups), store.scale if store.scale in FLOATS else jnp.uint8)
            if store.scale == "quantised":
                unit = Abstract((matrices, -(-out * groups // BLOCK)), jnp.bfloat16)
            if store.zero == "integer":
                zero = Abstract((matrices * words(out, store.bits), groups), jnp.int32)
            elif store.zero == "real":
                zero = Abstract((rows, groups), _zero_dtype(store))
        if store.table in ("row", "matrix"):
            table = Abstract((rows if store.table == "row" else matrices, 2**store.bits), jnp.bfloat16)
        codes = Abstract((rows, words(in_, store.bits)), jnp.int32)
        return cls(codes=codes, store=store, shape=shape, scale=scale, unit=unit, zero=zero, table=table)

    @classmethod
    def pack(cls, rounded: Rounded, store: Store, *, shape: tuple[int, ...] | None = None) -> "QuantisedArray":
        """Pack what a rounding found; scales, zeros and tables that the file cannot hold exactly are rounded.

        Args:
            rounded: of matrices `[expert, out, in]`.
            store: what was rounded to.
            shape: of the array; that of the matrices, or of the rows of a single one, `[out, in]`.
        """
        matrices, out, in_ = rounded.codes.shape
        shape = (matrices, out, in_) if shape is None else tuple(shape)
        abstract = cls.abstract(shape, store)
        if _matrices(shape) != (matrices, out, in_):
            raise JaxmoeError(f"codes {(matrices, out, in_)} do not stand for an array {shape}")
        found: dict[str, Any] = {"codes": pack(jnp.reshape(rounded.codes, (-1, in_)), store.bits)}
        if abstract.scale is not None:
            scale = jnp.asarray(rounded.scale, jnp.float32)
            if store.scale == "quantised":
                scale, found["unit"] = _counted(scale)
            elif store.scale == "exponent":
                scale = _exponents(scale) + 127
            else:
                scale = held_scales(scale, store)
            found["scale"] = scale.reshape(abstract.scale.shape).astype(abstract.scale.dtype)
        if store.zero == "integer":
            zero = jnp.swapaxes(jnp.asarray(rounded.zero, jnp.int32), 1, 2)
            packed = pack(zero.reshape(-1, out), store.bits).reshape(matrices, zero.shape[1], -1)
            found["zero"] = jnp.swapaxes(packed, 1, 2).reshape(cast(Any, abstract.zero).shape)
        elif store.zero == "real":
            zero = held_zeros(cast(Any, rounded.zero), store)
            own = cast(Any, abstract.zero)
            found["zero"] = zero.reshape(own.shape).astype(own.dtype)
        if abstract.table is not None:
            found["table"] = jnp.asarray(rounded.table).reshape(abstract.table.shape).astype(jnp.bfloat16)
        return replace(abstract, **found)

    def unpack(self) -> Rounded:
        """Return the codes and what they stand on, in float32 and unpacked."""
        matrices, out, in_ = _matrices(self.shape)
        store, rows = self.store, (matrices, out, -1)
        scale, zero = self.scale, self.zero
        if scale is not None:
            scale = jnp.asarray(scale).reshape(rows)
            if store.scale == "exponent":
                scale = jnp.ldexp(jnp.float32(1), scale.astype(jnp.int32) - 127)
            scale = scale.astype(jnp.float32)
            if store.scale == "quantised":
                scale = scale * _spread(jnp.asarray(self.unit), scale.shape[1:])
        if store.zero == "integer":
            groups = store.groups(in_)
            packed = jnp.swapaxes(jnp.asarray(zero).reshape(matrices, -1, groups), 1, 2)
            whole = unpack(packed.reshape(matrices * groups, -1), store.bits, out)
            zero = jnp.swapaxes(whole.reshape(matrices, groups, out), 1, 2).astype(jnp.int32)
        elif store.zero == "real":
            zero = jnp.asarray(zero, jnp.float32).reshape(rows)
        codes = unpack(self.codes, store.bits, in_).reshape(matrices, out, in_)
        return Rounded(codes, scale, zero, None if self.table is None else jnp.asarray(self.table, jnp.float32))

    def values(self, experts=EVERY):
        own = self if experts == EVERY else self[experts]
        return _values(own)

    def __getitem__(self, items: slice) -> "QuantisedArray":
        """Return some matrices of an array `[matrix, out, in]`."""
        if len(self.shape) != 3:
            raise JaxmoeError(f"an array {self.shape} in few bits has no matrices to choose from")
        matrices = self.shape[0]

        def of(array):
            return array.reshape(matrices, -1, array.shape[1])[items].reshape(-1, array.shape[1])

        own = {name: of(array) for name, array in self._arrays().items()}
        return replace(self, **own, shape=(len(range(matrices)[items]), *self.shape[1:]))

    def _arrays(self) -> dict[str, Any]:
        own = ((name, getattr(self, name)) for name in ("codes", "scale", "unit", "zero", "table"))
        return {name: array for name, array in own if array is not None}

    def tensors(self, name):
        return {f"{name}_{own}": array for own, array in self._arrays().items()}

    def restored(self, tensors, name):
        found = {own: tensors[f"{name}_{own}"] for own in self._arrays()}
        for own, array in found.items():
            _check(f"{name}_{own}", array, positive=own in ("scale", "unit"), exponents=self.store.scale == "exponent")
        return replace(self, **found)

    def record(self):
        return asdict(self.store)


@pytree(static=("width", "shape"))
@dataclass(frozen=True, kw_only=True)
class MixedArray(Held):
    """Matrices `[expert, out, in]` of which blocks of columns are held in different widths.

    Block k of expert e has the number e * blocks of a row + k.

    Args:
        parts: the blocks of each width, `[block, out, width]`.
        order: the numbers of the parts' blocks, part after part, int32, `[1, block]`.
        width: columns of a block; those of the matrix where each expert has one width.
        shape: of the array.

    Example:
        >>> two, four = Store(bits=2, zero="none"), Store(bits=4, zero="none")
        >>> array = MixedArray.abstract((2, 32, 64), [(two, 1), (four, 1)], width=64)
        >>> list(array.tensors("dense")), array.count().bytes
        (['dense_0_codes', 'dense_0_scale', 'dense_1_codes', 'dense_1_scale', 'dense_order'], 1672)
    """

    parts: tuple[QuantisedArray, ...]
    order: Int[AnyArray | Abstract, "1 block"]
    width: int
    shape: tuple[int, ...]

    @classmethod
    def abstract(cls, shape: tuple[int, ...], parts: Sequence[tuple[Store, int]], *, width: int) -> "MixedArray":
        """Return the array without values.

        Args:
            shape: `(experts, out, in)`.
            parts: each store, and the number of blocks that it holds.
            width: columns of a block.

        Raises:
            JaxmoeError: the blocks do not divide the rows, or are not as many as the parts hold.
        """
        if len(shape) != 3 or shape[2] % width:
            raise JaxmoeError(f"blocks of {width} columns do not divide an array {tuple(shape)} of matrices")
        experts, out, in_ = shape
        blocks = experts * (in_ // width)
        if sum(count for _, count in parts) != blocks or any(count < 1 for _, count in parts):
            raise JaxmoeError(f"parts of {[count for _, count in parts]} blocks, and there are {blocks}")
        return cls(
            parts=tuple(QuantisedArray.abstract((count, out, width), store) for store, count in parts),
            order=Abstract((1, blocks), jnp.int32),
            width=width,
            shape=tuple(shape),
        )

    def values(self, experts=EVERY):
        count, out, in_ = self.shape
        blocks = jnp.concatenate([part.values() for part in self.parts])
        places = jnp.argsort(jnp.asarray(self.order)[0]).reshape(count, -1)[experts]
        return jnp.swapaxes(blocks[places], 1, 2).reshape(-1, out, in_)

    def tensors(self, name):
        own = {
            tensor: array
            for number, part in enumerate(self.parts)
            for tensor, array in part.tensors(f"{name}_{number}").items()
        }
        return own | {f"{name}_order": self.order}

    def restored(self, tensors, name):
        parts = tuple(part.restored(tensors, f"{name}_{number}") for number, part in enumerate(self.parts))
        check_order(tensors[f"{name}_order"], self.order.shape[1])
        return replace(self, parts=parts, order=tensors[f"{name}_order"])

    def record(self):
        parts = [part.record() | {"blocks": part.shape[0]} for part in self.parts]
        return {"width": self.width, "parts": parts}


@jax.jit
def _values(array: QuantisedArray) -> Float[Array, "..."]:
    # One program: by itself each of its many steps would write all numbers to memory.
    return array.unpack().values(array.store).reshape(array.shape)


def _check(name: str, array: Any, *, positive: bool, exponents: bool) -> None:
    """Raise unless the numbers of a tensor are such as `QuantisedArray.pack` writes; any codes are."""
    whole = np.issubdtype(array.dtype, np.integer)
    if isinstance(array, Abstract) or (whole and not positive):
        return
    numbers = np.asarray(array).astype(np.float32)
    bad = ~np.isfinite(numbers) | (positive & (numbers <= 0)) | (positive & whole & exponents & (numbers == 255))
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        what = "a positive scale" if positive else "a number"
        raise JaxmoeError(f"{name} [{row}, {column}] is {numbers[row, column]:g}, which is not {what}")


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how many matrices of which sizes an array has: `[out, in]` is one."""
    if not 2 <= len(shape) <= 3:
        raise JaxmoeError(f"an array {tuple(shape)} cannot be held in few bits: give one or several matrices")
    out, in_ = shape[-2:]
    return 1 if len(shape) == 2 else shape[0], out, in_
