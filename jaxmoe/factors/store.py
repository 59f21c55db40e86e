"""How the numbers of an array are held in few bits, and the codes, scales and tables that a rounding finds.

    W = s (q - z)        or        W = s table[q]        q: codes of b bits;  s, z: one for each group of a row

Every solver that rounds returns a `Rounded`; `QuantizedArray` packs it as it lies in files.
"""

from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError

Zero = Literal["none", "integer", "real"]
"""Zeros of the codes: the middle one, a code of each group, or a real number of each group."""

Table = Literal["row", "matrix", "normal_float", "mxfp4"]
"""Codebooks: learned for each row (which then has no scales), or for each matrix; or fixed, under scales of groups."""

Scale = Literal["bfloat16", "float16", "float32", "quantised", "exponent"]
"""What holds the scales: a float, 8 bits under a scale of their own, or a power of two in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """How the numbers of an array are held.

    Args:
        bits: of a code, 1 to 8.
        group: numbers along the last axis that share a scale; 0 for the whole row.
        zero: of uniform codes.
        table: the codebook, None for uniform codes.
        scale: what holds the scales.

    Raises:
        JaxmoeError: one of them is unknown, or they do not go together.

    Example:
        >>> Store(bits=4).groups(128), Store(bits=3, table="row", group=0, zero="none").groups(128)
        (2, 0)
    """

    bits: int
    group: int = 64
    zero: Zero = "integer"
    table: Table | None = None
    scale: Scale = "bfloat16"

    def __post_init__(self):
        if self.bits not in range(1, 9):
            raise JaxmoeError(f"{self.bits} bits: give 1 to 8")
        if self.group < 0:
            raise JaxmoeError(f"groups of {self.group}: give the numbers of a group, or 0 for whole rows")
        for name, value, known in (
            ("zero", self.zero, get_args(Zero)),
            ("table", self.table, (None, *get_args(Table))),
            ("scale", self.scale, get_args(Scale)),
        ):
            if value not in known:
                raise JaxmoeError(f"{name} {value!r}: give {', '.join(map(str, known))}")
        if self.table is not None and self.zero != "none":
            raise JaxmoeError(f"table {self.table!r} has no zeros: give zero 'none'")
        if self.table == "row" and self.group:
            raise JaxmoeError("a table for each row has no scales of groups: give group 0")
        if self.table == "mxfp4" and self.bits != 4:
            raise JaxmoeError(f"mxfp4 has 4 bits, not {self.bits}")

    def groups(self, row: int) -> int:
        """Return how many scales a row of so many numbers has.

        Raises:
            JaxmoeError: the groups do not divide the row.
        """
        if self.table == "row":
            return 0
        if not self.group:
            return 1
        if row % self.group:
            raise JaxmoeError(f"groups of {self.group} do not divide rows of {row}; see `Store.fitted`")
        return row // self.group

    def fitted(self, row: int) -> "Store":
        """Return the store with the largest of the usual groups that divides a row, or with whole rows where none does.

        Example:
            >>> Store(bits=4, group=128).fitted(96).group, Store(bits=4).fitted(50).group
            (32, 0)
        """
        if not self.group or row % self.group == 0:
            return self
        own = next((g for g in (128, 64, 32, 16) if g <= self.group and row % g == 0), 0)
        return replace(self, group=own)


class Rounded(NamedTuple):
    """What a rounding finds for matrices `[expert, out, in]`: everything that `Store` says is held, not yet packed.

    Args:
        codes: of every number, 0 to 2^bits - 1.
        scale: of the groups, a number that the store's scales can hold exactly; None where a table stands for each row.
        zero: of the groups; None where the store has none.
        table: `[expert * out, 2^bits]` for rows, `[expert, 2^bits]` for matrices; None for uniform and fixed codes.
    """

    codes: Integer[AnyArray, "expert out in"]
    scale: Float[AnyArray, "expert out group"] | None = None
    zero: Float[AnyArray, "expert out group"] | Integer[AnyArray, "expert out group"] | None = None
    table: Float[AnyArray, "entry code"] | None = None

    def values(self, store: Store) -> Float[Array, "expert out in"]:
        """Return the numbers that the codes stand for, in float32.

        Example:
            >>> codes, scale = jnp.array([[[0, 3, 2, 1]]]), jnp.array([[[0.5]]])
            >>> Rounded(codes, scale).values(Store(bits=2, group=4, zero="none")).tolist()
            [[[-1.0, 0.5, 0.0, -0.5]]]
        """
        experts, out, in_ = self.codes.shape
        codes = jnp.asarray(self.codes, jnp.int32)
        if store.table == "row":
            assert self.table is not None
            table = jnp.asarray(self.table, jnp.float32).reshape(experts, out, -1)
            return jnp.take_along_axis(table, codes, axis=2)
        assert self.scale is not None
        size = in_ // self.scale.shape[2]
        if store.table == "matrix":
            assert self.table is not None
            own = jnp.take_along_axis(jnp.asarray(self.table, jnp.float32), codes.reshape(experts, -1), axis=1)
            levels = own.reshape(codes.shape)
        elif store.table is not None:
            levels = jnp.asarray(fixed_table(store.table, store.bits))[codes]
        elif self.zero is None:
            levels = jnp.asarray(codes - 2 ** (store.bits - 1), jnp.float32)
        else:
            levels = codes - jnp.repeat(jnp.asarray(self.zero, jnp.float32), size, axis=2)
        return levels * jnp.repeat(jnp.asarray(self.scale, jnp.float32), size, axis=2)


MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the numbers of OCP's E2M1, by the three lower bits of a code; the highest is the sign."""


@cache
def fixed_table(table: Table, bits: int) -> tuple[float, ...]:
    """Return the values of a codebook that is not stored, by code.

    NormalFloat (QLoRA, arXiv 2305.14314) has the quantiles of a normal distribution, zero among them, between -1 and 1.

    Example:
        >>> fixed_table("mxfp4", 4)[:3], [round(x, 3) for x in fixed_table("normal_float", 2)]
        ((0.0, 0.5, 1.0), [-1.0, 0.0, 0.436, 1.0])
    """
    if table == "mxfp4":
        return (*MXFP4, *(-x for x in MXFP4))
    half = 2 ** (bits - 1)
    edge = (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2
    # One more level above zero than below it.
    above = [NormalDist().inv_cdf(1 - edge - (0.5 - edge) * i / half) for i in range(half)]
    below = [NormalDist().inv_cdf(1 - edge - (0.5 - edge) * i / (half - 1)) for i in range(half - 1)]
    return tuple(x / above[0] for x in (*(-x for x in below), 0.0, *reversed(above)))
