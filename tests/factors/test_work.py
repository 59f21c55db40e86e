"""What a token costs, against counting the numbers that every possible choice of experts reads."""

from itertools import combinations

import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, Grouped, Hashed, LayerShape, LowRank, Shared, SharedBasis, Sparse
from jaxmoe.factors.term import per_expert

EXPERTS, OUT, IN, CHOSEN = 5, 6, 4, 2
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def grouped(**options):
    ranks = [3, 1, 2]
    return Grouped.build(draw(EXPERTS, OUT, 3), draw(3, 3, IN), ranks, size=2, **options)


def reads_group(ranks, group):
    return {("basis", group, i) for i in range(ranks[group] * IN)}


def numbers_of(kind, expert):
    """Return names of the numbers that a token reads for one expert."""
    own = lambda count: {("own", expert, i) for i in range(count)}  # noqa: E731
    ranks = [3, 1, 2]
    match kind:
        case "dense":
            return own(OUT * IN)
        case "low_rank":
            return own(2 * (OUT + IN))
        case "shared":
            return {("base", i) for i in range(OUT * IN)}
        case "shared_basis":
            return own(OUT * 2 + 3) | {("basis", i) for i in range(3 * 2 * IN)}
        case "grouped":
            return own(ranks[expert // 2] * OUT) | reads_group(ranks, expert // 2)
        case "mixed":
            every = set().union(*(reads_group(ranks, group) for group in range(3)))
            return own(ranks[expert // 2] * OUT + 3) | every
        case "hashed":
            return {("value", i) for i in range(7)}
    raise AssertionError(kind)


TERMS = {
    "dense": Dense(weight=draw(EXPERTS, OUT, IN)),
    "low_rank": LowRank(left=draw(EXPERTS, OUT, 2), right=draw(EXPERTS, 2, IN)),
    "shared": Shared.build(draw(OUT, IN), experts=EXPERTS),
    "shared_basis": SharedBasis(coefficients=draw(EXPERTS, OUT, 2), bases=draw(3, 2, IN), mixing=draw(EXPERTS, 3)),
    "grouped": grouped(),
    "mixed": grouped(mixing=draw(EXPERTS, 3)),
    "hashed": Hashed.abstract((EXPERTS, OUT, IN), "float32", buckets=7, size=EXPERTS),
}


@pytest.mark.parametrize("kind", TERMS)
def test_numbers_are_the_mean_over_all_choices(kind):
    choices = list(combinations(range(EXPERTS), CHOSEN))
    read = [len(set().union(*(numbers_of(kind, expert) for expert in choice))) for choice in choices]
    assert TERMS[kind].work(CHOSEN).numbers == pytest.approx(np.mean(read))


@pytest.mark.parametrize("kind", ["dense", "low_rank", "shared_basis"])
def test_operations_are_those_of_the_products(kind):
    """Count in the products that a term asks for when it is applied to one row of each expert."""
    counted = []

    def product(rows, matrices):
        counted.append(2 * matrices.shape[1] * matrices.shape[2])
        return per_expert(rows, matrices)

    TERMS[kind].apply(draw(EXPERTS, 1, IN), product)
    assert TERMS[kind].work(CHOSEN).operations == CHOSEN * sum(counted)


def test_operations_follow_the_ranks_of_groups():
    # Of 5 experts two have rank 3, two rank 1 and the last rank 2: 10 / 5 in the mean.
    for kind in ("grouped", "mixed"):
        assert TERMS[kind].work(CHOSEN).operations == CHOSEN * 2 * 2 * (OUT + IN)


def test_what_is_materialised_costs_like_dense():
    sparse = Sparse.abstract((EXPERTS, OUT, IN), "float32", entries=3)
    for term in (sparse, TERMS["hashed"]):
        assert term.work(CHOSEN).operations == TERMS["dense"].work(CHOSEN).operations
    # A base is applied once, whatever the number of experts.
    assert TERMS["shared"].work(CHOSEN).operations == TERMS["dense"].work(1).operations


def test_all_experts_use_everything():
    for kind, term in TERMS.items():
        # Ranks and seeds are read, but no numbers of the matrices.
        stored = term.count().numbers - {"grouped": 3, "mixed": 3, "hashed": 1}.get(kind, 0)
        assert term.work(EXPERTS).numbers == pytest.approx(stored)


def test_more_experts_than_there_are():
    sizes = LayerShape(experts=EXPERTS, hidden=IN, intermediate=OUT, gated=False)
    terms = {name: (Dense.abstract(sizes.of(name), "float32"),) for name in sizes.projections}
    layer = CompressedLayer(terms=terms, sizes=sizes)
    assert layer.work(1).numbers == 2 * OUT * IN
    for chosen in (0, EXPERTS + 1):
        with pytest.raises(JaxmoeError, match=f"{chosen} experts of a token in a layer of {EXPERTS}"):
            layer.work(chosen)
