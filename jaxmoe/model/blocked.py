"""The experts' products: every token's row times the matrices of the experts that it was routed to.

Rows are sorted by expert and cut into blocks of equal size, each of one expert; the last block of an expert is padded.
No row is ever dropped: the number of blocks is either decided on the host from real counts (`blocks_needed`) or the
most that can be needed (`most_blocks`). Blocks make one batched product of fixed shape, which is fast on CPU and GPU,
differentiable and shardable; on TPU, where `jax.lax.ragged_dot` is native, the sorted rows are multiplied without
padding.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


class BlockShape(NamedTuple):
    """Rows of a block, and the number of blocks."""

    rows: int
    blocks: int


class Blocks(NamedTuple):
    """Where each assignment of a token to an expert lies among the blocks.

    Args:
        expert: the expert of each block.
        assignment: which assignment (`token * top_k + choice`) each row holds; their number where the row is padding.
        place: in which row, counted over all blocks, each assignment lies.
    """

    expert: Int[Array, " block"]
    assignment: Int[Array, "block row"]
    place: Int[Array, "token choice"]


def block_rows(assignments: int, experts: int) -> int:
    """Return how many rows a block should have: about half of an expert's mean share, a multiple of 8 up to 256.

    Smaller blocks pad less, larger ones read the matrices less often.

    Example:
        >>> block_rows(8192, 32)
        128
    """
    return min(256, max(8, assignments // experts // 2 // 8 * 8))


def summed_rows(assignments: int, experts: int, numbers: int) -> int:
    """Return how many rows a block should have where its rows are multiplied with each other, and the product added up.

    The sums of an expert are read and written once for every block. Where they stay in a cache that costs little, and
    smaller blocks, which pad less, are better.

    Args:
        assignments: of tokens to experts.
        experts: that they are for.
        numbers: of an expert's sums.

    Example:
        >>> summed_rows(16384, 32, numbers=256 * 256), summed_rows(16384, 32, numbers=2048 * 2048)
        (128, 256)
    """
    rows = block_rows(assignments, experts)
    return min(rows, 128) if numbers <= _CACHED else rows


_CACHED = 1 << 18
"""Numbers in float32 that common second-level caches hold."""


def most_blocks(assignments: int, experts: int, rows: int) -> int:
    """Return the number of blocks that are enough whatever the routing.

    Example:
        >>> most_blocks(8192, 32, 128)
        96
    """
    return min(assignments // rows + experts, assignments)


def blocks_needed(counts: np.ndarray, rows: int) -> int:
    """Return the number of blocks for these counts, rounded up so that few different numbers occur.

    Args:
        counts: assignments of each expert.
        rows: of a block.

    Example:
        >>> blocks_needed(np.array([1, 300, 0]), 128)
        4
    """
    needed = int((-(-counts // rows)).sum())
    step = max(1, len(counts) // 4)
    return min(-(-needed // step) * step, most_blocks(int(counts.sum()), len(counts), rows))


def arrange(experts: Int[Array, "token choice"], num_experts: int, shape: BlockShape) -> Blocks:
    """Sort the assignments by expert into blocks.

    Args:
        experts: the chosen experts of every token.
        num_experts: how many there are.
        shape: of the blocks; there must be as many as the counts need.

    Example:
        >>> arrange(jnp.array([[1], [0], [1]]), 2, BlockShape(rows=2, blocks=2)).assignment
        Array([[1, 3],
               [0, 2]], dtype=int32)
    """
    rows, blocks = shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts)
    ends = jnp.cumsum(-(-counts // rows))
    first_block, first = ends - (-(-counts // rows)), jnp.cumsum(counts) - counts
    sorted_experts = flat[order]
    position = jnp.arange(len(flat)) - first[sorted_experts] + first_block[sorted_experts] * rows
    assignment = jnp.full(blocks * rows, len(flat), jnp.int32).at[position].set(order.astype(jnp.int32))
    place = jnp.zeros(len(flat), jnp.int32).at[order].set(position.astype(jnp.int32))
    owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return Blocks(
        jnp.minimum(owner, num_experts - 1).astype(jnp.int32),
        assignment.reshape(blocks, rows),
        place.reshape(experts.shape),
    )


@jax.custom_vjp
def gather(x: Float[Array, "token choice size"], blocks: Blocks) -> Float[Array, "block row size"]:
    """Return the assignments' rows in blocks, zeros where a row is padding."""
    flat = x.reshape(-1, x.shape[-1])
    taken = flat.at[blocks.assignment].get(mode="fill", fill_value=0)
    return taken


@jax.custom_vjp
def gather_zeros(x: Float[Array, "token choice size"], blocks: Blocks) -> Float[Array, "block row size"]:
    """Return what `gather` does of zeros, without reading them; the gradient is the same."""
    return jnp.zeros((*blocks.assignment.shape, x.shape[-1]), x.dtype)


@jax.custom_vjp
def gather_tokens(x: Float[Array, "token size"], blocks: Blocks) -> Float[Array, "block row size"]:
    """Return the tokens' rows in blocks, zeros where a row is padding."""
    return x.at[blocks.assignment // blocks.place.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def scatter(rows: Float[Array, "block row size"], blocks: Blocks) -> Float[Array, "token choice size"]:
    """Return the rows of the assignments in their own order."""
    return rows.reshape(-1, rows.shape[-1])[blocks.place]


def _remembering(function):
    """Return the forward pass whose backward pass needs the blocks alone."""
    return lambda x, blocks: (function(x, blocks), blocks)


# Every assignment has one row, and every row at most one assignment: the transpose of reading is reading the other way
# round. Left to itself JAX adds rows up one after the other, behind copies of all of them.
gather.defvjp(_remembering(gather), lambda blocks, rows: (scatter(rows, blocks), None))
gather_tokens.defvjp(_remembering(gather_tokens), lambda blocks, rows: (jnp.sum(scatter(rows, blocks), 1), None))
gather_zeros.defvjp(_remembering(gather_zeros), lambda blocks, rows: (scatter(rows, blocks), None))
scatter.defvjp(_remembering(scatter), lambda blocks, x: (gather(x, blocks), None))


def block_product(blocks: Blocks):
    """Return the product that a term applies to rows in blocks: each block times the matrix of its expert."""

    def product(rows: Float[Array, "block row in"], matrices: Float[Array, "expert out in"]):
        def multiply(own, copies):
            return jnp.einsum("bti,boi->bto", own, copies, precision=lax.Precision.HIGHEST)

        # Every block reads a copy of its matrix: not all copies of large matrices at once.
        together = max(1, _COPIES // (matrices.shape[1] * matrices.shape[2] * rows.dtype.itemsize))
        if together >= len(rows):
            return multiply(rows, matrices.astype(rows.dtype)[blocks.expert])

        def some(parts):
            own, expert = parts
            return multiply(own, jnp.asarray(_taken(matrices, expert, len(matrices)), own.dtype))

        whole = len(rows) // together * together
        cut = [part[:whole].reshape(-1, together, *part.shape[1:]) for part in (rows, blocks.expert)]
        found = lax.map(some, cut).reshape(whole, rows.shape[1], -1)
        if whole == len(rows):
            return found
        return jnp.concatenate([found, some((rows[whole:], blocks.expert[whole:]))])

    return product


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(matrices: Float[Array, "expert out in"], experts: Int[Array, " block"], count: int) -> Array:
    """Return the matrices of some of `count` experts, `[block, out, in]`."""
    if matrices.dtype.itemsize != 2:
        return matrices[experts]
    # As bits: on CPU XLA reads floating-point numbers of two bytes by turning the whole array into float32 first.
    return lax.bitcast_convert_type(lax.bitcast_convert_type(matrices, jnp.uint16)[experts], matrices.dtype)


def _taken_backward(count: int, experts, gradient):
    return jnp.zeros((count, *gradient.shape[1:]), gradient.dtype).at[experts].add(gradient), None


# Bits have no gradient of their own.
_taken.defvjp(lambda matrices, experts, count: (_taken(matrices, experts, count), experts), _taken_backward)

_COPIES = 32 << 20
"""Bytes of matrices that are copied for blocks at a time."""


def ragged_product(counts: Int[Array, " expert"]):
    """Return the product that a term applies to rows sorted by expert."""

    def product(rows: Float[Array, "row in"], matrices: Float[Array, "expert out in"]):
        flipped = jnp.swapaxes(matrices, 1, 2).astype(rows.dtype)
        return lax.ragged_dot(rows, flipped, counts.astype(jnp.int32), precision=lax.Precision.HIGHEST)

    return product
