"""Refinement of a rounding: codes, scales, zeros and codebooks in turn, each to its best value given all others.

    minimise, for every row,  (w - v) H (w - v)',      v = s (q - z)  or  s table[q],      H = C + damping

Error feedback chooses every code once, before it knows those behind it, on scales that were fitted to plain rounding.
Both can be made up for without a further byte: a code moves to the level nearest to v_j + ((w - v) H)_j / H_jj, and
along a scale, a zero or an entry of a codebook the error is a parabola, whose lowest point is taken, as the file will
hold it. No move is made that does not lower the error: it falls from turn to turn, and what comes out is never worse
than what went in.

A turn costs about as much as the error feedback, and with a codebook that much for each of its entries.
Source: descent on codes, one after the other: QuantEase, arXiv 2309.01885; the alternation with scales and codebooks is
ours.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales, held_zeros
from jaxmoe.factors.store import Rounded, Store, fixed_table
from jaxmoe.solvers.channels import damped
from jaxmoe.solvers.mixture import HIGHEST
from jaxmoe.solvers.rounding import Grid, blocks, fixed_grid, held, joined
from jaxmoe.solvers.second_moment import check_moment

COLUMNS = 128
"""The most columns whose codes are found together: what their errors do to all others is one matrix product."""

TURNS = 3
"""After which little is left to gain."""


def refine(
    weight: Float[AnyArray, "expert out in"],
    rounded: Rounded,
    store: Store,
    moment: Float[AnyArray, "..."],
    *,
    turns: int = TURNS,
    damping: float = 0.01,
) -> Rounded:
    """Return a rounding of the same matrices in the same bytes, of no larger weighted error.

    Args:
        weight: the matrices.
        rounded: what a rounding found for them.
        store: how they are held.
        moment: second moments of the inputs, `[1|expert, in, in]`.
        turns: through all codes and scales.
        damping: added to the diagonal of the moment, in units of its mean.

    Raises:
        JaxmoeError: a moment of another shape, or fewer than no turns.

    Example:
        >>> moment = jnp.array([[[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]]])
        >>> store = Store(bits=2, group=3, zero="none", scale="float32")
        >>> start = Rounded(jnp.array([[[2, 2, 2]]]), jnp.array([[[1.0]]]))
        >>> refine(jnp.full((1, 1, 3), 0.4), start, store, moment, turns=1).codes.tolist()
        [[[3, 2, 2]]]
    """
    experts, out, in_ = weight.shape
    if len(moment.shape) != 3:
        raise JaxmoeError(f"moment {tuple(moment.shape)}: give [1 or {experts}, {in_}, {in_}]")
    check_moment("moment", moment, experts, in_)
    if turns < 0:
        raise JaxmoeError(f"{turns} turns: give none or more")
    # Uniform codes of any width are one program.
    form = replace(store, bits=8) if store.table is None else store
    highest = 2.0**store.bits - 1
    found = []
    for own in blocks(experts, in_ * (out + in_)):
        part = jax.tree.map(partial(_of, own=own, experts=experts), rounded)
        seen = moment if len(moment) == 1 else moment[own]
        found.append(_refine(jnp.asarray(weight[own]), part, jnp.asarray(seen), form, highest, turns, damping))
    return joined(found)


def _of(array: AnyArray, *, own: slice, experts: int) -> Array:
    """Return an array's part of some experts; the tables of rows lie one under the other."""
    each = len(array) // experts
    return jnp.asarray(array[own.start * each : own.stop * each])


class _Held(NamedTuple):
    """A rounding as it is worked on: rows last, since all of them are worked on alike and there are many.

    codes `[expert, column, row]`, scale and zero `[expert, group, row]`, table `[expert, code, row]` or, for a matrix,
    `[expert, code, 1]`; highest: of the codes.
    """

    codes: Array
    scale: Array | None
    zero: Array | None
    table: Array | None
    highest: Array


@partial(jax.jit, static_argnames="store")
def _refine(weight, rounded: Rounded, moment, store: Store, highest, turns, damping) -> Rounded:
    weight = jnp.swapaxes(jnp.asarray(weight, jnp.float32), 1, 2)
    matrix = damped(jnp.asarray(moment, jnp.float32), damping)
    experts = weight.shape[0]
    scale, zero = (None if x is None else jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in rounded[1:3])
    table = None
    if rounded.table is not None:
        table = jnp.swapaxes(rounded.table.astype(jnp.float32).reshape(experts, -1, rounded.table.shape[1]), 1, 2)
    state = _Held(jnp.swapaxes(rounded.codes, 1, 2).astype(jnp.int32), scale, zero, table, highest)

    def turn(_, state: _Held) -> _Held:
        state = _move_codes(weight, state, matrix, store)
        if state.scale is not None:
            state = _move_scales(weight, state, matrix, store)
        return state if state.table is None else _move_table(weight, state, matrix, store)

    state = lax.fori_loop(0, turns, turn, state)
    codes, scale, zero, table = (None if x is None else jnp.swapaxes(x, 1, 2) for x in state[:4])
    return Rounded(
        jnp.asarray(codes).astype(rounded.codes.dtype),
        scale,
        None if rounded.zero is None else jnp.asarray(zero).astype(rounded.zero.dtype),
        None if rounded.table is None else jnp.asarray(table).reshape(rounded.table.shape),
    )


def _levels(state: _Held, store: Store) -> Array:
    """Return what the codes stand for under scales of one, `[expert, column, row]`."""
    columns = state.codes.shape[1]
    if state.table is not None:
        return jnp.take_along_axis(
            jnp.broadcast_to(state.table, (*state.table.shape[:2], state.codes.shape[2])), state.codes, axis=1
        )
    if store.table is not None:
        return jnp.asarray(fixed_table(store.table, store.bits), jnp.float32)[state.codes]
    return state.codes - ((state.highest + 1) / 2 if state.zero is None else _spread(state.zero, columns))


def _spread(groups: Array, columns: int) -> Array:
    return jnp.repeat(groups, columns // groups.shape[1], axis=1)


def _values(state: _Held, store: Store) -> Array:
    levels = _levels(state, store)
    return levels if state.scale is None else levels * _spread(state.scale, levels.shape[1])


def _move_codes(weight: Array, state: _Held, matrix: Array, store: Store) -> _Held:
    """Return the codes after each was moved, one column after the other."""
    columns = weight.shape[1]
    size = next(size for size in range(min(COLUMNS, columns), 0, -1) if columns % size == 0)
    group = 0 if state.scale is None else columns // state.scale.shape[1]

    def grid(column) -> Grid:
        scale, zero = (None if x is None else x[:, column // group] for x in (state.scale, state.zero))
        if state.table is not None:
            return Grid(scale, None, jnp.swapaxes(state.table, 0, 1))
        if store.table is not None:
            return fixed_grid(store, scale)
        return Grid(scale, (state.highest + 1) / 2 if zero is None else zero, highest=state.highest)

    def block(carry, start):
        rest, codes = carry
        rows = lax.dynamic_slice_in_dim(matrix, start, size, axis=1)
        pulled = jnp.matmul(rows, rest, precision=HIGHEST)
        within = lax.dynamic_slice_in_dim(rows, start, size, axis=2)
        own = lax.dynamic_slice_in_dim(rest, start, size, axis=1)
        wanted = lax.dynamic_slice_in_dim(weight, start, size, axis=1)

        def column(index, carry):
            own, pulled, codes = carry
            value = wanted[:, index] - own[:, index]
            code, moved = grid(start + index).nearest(value + pulled[:, index] / within[:, index, index, None], store)
            change = moved - value
            return (
                own.at[:, index].add(-change),
                pulled - within[:, :, index, None] * change[:, None],
                codes.at[:, start + index].set(code.astype(codes.dtype)),
            )

        own, _, codes = lax.fori_loop(0, size, column, (own, pulled, codes))
        return (lax.dynamic_update_slice_in_dim(rest, own, start, axis=1), codes), None

    start = weight - _values(state, store), state.codes
    (_, codes), _ = lax.scan(block, start, jnp.arange(0, columns, size))
    return state._replace(codes=codes)


def _move_scales(weight: Array, state: _Held, matrix: Array, store: Store) -> _Held:
    """Return the scales, and the real zeros, after each was moved.

    Scales that count a common unit move freely, and are then held together; an expert for which that is no better keeps
    those that it had.
    """
    moved = _move_groups(weight, state, matrix, store)
    if store.scale != "quantised":
        return moved
    assert state.scale is not None
    assert moved.scale is not None
    scale = jnp.swapaxes(held_scales(jnp.swapaxes(moved.scale, 1, 2), store), 1, 2)
    moved = moved._replace(scale=scale)
    before, after = (_errors(weight, own, matrix, store) for own in (state, moved))
    better = (after < before)[:, None, None]
    scale = jnp.where(better, scale, state.scale)
    if state.zero is None or moved.zero is None:
        return state._replace(scale=scale)
    return state._replace(scale=scale, zero=jnp.where(better, moved.zero, state.zero))


def _errors(weight: Array, state: _Held, matrix: Array, store: Store) -> Array:
    """Return the weighted error of every expert."""
    rest = weight - _values(state, store)
    return jnp.sum(rest * jnp.matmul(matrix, rest, precision=HIGHEST), (1, 2))


def _move_groups(weight: Array, state: _Held, matrix: Array, store: Store) -> _Held:
    """Return the scales and zeros after each was moved, one group after the other."""
    assert state.scale is not None
    scales = state.scale
    size = weight.shape[1] // scales.shape[1]
    levels = _levels(state, store)

    zeros = jnp.zeros_like(scales) if state.zero is None else state.zero

    def group(rest, number):
        start = number * size
        rows = lax.dynamic_slice_in_dim(matrix, start, size, axis=1)
        within = lax.dynamic_slice_in_dim(rows, start, size, axis=2)
        own, level = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (rest, levels))
        pulled = jnp.matmul(rows, rest, precision=HIGHEST)
        scale = scales[:, number]
        pull, bend = _parabola(level, pulled, within)
        moved = held(jnp.maximum(scale + _ratio(pull, bend), 0), store)
        moved = jnp.where((moved > 0) & _better(moved - scale, pull, bend), moved, scale)
        own -= (moved - scale)[:, None] * level
        zero = zeros[:, number]
        if store.zero == "real":
            # The error moves along the scale where a zero moves.
            pulled -= jnp.matmul(within, (moved - scale)[:, None] * level, precision=HIGHEST)
            line = jnp.broadcast_to(-moved[:, None], level.shape)
            pull, bend = _parabola(line, pulled, within)
            shifted = held_zeros(zero + _ratio(pull, bend), store)
            shifted = jnp.where(_better(shifted - zero, pull, bend), shifted, zero)
            own -= (shifted - zero)[:, None] * line
            zero = shifted
        return lax.dynamic_update_slice_in_dim(rest, own, start, axis=1), (moved, zero)

    start = weight - levels * _spread(scales, weight.shape[1])
    _, (scale, zero) = lax.scan(group, start, jnp.arange(scales.shape[1]))
    scale, zero = jnp.swapaxes(scale, 0, 1), jnp.swapaxes(zero, 0, 1)
    return state._replace(scale=scale, zero=None if state.zero is None else zero)


def _move_table(weight: Array, state: _Held, matrix: Array, store: Store) -> _Held:
    """Return the codebooks after each entry was moved, between its neighbours."""
    table = state.table
    assert table is not None
    columns = weight.shape[1]
    scale = jnp.ones((), jnp.float32) if state.scale is None else _spread(state.scale, columns)
    for_all = table.shape[2] == 1
    low = jnp.full_like(table[:, 0], -jnp.inf)

    def entry(carry, number):
        rest, table = carry
        line = jnp.where(state.codes == number, scale, 0.0)
        bent = jnp.matmul(matrix, line, precision=HIGHEST)
        pull, bend = jnp.sum(bent * rest, 1), jnp.sum(bent * line, 1)
        if for_all:
            pull, bend = jnp.sum(pull, 1, keepdims=True), jnp.sum(bend, 1, keepdims=True)
        old = table[:, number]
        # The codebook stays in order, as whoever looks for the nearest entry takes it to be.
        edges = jnp.concatenate([low[:, None], table, -low[:, None]], 1)
        new = jnp.clip(old + _ratio(pull, bend), edges[:, number], edges[:, number + 2])
        new = new.astype(jnp.bfloat16).astype(jnp.float32)
        new = jnp.where(_better(new - old, pull, bend), new, old)
        return (rest - line * (new - old)[:, None], table.at[:, number].set(new)), None

    start = weight - _values(state, store), table
    (_, table), _ = lax.scan(entry, start, jnp.arange(table.shape[1]))
    return state._replace(table=table)


def _parabola(line: Array, pulled: Array, within: Array) -> tuple[Array, Array]:
    """Return p and b of the error -2 p t + b t^2 of a move by t along a line, for every row."""
    bent = jnp.matmul(within, line, precision=HIGHEST)
    return jnp.sum(line * pulled, 1), jnp.sum(line * bent, 1)


def _ratio(pull: Array, bend: Array) -> Array:
    return jnp.where(bend > 0, pull / jnp.where(bend > 0, bend, 1.0), 0.0)


def _better(move: Array, pull: Array, bend: Array) -> Array:
    return move * (bend * move - 2 * pull) < 0
