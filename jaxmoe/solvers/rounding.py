"""Rounding to few bits, number by number: scales of groups, and codes on them.

    q = clip(round(w / s + z), 0, 2^b - 1)        w ~ s (q - z)        or, on a codebook t,   w ~ s t[q], t[q] nearest

A scale spans the group's numbers, or less: clipping the largest of them makes all others finer. The search tries 26
shares of the span and keeps, for each group, that of least squared error, weighted by what the inputs are worth if that
is known. Scales are rounded to what the file holds before the codes are found, so that the error is that of the file.

Matrices go through in blocks of experts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales, held_zeros
from jaxmoe.factors.store import Rounded, Store, fixed_table

SHARES = tuple(np.linspace(1.0, 0.5, 26).tolist())
"""Shares of a group's span that the search tries for its scale."""

BLOCK = 2**23
"""Numbers that are worked on at once: whole experts, at least one."""


class Grid(NamedTuple):
    """The numbers that codes stand for, where numbers to be rounded lie `[expert, ..., column, row]`.

    Args:
        scale: broadcast against them; None where a table stands for itself.
        zero: likewise; None for the middle code, or none.
        table: `[code, ...]`, ascending, each broadcast against them; None for uniform codes.
        highest: of the codes, broadcast like the scale; None for all of their bits.
    """

    scale: Array | None
    zero: Array | None = None
    table: Array | None = None
    highest: Array | None = None

    def nearest(self, x: Array, store: Store) -> tuple[Array, Array]:
        """Return the codes nearest to numbers, uint8, and what these stand for."""
        if self.table is None:
            assert self.scale is not None
            zero = 2.0 ** (store.bits - 1) if self.zero is None else self.zero
            highest = 2**store.bits - 1 if self.highest is None else self.highest
            codes = jnp.clip(jnp.round(x / self.scale + zero), 0, highest)
            return codes.astype(jnp.uint8), self.scale * (codes - zero)
        level = x if self.scale is None else x / self.scale
        names = range(len(self.table)) if store.table in ("row", "matrix") else _ascending(store)
        value, code = jnp.broadcast_to(self.table[0], x.shape), jnp.full(x.shape, names[0], jnp.uint8)
        for below, above, name in zip(self.table[:-1], self.table[1:], names[1:]):
            further = level > (below + above) / 2
            value, code = jnp.where(further, above, value), jnp.where(further, np.uint8(name), code)
        return code, value if self.scale is None else value * self.scale


def fixed_grid(store: Store, scale: Array | None, zero: Array | None = None) -> Grid:
    """Return the grid of uniform codes or of a codebook that is not learned, under scales."""
    if store.table is None:
        return Grid(scale, zero)
    levels = np.array(fixed_table(store.table, store.bits), np.float32)
    return Grid(scale, None, jnp.asarray(levels[list(_ascending(store))]))


def _ascending(store: Store) -> tuple[int, ...]:
    """Return the codes of a codebook that is not learned in ascending order of what they stand for.

    The zero below zero of floats stands for nothing of its own.
    """
    assert store.table is not None
    levels = fixed_table(store.table, store.bits)
    codes = sorted(range(len(levels)), key=levels.__getitem__)
    return tuple(code for code in codes if store.table != "mxfp4" or code != 8)


def held(scale: Array, store: Store) -> Array:
    """Return scales as the store's kind holds each; those of 8 bits, which depend on each other, as they are.

    Example:
        >>> held(jnp.array([0.7, 0.5]), Store(bits=4, scale="exponent")).tolist()
        [1.0, 0.5]
    """
    if store.scale == "quantised":
        return scale
    return held_scales(scale.reshape(1, 1, -1), store).reshape(scale.shape)


def fit_scale(
    numbers: Float[AnyArray, "..."], store: Store, *, share: float | Array = 1.0, axis: int = -1
) -> tuple[Array, Array | None]:
    """Return the scale of every group and its zero, None where the store has none.

    Symmetric scales are max |w| over half of the number of steps, so that the lowest code is used (the convention of
    compressed-tensors), or over the largest entry of a codebook; with zeros, the span over the number of steps, which
    integer zeros stretch to hold 0. A group of equal numbers is exact wherever its scale can hold their size.

    Args:
        numbers: those of a group along one axis.
        store: how they are held; its group does not matter.
        share: of the span that the codes cover.
        axis: of the groups' numbers.

    Returns:
        Both without that axis, in float32, as the file will hold them.

    Example:
        >>> scale, zero = fit_scale(jnp.array([0.7, -1.0, 0.3, 0.05]), Store(bits=4, scale="float32"))
        >>> float(scale), int(zero)
        (0.11333333..., 9)
    """
    x = jnp.asarray(numbers, jnp.float32)
    return span_scales(jnp.min(x, axis), jnp.max(x, axis), store, share)


def span_scales(
    low: Array, high: Array, store: Store, share: float | Array, hold: Callable[[Array, Store], Array] = held
) -> tuple[Array, Array | None]:
    """Return scales and zeros as `fit_scale` does, of groups between two numbers; `hold` is what holds them."""
    steps = 2**store.bits - 1
    if store.zero == "none":
        levels = steps / 2 if store.table is None else max(map(abs, fixed_table(store.table, store.bits)))
        span, bottom = share * jnp.maximum(-low, high), None
        scale = span / levels
    elif store.zero == "integer":
        bottom = share * jnp.minimum(low, 0)
        scale = (share * jnp.maximum(high, 0) - bottom) / steps
    else:
        middle, half = (low + high) / 2, share * (high - low) / 2
        bottom, scale = middle - half, 2 * half / steps
    # A group of one number over and over is one step from zero.
    scale = jnp.where(low == high, jnp.abs(low), scale)
    scale = hold(jnp.where(scale > 0, scale, 1.0), store)
    if bottom is None:
        return scale, None
    zero = -bottom / scale
    return scale, held_zeros(zero, store) if store.zero == "real" else jnp.clip(jnp.round(zero), 0, steps)


def round_nearest(
    weight: Float[AnyArray, "expert out in"],
    store: Store,
    *,
    search: bool = False,
    importance: Float[AnyArray, "..."] | None = None,
) -> Rounded:
    """Round every number to the nearest code of its group.

    Args:
        weight: the matrices; in blocks of experts, never all of them in float32.
        store: how they are held; no learned codebook.
        search: keep, for each group, the share of its span in `SHARES` of least weighted squared error.
        importance: of an input, `[1|expert, in]`, such as the diagonal of the second moment, or of every number,
            `[expert, out, in]`; not negative. None: all alike. Only the search looks at it.

    Returns:
        Codes in uint8, scales and zeros in float32 as the file holds them.

    Raises:
        JaxmoeError: NaN or infinite weights, groups that do not divide the rows, another shape, or a learned codebook.

    Example:
        >>> store = Store(bits=2, group=4, scale="float32")
        >>> found = round_nearest(jnp.array([[[0.2, 0.5, 0.9, 0.4]]]), store)
        >>> found.codes.tolist(), [round(x, 4) for x in found.values(store).ravel().tolist()]
        ([[[1, 2, 3, 1]]], [0.3, 0.6, 0.9, 0.3])
    """
    check(weight, store)
    experts, out, in_ = weight.shape
    check_importance(importance, (experts, out, in_))
    found = []
    for own in blocks(experts, out * in_):
        matters = importance if importance is None or len(importance) == 1 else importance[own]
        found.append(_round(jnp.asarray(weight[own], jnp.float32), _float(matters), store, search))
    return joined(found)


def blocks(experts: int, numbers: int) -> Iterator[slice]:
    """Yield slices of experts of so many numbers each that fill a block.

    Example:
        >>> [(own.start, own.stop) for own in blocks(5, 2**22)]
        [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, BLOCK // numbers)
    return (slice(start, min(start + size, experts)) for start in range(0, experts, size))


def joined(found: list[Rounded]) -> Rounded:
    """Return what was found of one block of experts after the other as one."""
    if len(found) == 1:
        return found[0]
    parts: list[Any] = [None if own[0] is None else jnp.concatenate(own) for own in zip(*found)]
    return Rounded(*parts)


def check(weight: AnyArray, store: Store, *, learned: bool = False) -> None:
    """Raise unless matrices can be rounded so; traced ones are not looked into.

    Args:
        weight: the matrices.
        store: how they will be held.
        learned: whether a learned codebook is given beside.
    """
    if len(weight.shape) != 3:
        raise JaxmoeError(f"matrices {tuple(weight.shape)}: give [expert, out, in]")
    store.groups(weight.shape[2])
    if store.table in ("row", "matrix") and not learned:
        raise JaxmoeError(f"a table for each {store.table} has to be learned first: give it")
    if isinstance(weight, Tracer):
        return
    for own in blocks(weight.shape[0], weight.shape[1] * weight.shape[2]):
        if not bool(_finite(weight[own])):
            raise JaxmoeError(
                "NaN or infinite weights cannot be rounded: the checkpoint, or what fitted them, is damaged"
            )


def check_importance(importance: AnyArray | None, shape: tuple[int, int, int]) -> None:
    """Raise unless the importance of numbers is None, that of inputs, or that of every number of matrices."""
    experts, out, in_ = shape
    if importance is not None and tuple(importance.shape) not in ((1, in_), (experts, in_), (experts, out, in_)):
        raise JaxmoeError(
            f"importance {tuple(importance.shape)}: give [1 or {experts}, {in_}] or [{experts}, {out}, {in_}]"
        )


@jax.jit
def _finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


def _float(array: AnyArray | None) -> Array | None:
    return None if array is None else jnp.asarray(array, jnp.float32)


@partial(jax.jit, static_argnames=("store", "search"))
def _round(weight: Array, importance: Array | None, store: Store, search: bool) -> Rounded:
    scale, zero = fitted(weight, importance, store, search)
    experts, out, groups = scale.shape
    x = weight.reshape(experts, out, groups, -1)
    codes, _ = fixed_grid(store, scale[..., None], None if zero is None else zero[..., None]).nearest(x, store)
    return Rounded(codes.reshape(weight.shape), scale, whole(zero, store))


def whole(zero: Array | None, store: Store) -> Array | None:
    """Return zeros as `Rounded` has them: int32 where they are codes."""
    return zero.astype(jnp.int32) if zero is not None and store.zero == "integer" else zero


def fitted(weight: Array, importance: Array | None, store: Store, search: bool) -> tuple[Array, Array | None]:
    """Return the scales and zeros of matrices, `[expert, out, group]`, as `round_nearest` finds them."""
    experts, out, in_ = weight.shape
    groups = store.groups(in_)
    x = weight.reshape(experts, out, groups, -1)
    low, high = jnp.min(x, 3), jnp.max(x, 3)
    if not search:
        return span_scales(low, high, store, 1.0, held_scales)
    if importance is None:
        importance = jnp.ones((1, in_))
    if importance.ndim == 2:
        importance = jnp.broadcast_to(importance, (experts, in_))[:, None]
    matters = importance.reshape(experts, -1, groups, x.shape[3])

    def of_expert(own):
        x, low, high, matters = own
        if len(matters) == 1:
            return lax.map(
                lambda row: best_share(row[0], row[1], row[2], matters[0], store), (x, low, high), batch_size=ROWS
            )
        return lax.map(
            lambda row: best_share(row[0], row[1], row[2], row[3], store), (x, low, high, matters), batch_size=ROWS
        )

    return span_scales(low, high, store, lax.map(of_expert, (x, low, high, matters)), held_scales)


ROWS = 16
"""Rows that the search works on at once, which a processor's cache holds."""


def best_share(x: Array, low: Array, high: Array, importance: Array, store: Store) -> Array:
    """Return the share in `SHARES` of least weighted squared error for groups `[..., group, number]`."""

    def tried(index, best):
        least, kept = best
        share = jnp.asarray(SHARES, jnp.float32)[index]
        scale, zero = span_scales(low, high, store, share)
        grid = fixed_grid(store, scale[..., None], None if zero is None else zero[..., None])
        squares = (grid.nearest(x, store)[1] - x) ** 2 * importance
        # A product with ones: XLA's sum along the last axis takes one number after the other.
        error = jnp.matmul(squares, ones, precision=lax.Precision.HIGHEST)
        return jnp.minimum(error, least), jnp.where(error < least, share, kept)

    ones = jnp.ones(x.shape[-1])
    start = jnp.full_like(low, jnp.inf), jnp.ones_like(low)
    return lax.fori_loop(0, len(SHARES), tried, start)[1]
