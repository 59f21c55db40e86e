"""Grouped: experts in groups that share a basis, and every group has a rank of its own.

    W_e = A_e f(B_g(e))        or        W_e = A_e f(sum_j alpha_ej B_j)        or the transpose of that

The experts, in their own order or in a given one, are cut into consecutive groups of equal size. Groups of one expert
are low-rank factors of unequal ranks; one group of all experts is one basis for all. In the second form all groups'
bases are blended: an expert uses as many rows of the blend as its group's rank, and a shorter basis ends in zeros.
Source: RFID-MoE, arXiv 2602.09316, equation 14 in that reading.

Stored are the ragged arrays, without padding. `padded` gathers from them with indices that follow from the ranks, so
that ranks may be traced; only the widest of them has to be known, because it is a shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, count_arrays, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.shared_basis import ACTIVATIONS, Activation
from jaxmoe.factors.spec import Number, Size, TermSpec, check_order, shortened
from jaxmoe.factors.term import Term, Work, chance, per_expert


@register
@pytree(static=("experts", "size", "widest", "activation", "transposed"))
@dataclass(frozen=True, kw_only=True)
class Grouped(Term):
    """A_e f(B_g(e)), or A_e f(sum_j alpha_ej B_j), with a rank for every group.

    Stored numbers: sum over experts of their ranks * rows + sum over groups of their ranks * columns + groups
    (+ experts where there is an order, + experts * groups where bases are blended).

    Args:
        coefficients: the columns of A, for experts in the order of `order` as many rows as their group's rank: row k of
            an expert is column k of its A. `[sum of experts' ranks, row]`.
        bases: B of one group after the other, `[sum of groups' ranks, column]`.
        ranks: of the groups, int32; an expert whose group has rank 0 is zero.
        experts: how many there are.
        order: the experts' numbers in the order in which they are cut into groups, int32; None for their own order.
        mixing: alpha, by expert number; None for f(B) of the own group.
        size: experts in a group; the last group may have fewer.
        widest: the largest rank.
        activation: a name in `ACTIVATIONS`.
        transposed: whether the experts' matrices `[out, in]` are the transposes of `[row, column]`.

    Example:
        >>> term = Grouped.build(jnp.ones((3, 4, 2)), jnp.ones((2, 2, 5)), [2, 1], size=2)
        >>> term.shape, term.group_ranks, term.count().numbers == (2 + 2 + 1) * 4 + (2 + 1) * 5 + 2
        ((3, 4, 5), (2, 1), True)
        >>> term.materialize()[:, 0, 0].tolist()
        [2.0, 2.0, 1.0]
    """

    class Spec(TermSpec, tag="grouped"):
        size: Size
        total: Number
        rows: Number
        activation: Activation
        transposed: bool
        order: bool
        mixing: bool
        # Programs that trace want to know it before the ranks are there; older versions did not write it.
        widest: Number | None = None

    kind: ClassVar[str] = "grouped"
    coefficients: Float[Leaf, "coefficient row"]
    bases: Float[Leaf, "total column"]
    ranks: Int[AnyArray | Abstract, "1 group"]
    experts: int
    order: Int[AnyArray | Abstract, "1 expert"] | None = None
    mixing: Float[AnyArray | Abstract, "expert group"] | None = None
    size: int = 1
    widest: int
    activation: str = "identity"
    transposed: bool = False

    @classmethod
    def abstract(
        cls,
        shape,
        dtype,
        *,
        total: int,
        size: int = 1,
        activation: str = "identity",
        transposed: bool = False,
        mixed: bool = False,
        ordered: bool = False,
        widest: int | None = None,
        rows: int | None = None,
    ) -> "Grouped":
        """Return the term without values, for ranks of which only the sum is known.

        Args:
            shape: `(experts, out, in)`.
            dtype: of all but ranks and order, which are int32.
            total: the sum of the groups' ranks.
            size: experts in a group.
            activation: a name in `ACTIVATIONS`.
            transposed: as the field.
            mixed: whether the bases are blended.
            ordered: whether there is an order.
            widest: the largest rank; None takes the most that can be of use.
            rows: the sum of the experts' ranks; None takes `size * total`. With a last group of fewer experts the real
                term stores less than that, by its rank for every expert that it lacks.
        """
        experts, row, column = (shape[0], *(shape[:0:-1] if transposed else shape[1:]))
        size = min(size, experts)
        groups = -(-experts // size)
        return cls(
            coefficients=Abstract((size * total if rows is None else rows, row), dtype),
            bases=Abstract((total, column), dtype),
            ranks=Abstract((1, groups), jnp.int32),
            experts=experts,
            order=Abstract((1, experts), jnp.int32) if ordered else None,
            mixing=Abstract((experts, groups), dtype) if mixed else None,
            size=size,
            widest=min(total, size * row, column) if widest is None else widest,
            activation=activation,
            transposed=transposed,
        )

    @classmethod
    def build(
        cls,
        coefficients: Float[AnyArray, "expert row widest"],
        bases: Float[AnyArray, "group widest column"],
        ranks: Sequence[int] | np.ndarray,
        *,
        order: Sequence[int] | np.ndarray | None = None,
        mixing: Float[AnyArray, "expert group"] | None = None,
        size: int = 1,
        activation: str = "identity",
        transposed: bool = False,
        dtype=None,
    ) -> "Grouped":
        """Pack padded arrays; what lies beyond a rank is dropped.

        Args:
            coefficients: A by expert number.
            bases: B by group.
            ranks: of the groups, known on the host.
            order: the experts' numbers in the order in which they are cut into groups, known on the host.
            mixing: alpha by expert number.
            size: experts in a group.
            activation: a name in `ACTIVATIONS`.
            transposed: as the field.
            dtype: of what is stored; None keeps that of the arrays.

        Raises:
            JaxmoeError: sizes, ranks, order or activation do not fit together.
        """
        experts = coefficients.shape[0]
        size = min(size, experts)
        ranks = np.asarray(ranks, np.int64).reshape(-1)
        own = np.arange(experts) if order is None else np.asarray(order, np.int64).reshape(-1)
        _check(coefficients.shape, bases.shape, ranks, own, mixing, size, activation)
        by_position = np.repeat(ranks, size)[:experts]
        expert = np.repeat(own, by_position)
        column = np.concatenate([np.arange(rank) for rank in by_position])
        group, row = np.repeat(np.arange(len(ranks)), ranks), np.concatenate([np.arange(rank) for rank in ranks])

        # Every list of ranks is a program of its own, and operation by operation it would be a dozen.
        cut = _cut if isinstance(coefficients, np.ndarray) and isinstance(bases, np.ndarray) else _compiled_cut
        flat, flat_bases = cut(coefficients, bases, expert, column, group, row, dtype=dtype)
        return cls(
            coefficients=flat,
            bases=flat_bases,
            ranks=ranks.astype(np.int32)[None],
            experts=experts,
            order=None if order is None else own.astype(np.int32)[None],
            mixing=mixing if mixing is None or dtype is None else mixing.astype(dtype),
            size=size,
            widest=int(ranks.max()),
            activation=activation,
            transposed=transposed,
        )

    @property
    def shape(self):
        rows, columns = self.coefficients.shape[1], self.bases.shape[1]
        return (self.experts, columns, rows) if self.transposed else (self.experts, rows, columns)

    @property
    def group_ranks(self) -> tuple[int, ...]:
        """The groups' ranks as numbers of the host.

        Raises:
            JaxmoeError: they are not known: the term is abstract or traced.
        """
        if isinstance(self.ranks, Abstract | Tracer):
            raise JaxmoeError("the ranks of this grouped term are not known yet: ask a real term, outside jax.jit")
        return tuple(np.asarray(self.ranks).reshape(-1).tolist())

    @property
    def rank(self) -> int:
        """The groups' mean rank, rounded down: known of an abstract term too."""
        return self.bases.shape[0] // self.ranks.shape[1]

    @property
    def known_ranks(self):
        return None if isinstance(self.ranks, Abstract | Tracer) else self.group_ranks

    def padded(self) -> tuple[Float[Array, "expert row widest"], Float[Array, "group widest column"]]:
        """Return coefficients by expert number and bases by group, with zeros beyond the ranks, as stored."""
        ranks, start = self._placed()
        return self._coefficients(EVERY), self._rows(plain(self.bases), start, ranks)

    def features(self, experts: slice = EVERY) -> Float[Array, "expert widest column"]:
        """Return f(B) of the group or f(blend) of all experts, or of some, in float32."""
        ranks, start = self._placed()
        if self.mixing is None:
            group = self._positions(experts) // self.size
            blend = jnp.asarray(self._rows(plain(self.bases), start[group], ranks[group]), jnp.float32)
        else:
            bases = jnp.asarray(self._rows(plain(self.bases), start, ranks), jnp.float32)
            mixing = values(self.mixing, experts)
            blend = jnp.einsum("eg,grc->erc", mixing, bases, precision=lax.Precision.HIGHEST)
        return ACTIVATIONS[self.activation](blend)

    def materialize(self, experts=EVERY):
        coefficients = jnp.asarray(self._coefficients(experts), jnp.float32)
        equation = "epr,erq->eqp" if self.transposed else "epr,erq->epq"
        return jnp.einsum(equation, coefficients, self.features(experts), precision=lax.Precision.HIGHEST)

    def apply(self, rows, product=per_expert):
        features, coefficients = self.features(), self._coefficients(EVERY)
        if self.transposed:
            # The matrices are (A f(B))ᵀ: both factors change sides.
            features, coefficients = jnp.swapaxes(coefficients, 1, 2), jnp.swapaxes(features, 1, 2)
        return product(product(rows, features), coefficients)

    def work(self, chosen):
        experts, out, in_ = self.shape
        groups = self.ranks.shape[1]
        # Of an abstract term the mean rank is known, which for groups of one expert costs just as much.
        ranks = (
            np.full(groups, self.bases.shape[0] / groups) if self.known_ranks is None else np.array(self.known_ranks)
        )
        members = np.minimum(self.size, experts - self.size * np.arange(len(ranks)))
        share = chosen / experts
        # Blended bases are read whole by every expert.
        used = np.array([chance(experts, chosen, size) for size in members.tolist()]) if self.mixing is None else 1.0
        own = count_arrays([self.coefficients, *([] if self.mixing is None else [self.mixing])]).numbers
        numbers = own * share + float(np.sum(used * ranks)) * self.bases.shape[1]
        return Work(numbers, 2.0 * share * float(np.sum(members * ranks)) * (out + in_))

    def _counting(self):
        """Return what counts with ranks and order: numpy where they are known, so that nothing is compiled for it."""
        return jnp if any(isinstance(array, Tracer) for array in (self.ranks, self.order)) else np

    def _placed(self) -> tuple[Int[AnyArray, " group"], Int[AnyArray, " group"]]:
        """Return the groups' ranks, and where their bases begin."""
        own = self._counting()
        ranks = own.asarray(self.ranks)[0]
        return ranks, own.cumsum(ranks) - ranks

    def _positions(self, experts: slice) -> Int[AnyArray, " expert"]:
        """Return where experts stand in the order."""
        own = self._counting()
        everywhere = own.arange(self.experts) if self.order is None else own.argsort(own.asarray(self.order)[0])
        return everywhere[experts]

    def _coefficients(self, experts: slice) -> Float[Array, "expert row widest"]:
        (ranks, first), position = self._placed(), self._positions(experts)
        group = position // self.size
        # Only the last group can have fewer experts, so that all groups before any other are full.
        start = self.size * first[group] + (position - group * self.size) * ranks[group]
        return jnp.swapaxes(self._rows(plain(self.coefficients), start, ranks[group]), 1, 2)

    def _rows(self, flat, start, ranks) -> Array:
        """Return the rows of `flat` from each start, as many as its rank says, then zeros: `[start, widest, ...]`."""
        own = self._counting()
        offset = own.arange(self.widest)
        return _rows_or_zeros(flat, own.where(offset < ranks[:, None], start[:, None] + offset, flat.shape[0]))

    def described(self):
        return self.Spec(
            size=self.size,
            total=self.bases.shape[0],
            rows=self.coefficients.shape[0],
            activation=self.activation,
            transposed=self.transposed,
            order=self.order is not None,
            mixing=self.mixing is not None,
            widest=self.widest,
        )

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(
            shape,
            jnp.float32,
            total=spec.total,
            rows=spec.rows,
            size=spec.size,
            activation=spec.activation,
            transposed=spec.transposed,
            ordered=spec.order,
            mixed=spec.mixing,
            widest=spec.total if spec.widest is None else spec.widest,
        )

    def checked(self):
        ranks = np.asarray(self.ranks, np.int64)[0]
        members = np.minimum(self.size, self.experts - self.size * np.arange(ranks.size))
        total, rows = self.bases.shape[0], self.coefficients.shape[0]
        if ranks.min() < 0 or ranks.sum() != total or (members * ranks).sum() != rows:
            raise JaxmoeError(
                f"ranks {shortened(ranks)} of groups of {self.size} experts do not add up to the {total} rows of bases"
                f" and {rows} of coefficients that are there"
            )
        # A record that does not name the widest stands for all rows.
        if self.widest not in (ranks.max(), total):
            raise JaxmoeError(
                f"widest is {self.widest} in the record, and the largest of ranks {shortened(ranks)} is not"
            )
        if self.order is not None:
            check_order(self.order, self.experts)
        return replace(self, widest=int(ranks.max()))


@jax.jit
def _rows_or_zeros(flat, index):
    return flat.at[index].get(mode="fill", fill_value=0)


def _cut(coefficients, bases, expert, column, group, row, *, dtype):
    """Return what lies within the ranks, at these places, of padded coefficients and bases."""
    flat = coefficients[expert, :, column], bases[group, row]
    return flat if dtype is None else tuple(array.astype(dtype) for array in flat)


_compiled_cut = jax.jit(_cut, static_argnames="dtype")


def _check(coefficients, bases, ranks: np.ndarray, order: np.ndarray, mixing: Any, size: int, activation: str) -> None:
    """Raise if what is to be packed does not fit together; all faults are listed."""
    experts, _, widest = coefficients
    groups = -(-experts // size)
    faults = []
    if bases[:2] != (groups, widest):
        faults.append(f"bases {tuple(bases)} for {groups} groups of {size} experts and coefficients {coefficients}")
    if ranks.shape != (groups,):
        faults.append(f"{len(ranks)} ranks for {groups} groups of {size} experts")
    if wrong := [rank for rank in ranks.tolist() if not 0 <= rank <= widest]:
        faults.append(f"ranks {wrong} outside 0 to {widest}")
    if not np.array_equal(np.sort(order), np.arange(experts)):
        faults.append(f"order {order.tolist()} does not name each of the experts 0 to {experts - 1} once")
    if mixing is not None and mixing.shape != (experts, groups):
        faults.append(f"mixing {mixing.shape} for {experts} experts and {groups} groups")
    if activation not in ACTIVATIONS:
        faults.append(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if faults:
        raise JaxmoeError("; ".join(faults))
