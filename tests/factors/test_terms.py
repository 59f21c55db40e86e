"""Every term: materialize against numpy, apply against materialize, count against the tensors, file layout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from shapes import unchecked

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import (
    CompressedLayer,
    Dense,
    Grouped,
    Hashed,
    LayerShape,
    LowRank,
    Merged,
    Shared,
    SharedBasis,
    Sparse,
)
from jaxmoe.factors.hashed import bucket_sizes, buckets
from jaxmoe.factors.registry import KINDS
from jaxmoe.factors.shared_basis import ACTIVATIONS

SIZES = LayerShape(experts=5, hidden=7, intermediate=4)
SHAPE = (5, 4, 7)

NUMPY = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "wavelet": lambda x: x * (1 - x**2) / (1 + x**2) ** 3,
}


ORDER = [3, 0, 4, 2, 1]
GROUP_RANKS = {1: [3, 0, 2, 1, 2], 2: [3, 1, 2], 5: [3]}
"""By the size of a group of five experts; the last group of two is shorter."""


def integers(term) -> dict[str, list]:
    """Return values for the whole numbers of an abstract term."""
    if isinstance(term, Grouped):
        return {"ranks": [GROUP_RANKS[term.size]], "order": [ORDER]}
    if isinstance(term, Shared):
        return {"kept": [[0, 2, 3][: term.kept.shape[1]] if term.kept is not None else []]}
    if isinstance(term, Hashed):
        return {"seed": [[11]], "order": [ORDER]}
    if isinstance(term, Merged):
        return {"labels": [[1, 0, 1, 2, 0]]}
    if isinstance(term, Sparse):
        return {"indices": [[3, 27, 0, 5, 6, 26, 13]], "counts": [[2, 0, 3, 1, 1]]}
    return {}


def filled(term, seed=0):
    rng = np.random.default_rng(seed)
    whole = {name: jnp.asarray(x, jnp.int32) for name, x in integers(term).items() if getattr(term, name) is not None}
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), term)
    return replace(drawn, **whole)


def terms(shape, dtype="float32"):
    return {
        "dense": Dense.abstract(shape, dtype),
        "low_rank": LowRank.abstract(shape, dtype, rank=2),
        "shared_basis": SharedBasis.abstract(shape, dtype, bases=3, rank=2, activation="silu"),
        "transposed": SharedBasis.abstract(shape, dtype, bases=3, rank=2, activation="tanh", transposed=True),
        "mean": SharedBasis.abstract(shape, dtype, bases=2, rank=3, activation="tanh", mean=True),
        "ragged": Grouped.abstract(shape, dtype, total=8, widest=3),
        "grouped": Grouped.abstract(shape, dtype, total=6, size=2, rows=10, ordered=True, widest=3),
        "grouped mixed": Grouped.abstract(
            shape, dtype, total=6, size=2, rows=10, ordered=True, mixed=True, activation="silu", widest=3
        ),
        "one group": Grouped.abstract(shape, dtype, total=3, size=5, activation="tanh", transposed=True),
        "shared": Shared.abstract(shape, dtype),
        "shared outputs": Shared.abstract(shape, dtype, kept=3),
        "shared halves": Shared.abstract(shape, dtype, kept=1, parts=2),
        "shared inputs": Shared.abstract(shape, dtype, kept=3, axis="in"),
        "hashed": Hashed.abstract(shape, dtype, buckets=9),
        "hashed groups": Hashed.abstract(shape, dtype, buckets=9, size=2, ordered=True),
        "hashed draws": Hashed.abstract(shape, dtype, buckets=5, size=2, balanced=False),
        "sparse": Sparse.abstract(shape, dtype, entries=7),
        "merged": Merged.abstract(shape, dtype, clusters=3),
    }


def oracle(term):
    """Materialise in numpy float64, expert by expert, from the formulas."""
    experts = term.shape[0]
    arrays = {name: np.asarray(value, np.float64) for name, value in vars(term).items() if hasattr(value, "shape")}
    if isinstance(term, Dense):
        return arrays["weight"]
    if isinstance(term, LowRank):
        return np.stack([arrays["left"][e] @ arrays["right"][e] for e in range(experts)])
    if isinstance(term, Grouped):
        return grouped_oracle(term)
    if isinstance(term, Shared):
        dense = np.zeros(term.shape)
        kept = range(term.out // term.parts if term.axis == "out" else term.in_)
        kept = list(kept) if term.kept is None else np.asarray(term.kept)[0].tolist()
        if term.axis == "in":
            dense[:, :, kept] = arrays["weight"]
        else:
            rows = [part * (term.out // term.parts) + channel for part in range(term.parts) for channel in kept]
            dense[:, rows] = arrays["weight"]
        return dense
    if isinstance(term, Hashed):
        return hashed_oracle(term)
    if isinstance(term, Merged):
        return np.stack([arrays["weight"][label] for label in np.asarray(term.labels)[0]])
    if isinstance(term, Sparse):
        dense = np.zeros((experts, term.out * term.in_))
        owners = np.repeat(np.arange(experts), np.asarray(term.counts)[0])
        for owner, index, value in zip(owners, np.asarray(term.indices)[0], arrays["values"][0], strict=True):
            dense[owner, index] += value
        return dense.reshape(term.shape)
    dense = []
    for e in range(experts):
        blend = sum(arrays["mixing"][e, j] * arrays["bases"][j] for j in range(len(arrays["bases"])))
        matrix = arrays["coefficients"][e] @ NUMPY[term.activation](blend)
        dense.append(matrix.T if term.transposed else matrix)
    return np.stack(dense) + (arrays["mean"] if term.mean is not None else 0)


def grouped_oracle(term: Grouped):
    """Walk through the ragged arrays, group by group and expert by expert."""
    coefficients, bases = np.asarray(term.coefficients, np.float64), np.asarray(term.bases, np.float64)
    ranks = np.asarray(term.ranks)[0]
    order = np.arange(term.experts) if term.order is None else np.asarray(term.order)[0]
    cut = np.split(bases, np.cumsum(ranks)[:-1])
    dense, first = [None] * term.experts, 0
    for position, expert in enumerate(order):
        group = position // term.size
        rank = ranks[group]
        basis = cut[group]
        if term.mixing is not None:
            basis = np.zeros((rank, bases.shape[1]))
            for other, alpha in zip(cut, np.asarray(term.mixing, np.float64)[expert]):
                shared = min(rank, len(other))
                basis[:shared] += alpha * other[:shared]
        matrix = coefficients[first : first + rank].T @ NUMPY[term.activation](basis)
        dense[expert] = matrix.T if term.transposed else matrix
        first += rank
    assert first == len(coefficients)
    return np.stack(dense)


def mixed_number(seed: int, number: int) -> int:
    """Return the hash in Python's integers."""

    def finalized(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    return finalized(number ^ finalized((seed + 0x9E3779B9) % 2**32))


def projection(entries: int, count: int, seed: int, balanced: bool):
    """Return P of a group, `[entry, bucket]`, place by place."""
    chosen = [
        (t % count + mixed_number(seed, t // count)) % count if balanced else mixed_number(seed, t) % count
        for t in range(entries)
    ]
    ones = np.zeros((entries, count))
    ones[np.arange(entries), chosen] = 1
    return ones / np.sqrt(np.maximum(ones.sum(0), 1))


def hashed_oracle(term: Hashed):
    numbers, values = term.out * term.in_, np.asarray(term.values, np.float64)[0]
    order = np.arange(term.experts) if term.order is None else np.asarray(term.order)[0]
    dense, first = np.zeros(term.shape), 0
    for start in range(0, term.experts, term.size):
        own = order[start : start + term.size]
        count = term.buckets if len(own) == term.size else term.last
        matrix = projection(len(own) * numbers, count, int(np.asarray(term.seed)[0, 0]), term.balanced)
        dense[own] = (matrix @ values[first : first + count]).reshape(len(own), term.out, term.in_)
        first += count
    assert first == len(values)
    return dense


@pytest.mark.parametrize("name", list(terms(SHAPE)))
class TestTerm:
    def test_materialize(self, name):
        term = filled(terms(SHAPE)[name])
        np.testing.assert_allclose(term.materialize(), oracle(term), atol=1e-5)
        np.testing.assert_allclose(term.materialize(slice(1, 3)), term.materialize()[1:3], atol=1e-6)
        assert term.materialize().shape == term.shape == SHAPE

    def test_apply(self, name):
        term = filled(terms(SHAPE)[name])
        rows = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float32)
        np.testing.assert_allclose(
            term.apply(jnp.asarray(rows)), np.einsum("eti,eoi->eto", rows, oracle(term)), atol=2e-5
        )
        np.testing.assert_allclose(
            jax.jit(lambda t, x: t.apply(x))(term, rows), term.apply(jnp.asarray(rows)), atol=1e-5
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_count_and_layout(self, name, dtype):
        abstract = terms(SHAPE, dtype)[name]
        term = filled(abstract)
        tensors = {key: np.asarray(value) for key, value in term.tensors().items()}
        assert all(value.ndim == 2 for value in tensors.values())
        assert term.count() == abstract.count()
        assert term.count().numbers == sum(value.size for value in tensors.values())
        assert term.count().bytes == sum(value.nbytes for value in tensors.values())
        assert {key: (x.shape, x.dtype) for key, x in abstract.tensors().items()} == {
            key: (x.shape, x.dtype) for key, x in tensors.items()
        }
        again = KINDS[term.kind].from_tensors(tensors, term.spec(), term.shape)
        assert again.spec() == term.spec() == abstract.spec()
        for old, new in zip(jax.tree.leaves(term), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))

    def test_is_a_pytree_that_differentiates(self, name):
        term = filled(terms(SHAPE)[name])
        gradient = jax.grad(lambda t: jnp.sum(t.materialize() ** 2), allow_int=True)(term)
        assert type(gradient) is type(term)
        leaves = [x for x in jax.tree.leaves(gradient) if x.dtype != jax.dtypes.float0]
        assert leaves
        assert all(bool(jnp.isfinite(x).all()) and bool(jnp.any(x != 0)) for x in leaves)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation(activation):
    term = filled(SharedBasis.abstract((5, 4, 7), "float32", bases=2, rank=3, activation=activation))
    np.testing.assert_allclose(term.materialize(), oracle(term), atol=1e-5)


@st.composite
def packed(draw):
    """Padded arrays with noise beyond the ranks, and what `Grouped.build` takes beside them."""
    experts, size = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    ranks = draw(st.lists(st.integers(0, 4), min_size=-(-experts // min(size, experts)), max_size=-(-experts // size)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    order = rng.permutation(experts) if draw(st.booleans()) else None
    mixing = rng.normal(size=(experts, len(ranks))) if draw(st.booleans()) else None
    padded = rng.normal(size=(experts, 3, 4)), rng.normal(size=(len(ranks), 4, 5))
    options = {
        "size": size,
        "order": order,
        "mixing": mixing,
        "activation": draw(st.sampled_from(["identity", "silu"])),
    }
    return padded, ranks, options


@settings(deadline=None, max_examples=15)
@given(packed())
def test_grouped_gives_back_what_it_packed(case):
    """Where ranks are traced, and also where all of them are zero; every example is a program of its own."""
    (coefficients, bases), ranks, options = case
    term = Grouped.build(coefficients.astype(np.float32), bases.astype(np.float32), ranks, **options)
    assert term.group_ranks == tuple(ranks)
    assert term.widest == max(ranks)
    order = np.arange(len(coefficients)) if options["order"] is None else options["order"]
    of_expert = np.zeros(len(order), int)
    for position, expert in enumerate(order):
        of_expert[expert] = ranks[position // term.size]
    numbers = of_expert.sum() * 3 + sum(ranks) * 5 + len(ranks)
    numbers += (options["order"] is not None) * len(order) + (options["mixing"] is not None) * len(order) * len(ranks)
    assert term.count().numbers == numbers
    read = jax.jit(lambda term: (*term.padded(), term.materialize()))
    wide, tall, dense = map(np.asarray, read(term))
    for expert, rank in enumerate(of_expert):
        np.testing.assert_array_equal(wide[expert, :, :rank], coefficients[expert, :, :rank].astype(np.float32))
        assert not wide[expert, :, rank:].any()
    for group, rank in enumerate(ranks):
        np.testing.assert_array_equal(tall[group, :rank], bases[group, :rank].astype(np.float32))
        assert not tall[group, rank:].any()
    np.testing.assert_allclose(dense, oracle(term), atol=1e-5)
    again = Grouped.build(wide, tall, ranks, **options)
    for old, new in zip(jax.tree.leaves(term), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_grouped_holds_the_other_forms():
    """One expert a group is low rank, equal ranks blended are shared bases: the same products."""
    rng = np.random.default_rng(3)
    low = filled(LowRank.abstract(SHAPE, "float32", rank=2))
    alone = Grouped.build(low.left, low.right, [2] * 5)
    np.testing.assert_allclose(alone.materialize(), low.materialize(), atol=1e-6)
    bases = filled(SharedBasis.abstract(SHAPE, "float32", bases=3, rank=2, activation="silu"))
    for order in (None, rng.permutation(5)):
        mixed = Grouped.build(
            bases.coefficients, bases.bases, [2] * 3, size=2, order=order, mixing=bases.mixing, activation="silu"
        )
        np.testing.assert_allclose(mixed.materialize(), bases.materialize(), atol=1e-6)


def test_grouped_counts_at_most_what_is_planned_where_the_last_group_is_shorter():
    planned = Grouped.abstract(SHAPE, "float32", total=6, size=2)
    exact = Grouped.abstract(SHAPE, "float32", total=6, size=2, rows=10)
    real = filled(replace(exact, widest=3))
    assert planned.count().numbers - real.count().numbers == 2 * SHAPE[1]
    assert exact.count() == real.count()
    even = Grouped.abstract((6, 4, 7), "bfloat16", total=6, size=2)
    assert even.count() == (2 * 6 * 4 + 6 * 7 + 3, 2 * (2 * 6 * 4 + 6 * 7) + 4 * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1]}, "1 ranks for 3 groups"),
        ({"ranks": [1, 4, -1]}, r"ranks \[4, -1\] outside 0 to 3"),
        ({"order": [0, 1, 2, 3, 3]}, "does not name each"),
        ({"mixing": np.ones((5, 2))}, r"mixing \(5, 2\) for 5 experts and 3 groups"),
        ({"size": 3}, r"bases \(3, 3, 6\) for 2 groups of 3 experts"),
        ({"activation": "mish"}, "unknown activation 'mish'"),
    ],
)
def test_grouped_refuses_what_does_not_fit(change, message):
    arguments = {"ranks": [1, 2, 3], "size": 2, **change}
    with unchecked(), pytest.raises(JaxmoeError, match=message):
        Grouped.build(np.ones((5, 4, 3)), np.ones((3, 3, 6)), **arguments)


def test_grouped_from_a_damaged_file():
    term = filled(terms(SHAPE)["grouped"])
    tensors = {**term.tensors(), "ranks": np.array([[3, 2, 1]], np.int32)}
    with pytest.raises(JaxmoeError, match=r"ranks \[3, 2, 1\].*do not add up.*10 of coefficients"):
        Grouped.from_tensors(tensors, term.spec(), SHAPE)
    with pytest.raises(JaxmoeError, match="not known yet"):
        _ = terms(SHAPE)["grouped"].group_ranks


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.data(), st.integers(0, 2**31 - 1), st.booleans())
def test_hash_is_one_map_with_orthonormal_columns(entries, data, seed, balanced):
    """One place in every row, the same in numpy and JAX as in whole numbers; P^T P is the identity of used buckets."""
    count = data.draw(st.integers(1, entries))
    matrix = projection(entries, count, seed, balanced)
    places = np.argmax(matrix, 1)
    arguments = np.arange(entries, dtype=np.uint32), np.array([seed], np.uint32), np.uint32(count)
    np.testing.assert_array_equal(buckets(*arguments, balanced=balanced), places)
    np.testing.assert_array_equal(buckets(*map(jnp.asarray, arguments), balanced=balanced), places)
    sizes = np.bincount(places, minlength=count)
    np.testing.assert_array_equal(bucket_sizes(entries, jnp.uint32([seed]), count, balanced=balanced), sizes)
    np.testing.assert_allclose(matrix.T @ matrix, np.diag((sizes > 0).astype(float)), atol=1e-12)
    if balanced:
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1


def test_places_of_the_hash_are_spread_evenly():
    """Runs start anywhere (chi-squared), and independent draws fill buckets like a multinomial."""
    count, runs = 16, 4000
    arguments = np.array([5], np.uint32), np.uint32(count)
    starts = buckets(np.arange(runs, dtype=np.uint32) * np.uint32(count), *arguments)
    draws = buckets(np.arange(runs, dtype=np.uint32), *arguments, balanced=False)
    for places in (starts, draws):
        expected = runs / count
        statistic = np.sum((np.bincount(places, minlength=count) - expected) ** 2 / expected)
        assert 3 < statistic < 40  # 0.1 % and 99.9 % of 15 degrees of freedom are 3.5 and 37.7


def test_shared_masks_the_channels_that_matter_least_to_the_rows():
    weight = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    whole = Shared.build(jnp.asarray(weight), experts=3, dynamic=3)
    pruned = Shared.build(jnp.asarray(weight), experts=3, kept=[0, 1, 4, 5, 7], axis="in", dynamic=2)
    for seed in range(3):
        rows = np.random.default_rng(seed).normal(size=(2, 4, 8)) * np.random.default_rng(seed + 9).exponential(size=8)
        scores = np.linalg.norm(weight, axis=0) * np.linalg.norm(rows.reshape(-1, 8), axis=0)
        alive = np.sort(np.argsort(scores)[3:])
        found = jax.jit(lambda t, x: t.apply(x))(whole, jnp.asarray(rows, jnp.float32))
        np.testing.assert_allclose(found, rows[..., alive] @ weight[:, alive].T, atol=1e-5)
        kept = np.array([0, 1, 4, 5, 7])
        alive = kept[np.argsort(scores[kept])[2:]]
        np.testing.assert_allclose(
            pruned.apply(jnp.asarray(rows, jnp.float32)), rows[..., alive] @ weight[:, alive].T, atol=1e-5
        )
    np.testing.assert_array_equal(whole.materialize()[2], weight)
    assert whole.count() == Shared.build(jnp.asarray(weight), experts=3).count()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [0, 0]}, r"kept channels \[0, 0\] are not different ones of 0 to 5"),
        ({"kept": [6]}, "not different ones of 0 to 5"),
        ({"kept": []}, "0 kept channels of 6"),
        ({"parts": 4}, "6 outputs do not fall into 4"),
        ({"axis": "both"}, "axis 'both'"),
        ({"axis": "in", "kept": [1, 2], "dynamic": 2}, "2 masked channels of 2 inputs: mask 0 to 1"),
    ],
)
def test_shared_refuses_what_does_not_fit(change, message):
    with pytest.raises(JaxmoeError, match=message):
        Shared.build(np.ones((6, 8)), experts=3, **change)


def test_hashed_refuses_what_does_not_fit():
    with pytest.raises(JaxmoeError, match=r"29 buckets .* for 28"):
        Hashed.abstract(SHAPE, "float32", buckets=29)
    with pytest.raises(JaxmoeError, match="take smaller groups"):
        Hashed.abstract((128, 4096, 4096), "float32", buckets=9, size=128)


def test_sparse_from_a_damaged_file():
    term = filled(terms(SHAPE)["sparse"])
    for change, message in (
        ({"counts": np.array([[2, 0, 3, 1, 0]], np.int32)}, "do not add up to 7"),
        ({"indices": np.full((1, 7), 28, np.int32)}, "28 to 28 lie outside matrices of 4 x 7"),
    ):
        with pytest.raises(JaxmoeError, match=message):
            Sparse.from_tensors({**term.tensors(), **change}, term.spec(), SHAPE)


def test_published_accounting():
    """Kept fraction of the MoE layer with down untouched: the six models of the MoBE paper (Table 1)."""
    published = [
        (64, 2048, 1408, 4, 0.833),
        (64, 2048, 1408, 4, 0.833),
        (128, 2048, 768, 32, 0.750),
        (128, 4096, 1536, 32, 0.750),
        (256, 7168, 2048, 64, 0.690),
        (384, 7168, 2048, 128, 0.746),
    ]
    for experts, hidden, intermediate, bases, kept in published:
        shape = (experts, intermediate, hidden)
        count = SharedBasis.abstract(shape, "bfloat16", bases=bases, rank=intermediate, activation="silu").count()
        exact = experts * intermediate**2 + bases * intermediate * hidden + experts * bases
        assert count == (exact, 2 * exact)
        dense = experts * hidden * intermediate
        assert (2 * count.numbers + dense) / (3 * dense) == pytest.approx(kept, abs=6e-4)


def layer():
    return CompressedLayer(
        sizes=SIZES,
        terms={
            "gate_up": (filled(LowRank.abstract(SIZES.of("gate_up"), "float32", rank=2)),),
            "gate": (filled(LowRank.abstract(SIZES.of("gate"), "float32", rank=1), 1),),
            "down": (
                filled(
                    SharedBasis.abstract(
                        SIZES.of("down"), "float32", bases=2, rank=3, activation="tanh", transposed=True
                    )
                ),
                filled(Dense.abstract(SIZES.of("down"), "float32"), 2),
            ),
        },
    ).check()


def test_layer_sums_its_terms():
    own = layer()
    joined, extra = oracle(own.terms["gate_up"][0]), oracle(own.terms["gate"][0])
    expected = {
        "gate": joined[:, :4] + extra,
        "up": joined[:, 4:],
        "down": oracle(own.terms["down"][0]) + oracle(own.terms["down"][1]),
    }
    rng = np.random.default_rng(5)
    for projection, dense in expected.items():
        np.testing.assert_allclose(own.materialize(projection), dense, atol=1e-5)
        rows = rng.normal(size=(5, 3, dense.shape[2])).astype(np.float32)
        (outputs,) = own.apply(jnp.asarray(rows), (projection,))
        np.testing.assert_allclose(outputs, np.einsum("eti,eoi->eto", rows, dense), atol=3e-5)


def test_layer_round_trip_and_count():
    own = layer()
    tensors = {name: np.asarray(value) for name, value in own.tensors().items()}
    assert own.count().numbers == sum(value.size for value in tensors.values())
    again = CompressedLayer.from_tensors(tensors, own.spec(), SIZES)
    for old, new in zip(jax.tree.leaves(own), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_wrong_layers_are_refused():
    good = LowRank.abstract(SIZES.of("gate_up"), "float32", rank=1)
    down = LowRank.abstract(SIZES.of("down"), "float32", rank=1)
    with pytest.raises(JaxmoeError, match="no term for down"):
        CompressedLayer(sizes=SIZES, terms={"gate_up": (good,)}).check()
    with pytest.raises(JaxmoeError, match="unknown target 'both'"):
        CompressedLayer(sizes=SIZES, terms={"both": (good,), "down": (down,)}).check()
    with pytest.raises(JaxmoeError, match="shape"):
        CompressedLayer(sizes=SIZES, terms={"gate_up": (down,), "down": (down,)}).check()
    with pytest.raises(JaxmoeError, match="unknown term 'folded'"):
        CompressedLayer.from_tensors({}, {"down": [{"kind": "folded"}]}, SIZES)


def test_bfloat16_terms_materialize_in_float32():
    term = filled(LowRank.abstract((2, 3, 4), ml_dtypes.bfloat16, rank=2))
    assert term.materialize().dtype == jnp.float32
