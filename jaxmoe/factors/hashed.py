"""Hashed: few values, each at many places that a hash of the place chooses.

    vec(R_g) = P eta_g,        P has one non-zero 1 / sqrt(c_b) in the row of entry t, in column b(t)

The experts are cut into groups as in `Grouped`; the entries of a group's matrices, one expert after the other and each
in the order of its rows, share `buckets` values, and c_b of them share value b. The columns of P are orthonormal, so
that P^T v is the best eta for given entries v. P itself is nowhere stored: b(t) is computed from a seed, the same in
numpy, JAX and PyTorch, and the same for all groups.

    balanced    entries are cut into runs as long as there are buckets, and every run goes round the buckets once from
                a place of its own: b(t) = (t mod a + h(seed, t div a)) mod a. Bucket sizes differ by one at most.
    otherwise   b(t) = h(seed, t) mod a, independent draws as published; a bucket may be empty.

The result is dense: `apply` forms the matrices. Source: RFID-MoE, arXiv 2602.09316, section on the residual, after
Uni-LoRA, arXiv 2506.00799.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, count_arrays, plain, pytree
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Size, TermSpec, check_order
from jaxmoe.factors.term import Term, Work, chance, per_expert


def mixed(seed, number):
    """Return a well-mixed 32-bit number of a seed and a number, both uint32 arrays: MurmurHash3's finaliser, twice.

    Example:
        >>> mixed(np.uint32([1, 2]), np.uint32([0, 0])).tolist()
        [1895220952, 3248948688]
    """

    def finalized(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    return finalized(number ^ finalized(seed + np.uint32(0x9E3779B9)))


def buckets(
    entries: UInt32[Array | np.ndarray, "*place"],
    seed: UInt32[Array | np.ndarray, "*#place"],
    count,
    *,
    balanced: bool = True,
) -> UInt32[Array | np.ndarray, "*place"]:
    """Return the buckets of entries, computed place by place from the seed.

    Args:
        entries: their positions in the group, uint32.
        seed: uint32.
        count: how many buckets there are, uint32, a number or an array of the entries' shape.
        balanced: see the module.

    Example:
        >>> buckets(np.arange(6, dtype=np.uint32), np.uint32([7]), np.uint32(3)).tolist()
        [0, 1, 2, 1, 2, 0]
    """
    if not balanced:
        return mixed(seed, entries) % count
    # Each summand is below `count`, which is at most 2^31: their sum does not wrap around.
    return (entries % count + mixed(seed, entries // count) % count) % count


def bucket_sizes(entries: int, seed: UInt32[Array, "1"], count: int, *, balanced: bool = True) -> Int[Array, " bucket"]:
    """Return how many of a group's entries lie in each bucket.

    Example:
        >>> bucket_sizes(8, jnp.uint32([7]), 3).tolist()
        [3, 2, 3]
    """
    if not balanced:
        own = buckets(jnp.arange(entries, dtype=jnp.uint32), seed, np.uint32(count), balanced=False)
        return jnp.bincount(own.astype(jnp.int32), length=count)
    runs, rest = divmod(entries, count)
    # The run that the entries do not fill: its places go round from its own start.
    start = mixed(seed, np.uint32(runs)) % np.uint32(count)
    place = (jnp.arange(count, dtype=jnp.uint32) + np.uint32(count) - start) % np.uint32(count)
    return jnp.where(place < rest, runs + 1, runs).astype(jnp.int32)


def of_last_group(count: int, experts: int, size: int) -> int:
    """Return the buckets of the last group: in proportion where it has fewer experts than the others, at least one.

    Example:
        >>> of_last_group(100, experts=10, size=4)
        50
    """
    members = experts - (-(-experts // size) - 1) * size
    return max(1, count * members // size)


@register
@pytree(static=("experts", "out", "in_", "size", "buckets", "last", "balanced"))
@dataclass(frozen=True, kw_only=True)
class Hashed(Term):
    """P eta for each group of experts.

    Stored numbers: groups * buckets + 1 (fewer buckets in a shorter last group; + experts where there is an order).

    Args:
        values: eta of one group after the other, `[1, sum of buckets]`.
        seed: of the hash, int32, `[1, 1]`.
        order: the experts' numbers in the order in which they are cut into groups, int32; None for their own order.
        experts: how many there are.
        out: outputs of a matrix.
        in_: its inputs.
        size: experts in a group; the last group may have fewer.
        buckets: values of a group.
        last: values of the last group.
        balanced: how places are chosen, see the module.

    Example:
        >>> term = Hashed.abstract((8, 4, 16), "bfloat16", buckets=8, size=4)
        >>> term.count()
        Count(numbers=17, bytes=36)
    """

    class Spec(TermSpec, tag="hashed"):
        size: Size
        buckets: Size
        last: Size
        balanced: bool
        order: bool

    kind: ClassVar[str] = "hashed"
    values: Float[Leaf, "1 total"]
    seed: Int[AnyArray | Abstract, "1 1"]
    order: Int[AnyArray | Abstract, "1 expert"] | None = None
    experts: int
    out: int
    in_: int
    size: int = 1
    buckets: int
    last: int
    balanced: bool = True

    @classmethod
    def abstract(
        cls,
        shape,
        dtype,
        *,
        buckets: int,
        size: int = 1,
        balanced: bool = True,
        ordered: bool = False,
        last: int | None = None,
    ) -> "Hashed":
        """Return the term without values: `shape` is `(experts, out, in)`; `last` follows from the sizes if None.

        Raises:
            JaxmoeError: there are more buckets than entries, none, or more entries than 32 bits can count.
        """
        experts, out, in_ = shape
        size = min(size, experts)
        groups = -(-experts // size)
        last = of_last_group(buckets, experts, size) if last is None else last
        entries = size * out * in_
        if entries >= 2**31:
            raise JaxmoeError(
                f"{entries} entries in a group of {size} experts: take smaller groups, below 2^31 entries"
            )
        fewest = (experts - (groups - 1) * size) * out * in_
        if not (1 <= buckets <= entries and 1 <= last <= fewest):
            raise JaxmoeError(f"{buckets} buckets ({last} in the last group) for {entries} ({fewest}) entries")
        return cls(
            values=Abstract((1, (groups - 1) * buckets + last), dtype),
            seed=Abstract((1, 1), jnp.int32),
            order=Abstract((1, experts), jnp.int32) if ordered else None,
            experts=experts,
            out=out,
            in_=in_,
            size=size,
            buckets=buckets,
            last=last,
            balanced=balanced,
        )

    @property
    def shape(self):
        return self.experts, self.out, self.in_

    def places(self, experts: slice = EVERY) -> Int[Array, "expert out in"]:
        """Return which of `values` stands at every place of all experts' matrices, or of some."""
        everywhere = jnp.arange(self.experts) if self.order is None else jnp.argsort(jnp.asarray(self.order)[0])
        position = everywhere[experts][:, None]
        group = position // self.size
        numbers = self.out * self.in_
        # In unsigned numbers from here: the hash is one of theirs.
        within = (position - group * self.size).astype(jnp.uint32) * np.uint32(numbers)
        entry = within + jnp.arange(numbers, dtype=jnp.uint32)
        is_last = group == (self.experts - 1) // self.size
        count = jnp.where(is_last, self.last, self.buckets).astype(jnp.uint32)
        own = buckets(entry, self._seed(), count, balanced=self.balanced)
        return (group * self.buckets + own.astype(jnp.int32)).reshape(-1, self.out, self.in_)

    def scales(self) -> Float[Array, " total"]:
        """Return 1 / sqrt(c) of every value, 0 where nothing shares it."""
        groups, numbers = -(-self.experts // self.size), self.out * self.in_
        sizes = bucket_sizes(self.size * numbers, self._seed(), self.buckets, balanced=self.balanced)
        members = self.experts - (groups - 1) * self.size
        last = bucket_sizes(members * numbers, self._seed(), self.last, balanced=self.balanced)
        counts = jnp.concatenate([jnp.tile(sizes, groups - 1), last]).astype(jnp.float32)
        return jnp.where(counts > 0, 1 / jnp.sqrt(jnp.maximum(counts, 1)), 0)

    def _seed(self) -> UInt32[Array, "1"]:
        return jnp.asarray(self.seed)[0].astype(jnp.uint32)

    def materialize(self, experts=EVERY):
        return (jnp.asarray(plain(self.values), jnp.float32)[0] * self.scales())[self.places(experts)]

    def apply(self, rows, product=per_expert):
        # A value stands at places without any order: nothing is saved by not forming the matrices.
        return product(rows, self.materialize())

    def work(self, chosen):
        experts, out, in_ = self.shape
        numbers = count_arrays([self.values]).numbers
        return Work(numbers * chance(experts, chosen, min(self.size, experts)), 2.0 * chosen * out * in_)

    def described(self):
        return self.Spec(
            size=self.size, buckets=self.buckets, last=self.last, balanced=self.balanced, order=self.order is not None
        )

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(
            shape,
            jnp.float32,
            size=spec.size,
            buckets=spec.buckets,
            last=spec.last,
            balanced=spec.balanced,
            ordered=spec.order,
        )

    def checked(self):
        if self.order is not None:
            check_order(self.order, self.experts)
        return self
