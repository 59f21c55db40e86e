"""The one walk over the terms of a target that holds their arrays in few bits, whatever the method of rounding.

Matrices are rounded under the second moment C of their inputs. Of two factors the right side goes first, and the left
is solved once more against what became of it, so that one takes up the error of the other:

    L = W C R̂ᵀ (R̂ C R̂ᵀ)^-1,        then L is rounded under R̂ C R̂ᵀ, the second moment of its own inputs R̂ x

The same holds for coefficients against blended bases. W is the original's matrix where it is known, otherwise what the
terms stood for; terms before and after are taken off it, as they are by then. Small arrays stay as they are: mixing,
means, ranks, orders, places; and terms of which nothing here is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxmoe.arrays import AnyArray
from jaxmoe.factors import Dense, Grouped, LowRank, Merged, Shared, SharedBasis, Term
from jaxmoe.factors.leaves import plain, values
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.methods.method import Evidence, Fit, Outcome
from jaxmoe.solvers.mixture import solve_coefficients
from jaxmoe.solvers.rounding import blocks

StoreOf = Callable[[int], Store]
"""Returns how numbers of so many bits are held."""

Rounding = Callable[[AnyArray, Store, AnyArray | None], Rounded]
"""`(matrices [expert, out, in], store, second moment of their inputs [1|expert, in, in] or None) -> Rounded`."""

RIDGE = 1e-3
"""What left sides are damped by when they are solved once more, in units of their Gram matrix's mean diagonal: codes
have to hold them."""

HELD: dict[type[Term], tuple[str, ...]] = {
    Dense: ("weight",),
    Merged: ("weight",),
    Shared: ("weight",),
    LowRank: ("right", "left"),
    SharedBasis: ("bases", "coefficients"),
    Grouped: ("bases", "coefficients"),
}
"""The arrays of each kind of term that are held in few bits, in the order in which they are rounded."""


def abstract_terms(terms: tuple[Term, ...], bits: np.ndarray, store: StoreOf) -> tuple[Term, ...]:
    """Return the abstract terms as they will be held.

    Args:
        terms: abstract or real.
        bits: of each expert's numbers, `[expert]`.
        store: of so many bits.
    """

    def held(array):
        return abstract_held(array.shape, _bits_of(array, bits), store)

    return tuple(
        replace(cast(Any, term), **{name: held(getattr(term, name)) for name in HELD.get(type(term), ())})
        for term in terms
    )


def abstract_held(shape: Sequence[int], bits: np.ndarray, store: StoreOf) -> QuantisedArray | MixedArray:
    """Return the abstract array that `hold` makes: `shape` as `QuantisedArray` has it, `bits` of each matrix."""
    widths = np.unique(bits)
    if len(widths) == 1:
        return QuantisedArray.abstract(tuple(shape), store(int(widths[0])).fitted(shape[-1]))
    parts = [(store(int(width)).fitted(shape[-1]), int(np.sum(bits == width))) for width in widths]
    return MixedArray.abstract(tuple(shape), parts, width=shape[-1])


def hold(
    weight: AnyArray, bits: np.ndarray, store: StoreOf, rounding: Rounding, moment: AnyArray | None = None
) -> QuantisedArray | MixedArray:
    """Round matrices, each in its own bits, and pack them.

    Args:
        weight: `[expert, out, in]`.
        bits: of each, `[expert]`.
        store: of so many bits; groups that do not divide the rows become smaller, or whole rows.
        rounding: what finds the codes.
        moment: of their inputs, `[1|expert, in, in]`.
    """
    parts, order = [], []
    for width in np.unique(bits):
        experts = np.flatnonzero(bits == width)
        whole = len(experts) == len(bits)
        own = store(int(width)).fitted(weight.shape[2])
        seen = moment if whole or moment is None or len(moment) == 1 else moment[experts]
        parts.append(QuantisedArray.pack(rounding(weight if whole else weight[experts], own, seen), own))
        order.append(experts)
    if len(parts) == 1:
        return parts[0]
    places = jnp.asarray(np.concatenate(order), jnp.int32)[None]
    return MixedArray(parts=tuple(parts), order=places, width=weight.shape[2], shape=tuple(weight.shape))


def hold_terms(
    terms: tuple[Term, ...], bits: np.ndarray, store: StoreOf, rounding: Rounding, *, evidence: Evidence
) -> Fit:
    """Hold the arrays of a target's terms in few bits.

    Args:
        terms: of the target.
        bits: of each expert's numbers, `[expert]`; arrays of all experts take those that most experts have.
        store: of so many bits.
        rounding: what finds the codes.
        evidence: second moments, and the original's matrices, where they are known.
    """
    walk = _Walk(bits, store, rounding, evidence.moment)
    original = _original(terms, evidence)
    found = list(terms)
    for place, term in enumerate(terms):
        others = [*found[:place], *found[place + 1 :]]
        found[place] = walk.held(term, lambda own, others=others: _left_over(original, others, own))
    return Fit(tuple(found), outcomes=tuple(_outcomes(terms, bits, store)))


def _bits_of(array: Any, bits: np.ndarray) -> np.ndarray:
    """Return the bits of an array's matrices: the experts' own, or one for all where it has others."""
    if len(array.shape) == 3 and array.shape[0] == len(bits):
        return bits
    return np.full(array.shape[0] if len(array.shape) == 3 else 1, np.bincount(bits).argmax())


def _original(terms: tuple[Term, ...], evidence: Evidence) -> Callable[[slice], Array]:
    """Return what reads the matrices of some experts that the terms stand for."""
    if all(isinstance(term, Dense | Merged | Shared) for term in terms):
        known = None
    else:
        known = evidence.weight(evidence.target)
    if known is not None and tuple(known.shape) == terms[0].shape:
        return lambda own: jnp.asarray(known[own], jnp.float32)
    return lambda own: sum((term.materialize(own) for term in terms[1:]), terms[0].materialize(own))


def _left_over(original: Callable[[slice], Array], others: Sequence[Term], own: slice) -> Array:
    return original(own) - sum(term.materialize(own) for term in others)


class _Walk(NamedTuple):
    """How arrays are held, and the second moment of the target's inputs."""

    bits: np.ndarray
    store: StoreOf
    rounding: Rounding
    moment: AnyArray | None

    def held(self, term: Term, target: Callable[[slice], Array]) -> Term:
        """Return a term with its arrays held; `target` reads the matrices that it is to stand for."""
        match term:
            case Dense():
                return replace(term, weight=self._hold(term.weight, self.moment))
            case Merged():
                return replace(term, weight=self._hold(term.weight, self._of_clusters(term)))
            case Shared():
                return replace(term, weight=self._hold(term.weight, self._of_all(term)))
            case LowRank():
                term = replace(term, right=self._hold(term.right, self.moment))
                left, moment = self._solved(values(term.left), target, lambda own: values(term.right, own))
                return replace(term, left=self._hold(left, moment))
            case SharedBasis():
                term = replace(term, bases=self._hold(term.bases, None))
                return replace(term, coefficients=self._hold(*self._coefficients(term, target)))
            case Grouped():
                term = replace(term, bases=self._ragged_bases(term))
                coefficients, _ = self._coefficients(term, target)
                return replace(term, coefficients=self._hold(_ragged(term, coefficients), None))
        return term

    def _hold(self, array: Any, moment: AnyArray | None) -> QuantisedArray | MixedArray:
        array = plain(array)
        if len(array.shape) == 3:
            return hold(array, _bits_of(array, self.bits), self.store, self.rounding, moment)
        flat = hold(array[None], _bits_of(array, self.bits), self.store, self.rounding, moment)
        return replace(flat, shape=tuple(array.shape))

    def _solved(
        self, left: Array, target: Callable[[slice], Array], features: Callable[[slice], Array]
    ) -> tuple[Array, Array]:
        """Return left sides moved to what suits right ones best, and the second moments of their own inputs."""
        solved, moments = [], []
        for own in blocks(len(left), max(left.shape[1:]) ** 2):
            right, start = features(own), left[own]
            moment = None if self.moment is None else jnp.asarray(_own(self.moment, own), jnp.float32)
            rest = target(own) - jnp.matmul(start, right, precision=lax.Precision.HIGHEST)
            # What is solved for is the change: where the right side hardly reaches, the ridge leaves it out.
            solved.append(start + _change(rest, right, jnp.eye(len(right)), moment=moment))
            moments.append(_seen(right, moment))
        return jnp.concatenate(solved), jnp.concatenate(moments)

    def _coefficients(self, term: SharedBasis | Grouped, target: Callable[[slice], Array]) -> tuple[Array, Array]:
        """Return a term's coefficients, solved once more, and the second moments of what they are applied to."""
        mean = term.mean if isinstance(term, SharedBasis) else None
        shift = 0.0 if mean is None else jnp.asarray(mean, jnp.float32)
        start = values(term.coefficients if isinstance(term, SharedBasis) else term.padded()[0])
        if not term.transposed:
            return self._solved(start, lambda own: target(own) - shift, term.features)
        # Of the transposed matrices the moment weighs the rows, which does not change what suits best.
        turned = self._replace(moment=None)
        return turned._solved(start, lambda own: jnp.swapaxes(target(own) - shift, 1, 2), term.features)

    def _ragged_bases(self, term: Grouped) -> QuantisedArray | MixedArray:
        """Return the bases of groups, each rounded under the moments of its experts where they are applied directly."""
        store = self.store(int(np.bincount(self.bits).argmax())).fitted(term.bases.shape[1])
        direct = term.mixing is None and term.activation == "identity" and not term.transposed
        # Scales of scales, and tables of matrices, are of all rows at once.
        if not direct or self.moment is None or store.scale == "quantised" or store.table == "matrix":
            return self._hold(term.bases, None)
        order = np.arange(term.experts) if term.order is None else np.asarray(term.order)[0]
        groups = [order[start : start + term.size] for start in range(0, term.experts, term.size)]
        moment = np.asarray(self.moment)
        if len(moment) > 1:
            moment = moment[order] if term.size == 1 else np.stack([moment[own].mean(0) for own in groups])
        padded = self.rounding(term.padded()[1], store, moment)
        ranks = term.group_ranks
        group = np.repeat(np.arange(len(ranks)), ranks)
        row = np.concatenate([np.arange(rank) for rank in ranks])
        table = None if padded.table is None else padded.table.reshape(*padded.codes.shape[:2], -1)[group, row]
        codes, scale, zero = (None if x is None else x[group, row][None] for x in padded[:3])
        rows = Rounded(cast(Any, codes), scale, zero, table)
        return QuantisedArray.pack(rows, store, shape=tuple(term.bases.shape))

    def _of_clusters(self, term: Merged) -> AnyArray | None:
        """Return the moments of what the experts of each cluster read."""
        if self.moment is None or len(self.moment) == 1:
            return self.moment
        labels, moment = np.asarray(term.labels)[0], np.asarray(self.moment)
        return np.stack([moment[labels == cluster].sum(0) for cluster in range(term.weight.shape[0])])

    def _of_all(self, term: Shared) -> AnyArray | None:
        """Return the moment of what a matrix of all experts reads."""
        if self.moment is None:
            return None
        moment = np.mean(np.asarray(self.moment), axis=0, keepdims=True)
        if term.kept is None or term.axis == "out":
            return moment
        kept = np.asarray(term.kept)[0]
        return moment[:, kept[:, None], kept]


_change = jax.jit(partial(solve_coefficients, activation="identity", ridge=RIDGE, refinements=0))


def _own(moment: AnyArray, own: slice) -> AnyArray:
    return moment if len(moment) == 1 else moment[own]


@jax.jit
def _seen(right: Array, moment: Array | None) -> Array:
    """Return the second moments of what right sides `[expert, rank, in]` make of inputs."""
    weighed = right if moment is None else jnp.matmul(right, moment, precision=lax.Precision.HIGHEST)
    return jnp.matmul(weighed, jnp.swapaxes(right, 1, 2), precision=lax.Precision.HIGHEST)


def _ragged(term: Grouped, coefficients: Array) -> Array:
    """Return coefficients `[expert, row, widest]` as the term stores them."""
    groups = len(term.group_ranks)
    packed = Grouped.build(
        coefficients,
        jnp.zeros((groups, coefficients.shape[2], 1)),
        term.group_ranks,
        order=None if term.order is None else np.asarray(term.order)[0],
        size=term.size,
    )
    return packed.coefficients


def _outcomes(terms: tuple[Term, ...], bits: np.ndarray, store: StoreOf) -> list[Outcome]:
    """Return what the user should know of groups that had to give way."""
    found = []
    wanted = store(int(bits.max())).group
    for term in terms:
        names = HELD.get(type(term))
        if names is None:
            detail = f"nothing is known of how a {term.kind} term could be held in few bits: it stays as it is"
            found.append(Outcome("kept", "", detail))
        for name in names or ():
            row = getattr(term, name).shape[-1]
            group = store(int(bits.max())).fitted(row).group
            if group != wanted:
                by = f"groups of {group}" if group else "whole rows"
                detail = (
                    f"groups of {wanted} do not divide the rows of {row} of {term.kind}'s {name}: {by} share a scale"
                )
                found.append(Outcome("other_groups", "", detail))
    return found
