"""HQQ: real zeros of groups, fitted under a norm that forgives outliers, by half-quadratic splitting."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales, held_zeros
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.rounding import Grid, blocks, check, joined, span_scales

TURNS = 20
"""Turns of HQQ's fit, as published."""


def hqq(weight: Float[AnyArray, "expert out in"], store: Store, *, released: bool = False) -> Rounded:
    """Fit the real zero of every group under a norm that forgives outliers; scales stay those of the span (HQQ).

    Each turn of the half-quadratic splitting takes from the rounding errors d what shrinkage leaves of them, and moves
    the zero to the mean of the rest:

        e = sign(d) max(|d| - |d|^(p-1) / beta, 0)        z = mean(q - (w - e) / s)        p = 0.7, beta = 10 * 1.01^t

    Args:
        weight: the matrices, in blocks of experts.
        store: uniform codes with real zeros.
        released: stop as the released code does: a matrix stops when its mean absolute error rises, with the zeros that
            this turn gave. Otherwise every group keeps the zero of least squared error among all turns, the first
            included.

    Returns:
        Codes in uint8, scales and zeros in float32 as the file holds them.

    Raises:
        JaxmoeError: NaN or infinite weights, groups that do not divide the rows, or a store without real zeros.

    Source:
        Badri and Shaji 2023, mobiusml.github.io/hqq_blog, and its code. Published are half-precision zeros; which ones
        are kept here is the store's affair.

    Example:
        >>> store = Store(bits=2, group=8, zero="real", scale="float32")
        >>> weight = jnp.array([[[-1, -0.2, 0.1, 0.15, 0.3, 0.35, 0.9, 2]]])
        >>> found = hqq(weight, store)
        >>> found.codes.tolist(), round(found.zero.item(), 5)
        ([[[0, 1, 1, 1, 1, 1, 2, 3]]], 0.94208)
    """
    if store.zero != "real":
        raise JaxmoeError(f"HQQ fits real zeros, not zero {store.zero!r}: give zero 'real'")
    check(weight, store)
    experts, out, in_ = weight.shape
    return joined([_hqq(jnp.asarray(weight[own], jnp.float32), store, released) for own in blocks(experts, out * in_)])


def shrink(x: Array, strength: float | Array) -> Array:
    """Return the proximal step of |x|^0.7, as HQQ generalises soft thresholding.

    Example:
        >>> [round(value, 6) for value in shrink(jnp.array([0.5, -0.3, 0.0]), 10.0).tolist()]
        [0.376886, -0.156496, 0.0]
    """
    size = jnp.abs(x)
    # The power is infinite at zero, where the step is zero.
    power = jnp.where(size > 0, size, 1.0) ** -0.3
    return jnp.sign(x) * jnp.maximum(size - power / strength, 0)


@partial(jax.jit, static_argnames=("store", "released"))
def _hqq(weight: Array, store: Store, released: bool) -> Rounded:
    experts, out, in_ = weight.shape
    x = weight.reshape(experts, out, store.groups(in_), -1)
    scale, start = span_scales(jnp.min(x, 3), jnp.max(x, 3), store, 1.0, held_scales)
    assert start is not None
    # The published zeros begin unrounded.
    start = -jnp.min(x, 3) / scale
    ones = jnp.full(x.shape[3], 1 / x.shape[3])

    def mean(values):
        return jnp.matmul(values, ones, precision=lax.Precision.HIGHEST)

    def rounded(zero):
        return Grid(scale[..., None], zero[..., None]).nearest(x, store)

    def turn(index, state):
        zero, kept, least, going = state
        codes, values = rounded(zero)
        rest = x - shrink(x - values, 10.0 * 1.01**index)
        moved = mean(codes - rest / scale[..., None])
        if released:
            error = jnp.mean(jnp.abs(x - values), (1, 2, 3))
            return (
                jnp.where(going[:, None, None], moved, zero),
                kept,
                jnp.minimum(error, least),
                going & (error < least),
            )
        return moved, *_better(moved, kept, least), going

    def _better(zero, kept, least):
        zero = held_zeros(zero, store)
        error = mean((rounded(zero)[1] - x) ** 2)
        return jnp.where(error < least, zero, kept), jnp.minimum(error, least)

    kept, least = _better(start, start, jnp.full(start.shape, jnp.inf))
    if released:
        least = jnp.full(experts, jnp.inf)
    state = (start, kept, least, jnp.ones(experts, bool))
    zero, kept, _, _ = lax.fori_loop(0, TURNS, turn, state)
    zero = held_zeros(zero, store) if released else kept
    codes, _ = rounded(zero)
    return Rounded(codes.reshape(weight.shape), scale, zero)
