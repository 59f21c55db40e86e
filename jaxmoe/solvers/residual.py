"""What factors leave over, in few numbers: the best values under a hash, or the largest entries.

    hashed      eta = P^T v,   v the entries of a group's residuals, P the orthonormal map of `factors.hashed`
    largest     the entries that take the most from the squared error

The hash takes the share buckets / entries of the squared residual whatever its spectrum (more where its mean is not
zero); the largest entries take more at equal numbers, also when their places are counted. Both need no iteration.
Source: RFID-MoE, arXiv 2602.09316, which trains eta; the closed form is the optimum of that problem.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.hashed import Hashed


def hashed_residual(
    residual: Float[AnyArray, "expert out in"],
    *,
    buckets: int,
    order: Int[AnyArray, " expert"] | Sequence[int] | None = None,
    size: int = 1,
    seed: int | Int[AnyArray, ""] = 0,
    balanced: bool = True,
) -> Float[Array, "1 total"]:
    """Return the values that minimise ||v - P eta||^2 for every group: eta_b = sum over the bucket of v_t / sqrt(c_b).

    Args:
        residual: what is left over.
        buckets: values of a group of `size` experts; a shorter last group gets its share.
        order: the experts' numbers in the order in which they are cut into groups.
        size: experts in a group.
        seed: of the hash, 0 to 2^31 - 1.
        balanced: see `factors.hashed`.

    Returns:
        The `values` of a `Hashed` term of the same sizes, in float32.

    Raises:
        JaxmoeError: there are more buckets than entries.

    Example:
        >>> hashed_residual(jnp.ones((2, 2, 2)), buckets=2).tolist()
        [[1.414..., 1.414..., 1.414..., 1.414...]]
    """
    term = Hashed.abstract(
        residual.shape, jnp.float32, buckets=buckets, size=size, balanced=balanced, ordered=order is not None
    )
    term = replace(
        term,
        seed=jnp.full((1, 1), seed, jnp.int32),
        order=None if order is None else jnp.asarray(order, jnp.int32)[None],
    )
    flat, places = residual.astype(jnp.float32).reshape(-1), term.places().reshape(-1)
    return (jax.ops.segment_sum(flat, places, term.values.shape[1]) * term.scales())[None]


def largest_entries(
    residual: Float[AnyArray, "expert out in"], *, entries: int
) -> tuple[Float[Array, "1 entry"], Int[Array, "1 entry"], Int[Array, "1 expert"]]:
    """Return the entries of largest absolute value among all experts; of equal ones those that come first.

    Args:
        residual: what is left over.
        entries: how many.

    Returns:
        `values`, `indices` and `counts` of a `Sparse` term, in the order of the experts and of the places.

    Raises:
        JaxmoeError: more entries are asked for than there are, or there are more than 32 bits can count.

    Example:
        >>> largest_entries(jnp.array([[[1.0, -5.0]], [[3.0, 0.0]]]), entries=2)
        (Array([[-5.,  3.]], dtype=float32), Array([[1, 0]], dtype=int32), Array([[1, 1]], dtype=int32))
    """
    experts, out, in_ = residual.shape
    numbers = experts * out * in_
    if not 0 <= entries <= numbers < 2**31:
        raise JaxmoeError(f"{entries} entries of {numbers}: take 0 to {numbers}, of fewer than 2^31")
    flat = residual.reshape(-1)
    _, chosen = jax.lax.top_k(jnp.abs(flat), entries)
    chosen = jnp.sort(chosen)
    counts = jnp.bincount(chosen // np.int32(out * in_), length=experts)
    return flat[chosen][None], (chosen % np.int32(out * in_)).astype(jnp.int32)[None], counts.astype(jnp.int32)[None]
