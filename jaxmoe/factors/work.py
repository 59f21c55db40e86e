"""What a token costs in the routed experts: the stored numbers that it uses and the operations of its matrix products.

A token that chooses k of E experts uses

    k / E               of what each expert has for itself,
    1 - C(E-s, k) / C(E, k)     of what a group of s experts shares: the chance that it chooses one of them,
    1                   of what all experts share,

in the mean over all choices of k experts, each as likely as any other. A product of a row with a matrix `[out, in]`
takes 2 out in operations, with factors of rank r 2 r (out + in). Blends of bases and matrices that are formed from
hashed or sparse entries cost once in every call, however many tokens it has: they are not in these numbers.
"""

from functools import singledispatch
from math import comb
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.grouped import Grouped
from jaxmoe.factors.hashed import Hashed
from jaxmoe.factors.layer import CompressedLayer
from jaxmoe.factors.low_rank import LowRank
from jaxmoe.factors.merged import Merged
from jaxmoe.factors.shared import Shared
from jaxmoe.factors.shared_basis import SharedBasis
from jaxmoe.factors.term import Term, count_arrays


class Work(NamedTuple):
    """The expected cost of one token: stored numbers that it uses, and operations of its matrix products.

    Example:
        >>> Work(3.0, 6.0) + Work(1.0, 2.0)
        Work(numbers=4.0, operations=8.0)
    """

    numbers: float
    operations: float

    def __add__(self, other: tuple) -> "Work":
        return Work(self.numbers + other[0], self.operations + other[1])


def layer_work(layer: CompressedLayer, chosen: int) -> Work:
    """Return what a token costs in the experts of one layer.

    Args:
        layer: its terms, real ones.
        chosen: experts of a token, 1 to all.

    Example:
        >>> from jaxmoe.factors import Dense, LayerShape
        >>> sizes = LayerShape(experts=4, hidden=8, intermediate=2)
        >>> dense = {name: (Dense(weight=np.zeros(sizes.of(name))),) for name in sizes.projections}
        >>> layer_work(CompressedLayer(terms=dense, sizes=sizes), 2)
        Work(numbers=96.0, operations=192.0)
    """
    if not 1 <= chosen <= layer.sizes.experts:
        raise JaxmoeError(f"{chosen} experts of a token in a layer of {layer.sizes.experts}: give 1 to all of them")
    return sum((work(term, chosen) for terms in layer.terms.values() for term in terms), Work(0.0, 0.0))


@singledispatch
def work(term: Term, chosen: int) -> Work:
    """Return what a token costs in one term.

    Terms without a rule of their own are those whose numbers belong to single experts and whose matrices are dense
    where they are used; a term of another kind registers its rule with `work.register`.

    Args:
        term: a real one.
        chosen: experts of a token.
    """
    experts, out, in_ = term.shape
    return Work(term.count().numbers * chosen / experts, 2.0 * chosen * out * in_)


@work.register
def _(term: LowRank, chosen: int) -> Work:
    experts, out, in_ = term.shape
    return Work(term.count().numbers * chosen / experts, 2.0 * chosen * term.rank * (out + in_))


@work.register
def _(term: SharedBasis, chosen: int) -> Work:
    experts, out, in_ = term.shape
    own = count_arrays([term.coefficients, term.mixing]).numbers
    shared = term.count().numbers - own
    return Work(own * chosen / experts + shared, 2.0 * chosen * term.rank * (out + in_))


@work.register
def _(term: Grouped, chosen: int) -> Work:
    experts, out, in_ = term.shape
    ranks = np.array(term.group_ranks)
    members = np.minimum(term.size, experts - term.size * np.arange(len(ranks)))
    share = chosen / experts
    # Blended bases are read whole by every expert.
    used = np.array([_chance(experts, chosen, size) for size in members]) if term.mixing is None else 1.0
    own = count_arrays([term.coefficients, *([] if term.mixing is None else [term.mixing])]).numbers
    numbers = own * share + float(np.sum(used * ranks)) * term.bases.shape[1]
    return Work(numbers, 2.0 * share * float(np.sum(members * ranks)) * (out + in_))


@work.register
def _(term: Shared, chosen: int) -> Work:
    numbers = count_arrays([term.weight]).numbers
    return Work(float(numbers), 2.0 * numbers)


@work.register
def _(term: Hashed, chosen: int) -> Work:
    experts, out, in_ = term.shape
    numbers = count_arrays([term.values]).numbers
    return Work(numbers * _chance(experts, chosen, min(term.size, experts)), 2.0 * chosen * out * in_)


@work.register
def _(term: Merged, chosen: int) -> Work:
    experts, out, in_ = term.shape
    members = np.bincount(np.asarray(term.labels)[0], minlength=len(term.weight))
    used = sum(_chance(experts, chosen, int(size)) for size in members)
    return Work(used * out * in_, 2.0 * chosen * out * in_)


def _chance(experts: int, chosen: int, size: int) -> float:
    """Return the chance that at least one of a group's experts is among a token's.

    Example:
        >>> _chance(4, 2, 1), _chance(4, 2, 3)
        (0.5, 1.0)
    """
    return 1 - comb(experts - size, chosen) / comb(experts, chosen)
