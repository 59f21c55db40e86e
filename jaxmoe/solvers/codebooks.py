"""Codebooks: the few values that stand best for many, by weighted k-means in one dimension, solved exactly.

    minimise  sum_i v_i (x_i - c_q(i))^2    over the values c and the codes q

In one dimension the clusters of the optimum are intervals of the sorted numbers, and prefix sums W, S, Q of v, v x and
v x^2 give the cost of any interval, cost(i, j) = Q_j - Q_i - (S_j - S_i)^2 / (W_j - W_i). Dynamic programming over the
ends of intervals, D_t[j] = min_i D_t-1[i] + cost(i, j), then finds the optimum, which Lloyd's iteration misses from
every start: from quantiles its loss is 1.3 to 1.5 times as high in the median, and the start decides what a model of
3 bits loses. Cost: k n^2 / 2 for a row of n numbers. Longer rows than `BINS` are cut at as many places as that, and ten
turns of Lloyd's iteration follow: within 0.2 % of the exact loss for 8 codes, 1 % for 16.

Rows of a matrix have tables of their own, or a matrix has one for all its numbers over the scales of their groups.
Source: SqueezeLLM, arXiv 2306.07629, which takes squared gradients for v and one start of Lloyd's iteration.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.rounding import blocks, check, check_importance, joined

BINS = 256
"""Places at most where the dynamic programming may cut a row."""

EDGE = 16
"""Numbers at each end of a longer row that may be cut one from the other: outliers are what bins would blur."""

TURNS = 10
"""Turns of Lloyd's iteration behind the dynamic programming on bins."""

CELLS = 2**15
"""Cells of equal width that numbers are gathered in, instead of being sorted, where there are more than twice as many.

They resolve the places of the cuts to that fraction of the range, and every cell keeps the exact mean of its numbers.
"""


def codebook(
    values: Float[AnyArray, "row value"], weights: Float[AnyArray, "row value"], *, codes: int
) -> Float[Array, "row code"]:
    """Return the values that stand best for the numbers of every row.

    Args:
        values: x, float32 or float64; the result has the same type. Prefix sums cancel: float64 (inside
            `jax.enable_x64(True)`) finds the optimum to the last digit.
        weights: v, at least 0; a row of zeros counts as one of ones.
        codes: how many values a row has.

    Returns:
        The weighted means of the clusters, ascending; where there are fewer different numbers than codes, some twice.

    Raises:
        JaxmoeError: no code at all is asked for.

    Example:
        >>> values = jnp.array([[1.0, 0.0, 5.0, 0.1, 1.1, 0.2]])
        >>> codebook(values, jnp.ones((1, 6)), codes=2).round(2).tolist()
        [[0.479..., 5.0]]
    """
    if codes < 1:
        raise JaxmoeError(f"a codebook of {codes} values: give at least 1")
    weights = jnp.where(jnp.any(weights > 0, axis=1, keepdims=True), weights, 1).astype(values.dtype)
    if values.shape[1] > 2 * CELLS:
        values, weights = _gathered(jnp.asarray(values), weights)
    else:
        values, weights = lax.sort((jnp.asarray(values), weights), num_keys=1)
    # Sums of squares about the mean cancel least.
    centre = jnp.sum(values * weights, axis=1, keepdims=True) / jnp.sum(weights, axis=1, keepdims=True)
    values = values - centre
    sums = jnp.stack([_prefixed(weights), _prefixed(weights * values), _prefixed(weights * values**2)], axis=1)
    places = _places(values.shape[1])
    cuts = jnp.asarray(places)[lax.map(partial(_best_cuts, codes=codes), sums[:, :, places])]
    if len(places) <= values.shape[1]:

        def turn(_, cuts):
            means = _means(sums, cuts)
            halves = (means[:, 1:] + means[:, :-1]) / 2
            return cuts.at[:, 1:-1].set(jax.vmap(jnp.searchsorted)(values, halves).astype(cuts.dtype))

        cuts = lax.fori_loop(0, TURNS, turn, cuts)
    return _means(sums, cuts) + centre


def learned_tables(
    weight: Float[AnyArray, "expert out in"], store: Store, *, importance: Float[AnyArray, "..."] | None = None
) -> Rounded:
    """Learn codebooks for rows, or for matrices under scales, and return the codes of their nearest values.

        row      W = table[q]                       matrix      W = s table[q],   s = max |W| of a group

    Computed in float64.

    Args:
        weight: the matrices; in blocks of experts, never all of them in float64.
        store: `table` is "row" or "matrix".
        importance: of an input, `[1|expert, in]`, such as the diagonal of the second moment, or of every number,
            `[expert, out, in]`, such as squared gradients; not negative. None: all alike.

    Returns:
        Codes in uint8, scales and tables in float32 as the file holds them.

    Raises:
        JaxmoeError: NaN or infinite weights, groups that do not divide the rows, another shape, or a store without a
            learned codebook.

    Example:
        >>> weight = jnp.array([[[0.0, 0.5, 0.25, 1.0], [2.0, 2.5, 4.0, 3.0]]])
        >>> found = learned_tables(weight, Store(bits=2, group=0, zero="none", table="row"))
        >>> found.codes.tolist(), found.table.tolist()
        ([[[0, 2, 1, 3], [0, 1, 3, 2]]], [[0.0, 0.25, 0.5, 1.0], [2.0, 2.5, 3.0, 4.0]])
    """
    if store.table not in ("row", "matrix"):
        raise JaxmoeError(f"table {store.table!r} is not learned: give a store with one for each row or matrix")
    check(weight, store, learned=True)
    experts, out, in_ = weight.shape
    check_importance(importance, (experts, out, in_))
    found = []
    for own in blocks(experts, out * in_):
        say = importance if importance is None or len(importance) == 1 else importance[own]
        with jax.enable_x64(True):
            found.append(_learned(jnp.asarray(weight[own], jnp.float64), say, store))
    return joined(found)


@partial(jax.jit, static_argnames="store")
def _learned(weight: Array, importance: Array | None, store: Store) -> Rounded:
    experts, out, in_ = weight.shape
    if importance is None:
        say = jnp.ones_like(weight)
    else:
        own = importance[:, None] if importance.ndim == 2 else importance
        say = jnp.broadcast_to(own, weight.shape).astype(weight.dtype)
    scale, levels = None, weight
    if store.table == "matrix":
        groups = store.groups(in_)
        largest = jnp.max(jnp.abs(weight.reshape(experts, out, groups, -1)), axis=3).astype(jnp.float32)
        scale = held_scales(jnp.where(largest > 0, largest, 1), store)
        wide = jnp.repeat(scale.astype(weight.dtype), in_ // groups, axis=2)
        levels, say = weight / wide, say * wide**2
    rows = (out, in_) if store.table == "row" else (1, out * in_)

    def of_expert(found):
        levels, say = (x.reshape(rows) for x in found)
        # As files hold it, before the codes are found.
        table = codebook(levels, say, codes=2**store.bits).astype(jnp.bfloat16).astype(levels.dtype)
        return table, nearest_codes(levels, table).reshape(out, in_)

    table, codes = lax.map(of_expert, (levels, say))
    return Rounded(codes, scale, None, table.reshape(-1, 2**store.bits).astype(jnp.float32))


def delicate(
    weight: Float[AnyArray, "expert out in"],
    importance: Float[AnyArray, "expert out in"],
    *,
    sensitive: int,
    large: int,
) -> Int32[Array, "expert place"]:
    """Return the places of a matrix's most important numbers, and of its largest ones among the others.

    Args:
        weight: the matrices.
        importance: of every number, such as squared gradients.
        sensitive: how many are chosen for their importance.
        large: how many are chosen for their size.

    Returns:
        Of every expert, ascending, counted row by row. Of equal numbers the first come first.

    Raises:
        JaxmoeError: there are not so many numbers.

    Example:
        >>> weight, importance = jnp.array([[[5.0, 1.0, -7.0, 2.0]]]), jnp.array([[[0.0, 9.0, 0.0, 1.0]]])
        >>> delicate(weight, importance, sensitive=1, large=1).tolist()
        [[1, 2]]
    """
    experts, out, in_ = weight.shape
    if sensitive < 0 or large < 0 or sensitive + large > out * in_:
        raise JaxmoeError(f"{sensitive} and {large} numbers of a matrix of {out * in_}: give 0 to all of them")
    _, first = lax.top_k(jnp.asarray(importance).reshape(experts, -1), sensitive)
    rows = jnp.arange(experts)[:, None]
    size = jnp.abs(jnp.asarray(weight)).reshape(experts, -1).at[rows, first].set(-1)
    _, second = lax.top_k(size, large)
    return jnp.sort(jnp.concatenate([first, second], axis=1), axis=1).astype(jnp.int32)


def nearest_codes(
    values: Float[AnyArray, "row value"], table: Float[AnyArray, "row code"]
) -> UInt8[Array, "row value"]:
    """Return the code of the nearest entry of every row's ascending table, of two the lower one.

    Example:
        >>> nearest_codes(jnp.array([[0.0, 0.4, 0.6, 9.0]]), jnp.array([[0.0, 1.0]])).tolist()
        [[0, 0, 1, 1]]
    """
    halves = (table[:, 1:] + table[:, :-1]) / 2
    return jax.vmap(partial(jnp.searchsorted, method="compare_all"))(halves, values).astype(jnp.uint8)


def _prefixed(summands):
    """Return the sums of the first 0, 1, ... numbers of every row."""
    return jnp.pad(jnp.cumsum(summands, axis=1), ((0, 0), (1, 0)))


def _places(numbers: int) -> np.ndarray:
    """Return the places where a sorted row may be cut: all, or `BINS` bins of equal count between single ends.

    Example:
        >>> _places(4).tolist(), len(_places(1000)), _places(1000)[[16, 17, -1]].tolist()
        ([0, 1, 2, 3, 4], 257, [16, 20, 1000])
    """
    if numbers <= BINS:
        return np.arange(numbers + 1)
    inner = np.linspace(EDGE, numbers - EDGE, BINS - 2 * EDGE + 1).astype(int)
    return np.concatenate([np.arange(EDGE), inner, numbers - EDGE + 1 + np.arange(EDGE)])


def _best_cuts(sums: Float[Array, "3 place"], *, codes: int):
    """Return the first and last places of the intervals of least cost, as indices of the places, `[codes + 1]`."""
    weight, first, second = (own[None] - own[:, None] for own in sums)
    kept = first**2 / jnp.where(weight > 0, weight, 1)
    cost = jnp.where(weight > 0, jnp.maximum(second - kept, 0), 0)
    last = sums.shape[1] - 1
    cost = jnp.where(np.tri(last + 1, k=-1, dtype=bool), jnp.inf, cost)

    def one_more(least, _):
        return jnp.min(least[:, None] + cost, axis=0), least

    # Only the least cost is kept on the way forwards: which cut had it, a column of sums tells on the way back.
    _, before = lax.scan(one_more, cost[0], None, length=codes - 1)

    def back(end, least):
        begin = jnp.argmin(least + cost[:, end]).astype(jnp.int32)
        return begin, begin

    _, inner = lax.scan(back, jnp.int32(last), before, reverse=True)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.full(1, last, jnp.int32)])


def _means(sums: Float[Array, "row 3 place"], cuts) -> Float[Array, "row code"]:
    """Return the weighted mean of every cell; one without weight repeats its neighbour, the left one if it has one."""
    weight, first = (jnp.diff(jnp.take_along_axis(sums[:, kind], cuts, axis=1), axis=1) for kind in (0, 1))
    filled = weight > 0
    cell = lax.cummax(jnp.where(filled, jnp.arange(weight.shape[1]), -1), axis=1)
    cell = jnp.where(cell < 0, jnp.argmax(filled, axis=1, keepdims=True), cell)
    # Cells of equal numbers have the same mean but for the rounding of their sums.
    return lax.cummax(jnp.take_along_axis(first / jnp.where(filled, weight, 1), cell, axis=1), axis=1)


def _gathered(values, weights):
    """Return the means of cells of equal width, and their weights, instead of the numbers in them."""
    rows = values.shape[0]
    low, high = (jnp.asarray(of(values, axis=1, keepdims=True)) for of in (jnp.min, jnp.max))
    width = jnp.where(high > low, (high - low) / CELLS, 1)
    cell = jnp.clip(((values - low) / width).astype(jnp.int32), 0, CELLS - 1)
    flat = (cell + CELLS * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(-1)
    weight, first = (
        jax.ops.segment_sum(own.reshape(-1), flat, rows * CELLS).reshape(rows, CELLS)
        for own in (weights, weights * values)
    )
    middle = low + (jnp.arange(CELLS, dtype=values.dtype) + 0.5) * width
    return jnp.where(weight > 0, first / jnp.where(weight > 0, weight, 1), middle), weight
