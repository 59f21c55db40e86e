"""Rounding with error feedback (GPTQ): one column after the other, each column's error taken up by those that follow.

    minimise  tr (W - Ŵ) H (W - Ŵ)ᵀ,      H = C + damping mean(diag C) I,      C the second moment of the inputs

With H = R Rᵀ and R upper triangular, column k of (W - Ŵ) R is R_kk (x_k - ŵ_k), where

    x_k = w_k + sum_(i<k) (w_i - ŵ_i) R_ik / R_kk

is the column with all that earlier errors tell about it, and ŵ_k is x_k rounded: no later choice changes that summand
of the objective. R is the Cholesky factor of H with rows and columns reversed. GPTQ is usually written with the factor
of H^-1; this is the same sequence of columns (QuIP, arXiv 2307.13304) without an inverse, which would cost more than
the factor and lose more digits.

Errors go back within small blocks of columns at once, and from one half of the columns to the other in one product.
All rows, and all experts of a block, go through together: `[expert, column, row]`. Cost: a Cholesky factor of each
moment and out * in^2 multiplications a matrix, half of them for the comparison with plain rounding.
Source: Frantar et al. 2022, arXiv 2210.17323.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.decompositions import cholesky, solve_lower
from jaxmoe.solvers.rounding import Grid, blocks, check, fitted, fixed_grid, joined, whole
from jaxmoe.solvers.second_moment import check_moment

GROUPED = ("scale", "zero", "highest")
"""What a grid has for each group."""

COLUMNS = 32
"""Columns of a block in which errors go back at once."""


class Factored(NamedTuple):
    """A moment, ready for error feedback.

    Args:
        order: in which the columns are rounded, `[1|expert, in]`.
        unit: R with its columns divided by its diagonal, rows and columns in that order, `[1|expert, in, in]`.
        diagonal: of R.
        added: what was added to the diagonal of C, in that order.
        weights: the diagonal of H, in the order of the matrices.
    """

    order: Array
    unit: Array
    diagonal: Array
    added: Array
    weights: Array


def factored(
    moment: Float[AnyArray, "expert in in"], *, damping: float | Array = 0.01, order: bool = False
) -> Factored:
    """Return the damped moment's upper factor, H = R Rᵀ, with the columns in the order in which they are rounded.

    Args:
        moment: C, symmetric, positive semi-definite.
        damping: added to the diagonal, in units of its mean; where an input was always zero, 1 more.
        order: begin with the columns of largest diagonal, whose errors cost most; ties as they stand.

    Example:
        >>> factor = factored(jnp.array([[[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]]]), damping=0)
        >>> (1 / factor.diagonal).round(4).tolist()
        [[2.309..., 1.25, 1.0]]
    """
    moment = jnp.asarray(moment, jnp.float32)
    weights = jnp.diagonal(moment, axis1=1, axis2=2)
    added = jnp.where(weights == 0, 1.0, 0.0) + damping * jnp.mean(weights, 1, keepdims=True)
    weights = weights + added
    columns = jnp.broadcast_to(jnp.arange(weights.shape[1]), weights.shape)
    if order:
        columns = jnp.argsort(-weights, axis=1, stable=True)
        moment = jnp.take_along_axis(moment, columns[:, :, None], 1)
        moment = jnp.take_along_axis(moment, columns[:, None, :], 2)
        added = jnp.take_along_axis(added, columns, 1)
    damped = moment + added[:, :, None] * jnp.eye(moment.shape[1])
    root = cholesky(damped[:, ::-1, ::-1], symmetrize_input=False)[:, ::-1, ::-1]
    diagonal = jnp.diagonal(root, axis1=1, axis2=2)
    return Factored(columns, root / diagonal[:, None], diagonal, added, weights)


def error_feedback(
    weight: Float[AnyArray, "expert out in"],
    store: Store,
    *,
    moment: Float[AnyArray, "..."] | None,
    damping: float = 0.01,
    order: bool = False,
    search: bool = True,
    given: Rounded | None = None,
    highest: Int[AnyArray, "expert group"] | None = None,
) -> Rounded:
    """Round matrices so that the outputs change least; never worse than plain rounding, in any row.

    Rows do not depend on each other, and greedy rounding can lose to plain rounding in one of them: each row keeps the
    better of the two, by tr (W - Ŵ) C (W - Ŵ)ᵀ. The plain rounding is `round_nearest`'s on the same kind of scales,
    with the diagonal of C for the search.

    Args:
        weight: the matrices; in blocks of experts, never all of them in float32.
        store: how they are held.
        moment: C, symmetric, positive semi-definite; a leading 1 means one for all experts.
        damping: added to its diagonal, in units of the mean of it; positive where C may be singular.
        order: round the columns of largest diagonal first. Scales are those of the original groups then, found before
            any column is rounded ("static groups"): nothing of the order has to be stored. Without, the scales of a
            group are found when its turn comes, from columns that have taken up errors.
        search: of each group's scale, see `round_nearest`.
        given: scales, zeros and table to round on, in either order; its codes do not matter. A learned codebook is
            given this way; its entries ascend.
        highest: code of each group, where those of the given scales do not have all bits.

    Returns:
        Codes in uint8, in the original order of the columns, and scales, zeros and table as the file holds them.

    Raises:
        JaxmoeError: NaN or infinite weights, shapes that do not match, a learned codebook that is not given, or a
            moment that is not positive definite with its damping.

    Example:
        >>> moment = jnp.array([[[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]]])
        >>> store = Store(bits=2, group=0, zero="none")
        >>> found = error_feedback(
        ...     jnp.full((1, 1, 3), 0.4), store, moment=moment, damping=0,
        ...     given=Rounded(jnp.zeros((1, 1, 3), jnp.uint8), jnp.ones((1, 1, 1))))
        >>> found.values(store).tolist()
        [[[0.0, 1.0, 0.0]]]
    """
    check(weight, store, learned=given is not None and given.table is not None)
    experts, out, in_ = weight.shape
    if moment is None:
        raise JaxmoeError("error feedback needs the second moment of the inputs: give moment")
    check_moment("moment", moment, experts, in_)
    if given is not None and tuple(given.codes.shape) != (experts, out, in_):
        raise JaxmoeError(f"scales of matrices {tuple(given.codes.shape)} are given for {(experts, out, in_)}")
    shared = _factored(moment, damping, order) if len(moment) == 1 else None
    found = []
    for own in blocks(experts, in_ * (out if shared else max(out, in_))):
        factor = shared or _factored(moment[own], damping, order)
        start = None if given is None else _of_experts(given, own, experts)
        most = None if highest is None else jnp.asarray(highest[own], jnp.float32)
        found.append(_fed_back(jnp.asarray(weight[own], jnp.float32), store, factor, order, search, start, most))
    return joined(found)


def _factored(moment: AnyArray, damping: float, order: bool) -> Factored:
    factor = _jit_factored(moment, damping=damping, order=order)
    if not isinstance(factor.diagonal, Tracer) and not bool(jnp.isfinite(factor.diagonal).all()):
        raise JaxmoeError(
            "a second moment is not positive definite (NaN, or singular with too little damping): calibrate again, or"
            " raise the damping"
        )
    return factor


_jit_factored = jax.jit(factored, static_argnames="order")


def _of_experts(given: Rounded, own: slice, experts: int) -> Rounded:
    codes, scale, zero, table = given
    if table is not None:
        table = table.reshape(experts, -1, table.shape[-1])[own].reshape(-1, table.shape[-1])
    return Rounded(codes[own], None if scale is None else scale[own], None if zero is None else zero[own], table)


class Sweep(NamedTuple):
    """Columns on their way: `[expert, column, row]`, in the order in which they are rounded.

    Args:
        current: with what those before them left.
        codes: of those that are done.
        left: what their rounding leaves.
        loss: their part of the objective, `[expert, row]`.
    """

    current: Array
    codes: Array
    left: Array
    loss: Array


def _fed_back(
    weight: Array,
    store: Store,
    factor: Factored,
    order: bool,
    search: bool,
    given: Rounded | None,
    highest: Array | None,
) -> Rounded:
    """Round one block of experts."""
    experts, _, columns = weight.shape
    groups = max(1, store.groups(columns))
    size = columns // groups
    original, plain, sweep = _begun(weight, factor, given, highest, store, order, search)
    grid = plain

    def of_group(sweep: Sweep, start: int, columns: int) -> Sweep:
        nonlocal grid
        grid = _scaled_again(original, sweep.current, grid, factor, start, store, search, columns)
        return _swept(sweep, factor, start, columns, COLUMNS, of_block)

    def of_block(sweep: Sweep, start: int, columns: int) -> Sweep:
        return _rounded(sweep, original, grid, factor, start, store, size, columns)

    # Scales of scales exist once all of them are known.
    if order or groups == 1 or given is not None or store.scale == "quantised":
        sweep = _swept(sweep, factor, 0, columns, COLUMNS, of_block)
    else:
        sweep = _swept(sweep, factor, 0, columns, size, of_group)
    codes, scale, zero = _better(sweep, original, grid, plain, factor, store, size, experts)
    return Rounded(codes, scale, whole(zero, store), None if given is None else given.table)


@partial(jax.jit, static_argnames=("store", "order", "search"))
def _begun(
    weight: Array,
    factor: Factored,
    given: Rounded | None,
    highest: Array | None,
    store: Store,
    order: bool,
    search: bool,
) -> tuple[Array, Grid, Sweep]:
    """Return the columns, the grid of plain rounding, and the sweep before any of them is rounded."""
    experts, rows = weight.shape[:2]
    grid = _scaled(weight, factor.weights, store, search) if given is None else _columnwise(given, store, experts)
    if highest is not None:
        grid = grid._replace(highest=jnp.broadcast_to(highest[:, :, None], (*highest.shape, rows)))
    columns = jnp.swapaxes(weight, 1, 2)
    if len(factor.order) < experts:
        # One moment for all experts: their rows are rows of one matrix.
        columns = _together(columns)
        own = {name: getattr(grid, name) for name in (*GROUPED, "table") if getattr(grid, name) is not None}
        grid = grid._replace(**{name: _together(x) for name, x in own.items() if x.ndim > 1})
    if order:
        columns = jnp.take_along_axis(columns, factor.order[:, :, None], 1)
    loss = jnp.zeros((len(columns), columns.shape[2]))
    return columns, grid, Sweep(columns + 0, jnp.zeros(columns.shape, jnp.uint8), jnp.zeros_like(columns), loss)


def _swept(
    sweep: Sweep, factor: Factored, start: int, columns: int, smallest: int, leaf: Callable[[Sweep, int, int], Sweep]
) -> Sweep:
    """Sweep over one half of some columns, let the other take up its errors in one product, and sweep over that."""
    if columns <= smallest:
        return leaf(sweep, start, columns)
    half = smallest * -(-columns // (2 * smallest))
    sweep = _swept(sweep, factor, start, half, smallest, leaf)
    sweep = _taken_up(sweep, factor.unit, start, half, columns - half)
    return _swept(sweep, factor, start + half, columns - half, smallest, leaf)


@partial(jax.jit, static_argnames=("done", "todo"), donate_argnums=0)
def _taken_up(sweep: Sweep, unit: Array, start: int | Array, done: int, todo: int) -> Sweep:
    """Add to columns what as many before them left, from place `start` on."""
    own = lax.dynamic_slice(unit, (0, start, start + done), (len(unit), done, todo))
    left = lax.dynamic_slice_in_dim(sweep.left, start, done, 1)
    taken = jnp.einsum("eij,eim->ejm", own, left, precision=lax.Precision.HIGHEST)
    before = lax.dynamic_slice_in_dim(sweep.current, start + done, todo, 1)
    return sweep._replace(current=lax.dynamic_update_slice_in_dim(sweep.current, before + taken, start + done, 1))


@partial(jax.jit, static_argnames=("store", "search", "columns"))
def _scaled_again(
    original: Array,
    current: Array,
    grid: Grid,
    factor: Factored,
    start: int | Array,
    store: Store,
    search: bool,
    columns: int,
) -> Grid:
    """Return the grid with new scales for a group, from what its columns are by now.

    `current` foresees the errors of those before a column in its group: x_k counts on all columns before k. The scales
    are those of what the columns would best be, were none of the group rounded.
    """
    original, current = (lax.dynamic_slice_in_dim(x, start, columns, 1) for x in (original, current))
    unit = lax.dynamic_slice(factor.unit, (0, start, start), (len(factor.unit), columns, columns))
    best = original + solve_lower(jnp.swapaxes(unit, 1, 2), current - original)
    weights = lax.dynamic_slice_in_dim(factor.weights, start, columns, 1)
    found = _scaled(jnp.swapaxes(best, 1, 2), weights, replace(store, group=0), search)
    names = [name for name in ("scale", "zero") if getattr(grid, name) is not None]
    place = start // columns
    put = {name: lax.dynamic_update_slice_in_dim(getattr(grid, name), getattr(found, name), place, 1) for name in names}
    return grid._replace(**put)


@partial(jax.jit, static_argnames=("store", "size", "columns"), donate_argnums=0)
def _rounded(
    sweep: Sweep,
    original: Array,
    grid: Grid,
    factor: Factored,
    start: int | Array,
    store: Store,
    size: int,
    columns: int,
) -> Sweep:
    """Round the columns of a block one after the other."""
    original, current = (lax.dynamic_slice_in_dim(x, start, columns, 1) for x in (original, sweep.current))
    unit = lax.dynamic_slice(factor.unit, (0, start, start), (len(factor.unit), columns, columns))
    diagonal = lax.dynamic_slice_in_dim(factor.diagonal, start, columns, 1)
    of_columns = _expanded(grid, lax.dynamic_slice_in_dim(factor.order, start, columns, 1) // size)

    def column(index, state):
        current, codes, left, loss = state

        def at(x):
            return lax.dynamic_slice_in_dim(x, index, 1, 1)

        own = {name: at(getattr(of_columns, name)) for name in GROUPED if getattr(of_columns, name) is not None}
        x = at(current)
        code, value = of_columns._replace(**own).nearest(x, store)
        rest = at(original) - value
        # The factor is zero before the column, and what it does to the column itself is of no account any more.
        current = current + jnp.swapaxes(at(unit), 1, 2) * rest
        codes = lax.dynamic_update_slice_in_dim(codes, code, index, 1)
        left = lax.dynamic_update_slice_in_dim(left, rest, index, 1)
        return current, codes, left, loss + (at(diagonal) * (x - value)[:, 0]) ** 2

    empty = jnp.zeros(original.shape, jnp.uint8), jnp.zeros_like(original)
    _, codes, left, loss = lax.fori_loop(0, columns, column, (current, *empty, sweep.loss))
    codes = lax.dynamic_update_slice_in_dim(sweep.codes, codes, start, 1)
    left = lax.dynamic_update_slice_in_dim(sweep.left, left, start, 1)
    return sweep._replace(codes=codes, left=left, loss=loss)


def _expanded(grid: Grid, groups: Array) -> Grid:
    """Return a grid with the scales and zeros of columns, given the groups `[expert, column]` that they belong to."""

    found = {name: getattr(grid, name) for name in GROUPED if getattr(grid, name) is not None}
    return grid._replace(**{name: jnp.take_along_axis(x, groups[:, :, None], 1) for name, x in found.items()})


@partial(jax.jit, static_argnames=("store", "size", "experts"))
def _better(
    sweep: Sweep, original: Array, grid: Grid, plain: Grid, factor: Factored, store: Store, size: int, experts: int
):
    """Return the better of both roundings for every row, `[expert, out, ...]`, the columns where they were."""
    columns = original.shape[1]
    codes, values = _expanded(plain, factor.order // size).nearest(original, store)
    left, loss = original - values, jnp.zeros_like(sweep.loss)
    for start in range(0, columns, width := max(COLUMNS, -(-columns // 8))):
        stop = min(start + width, columns)
        own = factor.unit[:, :stop, start:stop] * factor.diagonal[:, None, start:stop]
        loss += jnp.sum(jnp.einsum("eij,eim->ejm", own, left[:, :stop], precision=lax.Precision.HIGHEST) ** 2, 1)

    def without_damping(loss, left):
        return loss - jnp.sum(factor.added[:, :, None] * left**2, 1)

    fed = (without_damping(sweep.loss, sweep.left) <= without_damping(loss, left))[:, None]
    back = jnp.argsort(factor.order, axis=1)[:, :, None]
    found = (
        jnp.take_along_axis(jnp.where(fed, sweep.codes, codes), back, 1),
        None if grid.scale is None or plain.scale is None else jnp.where(fed, grid.scale, plain.scale),
        None if grid.zero is None or plain.zero is None else jnp.where(fed, grid.zero, plain.zero),
    )
    return tuple(None if x is None else jnp.swapaxes(_apart(x, experts), 1, 2) for x in found)


def _scaled(weight: Array, importance: Array, store: Store, search: bool) -> Grid:
    """Return the grid of matrices on scales of their own, `[expert, group, row]`."""
    scale, zero = fitted(weight, importance, store, search)
    return fixed_grid(store, *(x if x is None else jnp.swapaxes(x, 1, 2) for x in (scale, zero)))


def _columnwise(given: Rounded, store: Store, experts: int) -> Grid:
    """Return the grid of what a rounding found, `[expert, group, row]`."""
    scale, zero = (None if x is None else jnp.swapaxes(jnp.asarray(x, jnp.float32), 1, 2) for x in given[1:3])
    if given.table is None:
        return fixed_grid(store, scale, zero)
    table = jnp.asarray(given.table, jnp.float32).reshape(experts, -1, given.table.shape[-1])
    rows = jnp.broadcast_to(table, (experts, given.codes.shape[1], table.shape[2]))
    return Grid(scale, zero, jnp.moveaxis(rows, 2, 0)[:, :, None])


def _together(x: Array) -> Array:
    """Return `[..., expert, column, row]` with all experts' rows as rows of one."""
    return jnp.moveaxis(x, -3, -2).reshape(*x.shape[:-3], 1, x.shape[-2], -1)


def _apart(x: Array, experts: int) -> Array:
    """Undo `_together`."""
    return x if len(x) == experts else jnp.moveaxis(x.reshape(x.shape[1], experts, -1), 1, 0)
