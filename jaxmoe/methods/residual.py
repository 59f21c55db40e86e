"""What a recipe's main term leaves over, stored in few numbers: values under a hash, or the largest entries.

    W_e  =  main_e  +  R_e        R = P eta (`Hashed`, kind "hash")  or  the k largest of its entries (`Sparse`, "topk")

Both are optimal for the main term as it is stored, and fitted after it: see `solvers.residual`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.factors import Hashed, Sparse, Term
from jaxmoe.solvers.residual import hashed_residual, largest_entries

RESIDUALS = ("hash", "topk", "none")
"""The kinds of residuals by name."""


def abstract_residual(
    shape: tuple[int, int, int], dtype: Any, *, kind: str, fraction: float, size: int, balanced: bool
) -> tuple[Term, ...]:
    """Return the abstract term of a residual, or none where it would not hold a single number.

    Args:
        shape: `(experts, out, in)`.
        dtype: of the values.
        kind: one of `RESIDUALS`.
        fraction: of the target's numbers that the residual may store; places count as numbers.
        size: experts that share their buckets ("hash").
        balanced: whether the hash fills its buckets evenly.

    Example:
        >>> (term,) = abstract_residual((2, 4, 5), "float32", kind="topk", fraction=0.3, size=1, balanced=True)
        >>> term.count().numbers
        12
        >>> abstract_residual((2, 4, 5), "float32", kind="hash", fraction=0.01, size=2, balanced=True)
        ()
    """
    experts, out, in_ = shape
    buckets = round(fraction * size * out * in_)
    entries = int(fraction * experts * out * in_ - experts) // 2
    if kind == "hash" and buckets:
        return (Hashed.abstract(shape, dtype, buckets=buckets, size=size, balanced=balanced, ordered=True),)
    if kind == "topk" and entries > 0:
        return (Sparse.abstract(shape, dtype, entries=entries),)
    return ()


def fit_residual(
    abstract: Term,
    weight: Float[AnyArray, "expert out in"],
    main: Term,
    *,
    order: Int[np.ndarray, " expert"],
    key: Array | None,
) -> Term:
    """Return the residual of a target beside its main term.

    Args:
        abstract: what `abstract_residual` gave.
        weight: the target's matrices.
        main: the fitted term beside it.
        order: the expert numbers in the order in which they are cut into groups ("hash").
        key: of the hash.
    """
    if isinstance(abstract, Sparse):
        values, indices, counts = _largest(weight, main, entries=abstract.values.shape[1])
        experts, out, in_ = abstract.shape
        values = values.astype(abstract.values.dtype)
        return Sparse(values=values, indices=indices, counts=counts, experts=experts, out=out, in_=in_)
    assert isinstance(abstract, Hashed)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1)) if key is not None else 0
    options = {"size": abstract.size, "buckets": abstract.buckets, "balanced": abstract.balanced}
    values = _hash(weight, main, jnp.asarray(order, jnp.int32), seed, **options)
    return Hashed(
        values=values.astype(abstract.values.dtype),
        seed=np.full((1, 1), seed, np.int32),
        order=np.asarray(order, np.int32)[None],
        experts=abstract.experts,
        out=abstract.out,
        in_=abstract.in_,
        last=abstract.last,
        **options,
    )


@partial(jax.jit, static_argnames=("size", "buckets", "balanced"))
def _hash(weight, main, order, seed, *, size, buckets, balanced):
    left = jnp.asarray(weight, jnp.float32) - main.materialize()
    return hashed_residual(left, buckets=buckets, order=order, size=size, seed=seed, balanced=balanced)


@partial(jax.jit, static_argnames="entries")
def _largest(weight, main, *, entries):
    return largest_entries(jnp.asarray(weight, jnp.float32) - main.materialize(), entries=entries)
