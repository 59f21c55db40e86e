from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense, Grouped, Hashed, LowRank, Merged, Shared, SharedBasis
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Store
from jaxmoe.methods import Evidence
from jaxmoe.methods.method import count
from jaxmoe.methods.stored_terms import HELD, abstract_terms, hold_terms
from jaxmoe.solvers.rounding import round_nearest

EXPERTS, OUT, IN = 4, 16, 32
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((EXPERTS, 64, IN)) * np.geomspace(2, 0.2, IN)
MOMENT = INPUTS.swapaxes(1, 2) @ INPUTS / 64
WEIGHT = RNG.standard_normal((EXPERTS, OUT, IN)).astype(np.float32)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)


def low_rank(rank=16):
    left, values, right = np.linalg.svd(WEIGHT)
    left = left[:, :, :rank] * values[:, None, :rank]
    return LowRank(left=jnp.asarray(left), right=jnp.asarray(right[:, :rank]))


TERMS = {
    "dense": Dense(weight=jnp.asarray(WEIGHT)),
    "merged": Merged(weight=normal(2, OUT, IN), labels=jnp.array([[0, 1, 1, 0]])),
    "shared": Shared.build(normal(OUT, 64), experts=EXPERTS, kept=range(0, 64, 2), axis="in"),
    "low_rank": low_rank(),
    "shared_basis": SharedBasis(
        coefficients=normal(EXPERTS, OUT, 16),
        bases=normal(2, 16, IN),
        mixing=normal(EXPERTS, 2),
        mean=normal(1, 1),
        activation="wavelet",
    ),
    "transposed": SharedBasis(
        coefficients=normal(EXPERTS, IN, 16),
        bases=normal(2, 16, OUT),
        mixing=normal(EXPERTS, 2),
        activation="silu",
        transposed=True,
    ),
    "grouped": Grouped.build(normal(EXPERTS, OUT, 16), normal(2, 16, IN), [16, 9], order=[2, 0, 1, 3], size=2),
    "mixed": Grouped.build(
        normal(EXPERTS, OUT, 5), normal(2, 5, IN), [5, 3], mixing=normal(EXPERTS, 2), size=2, activation="tanh"
    ),
}


def store(bits):
    return Store(bits=bits, group=16)


def nearest(weight, store, moment):
    return round_nearest(weight, store)


def gptq(**settings):
    return methods.get("gptq").settings(group=16, scale="bfloat16", search=False, refine=0, **settings)


def lost(terms, moment=MOMENT, weight=None):
    rest = np.asarray(sum(term.materialize() for term in terms), np.float64) - weight
    return float(np.einsum("eoi,eij,eoj->", rest, moment, rest))


@pytest.mark.parametrize("kind", TERMS)
def test_bytes_are_as_planned_and_left_sides_take_up_the_rounding_of_right_ones(kind):
    term, bits = TERMS[kind], np.full(EXPERTS, 3)
    original = np.asarray(term.materialize(), np.float64)
    known = Evidence(target="up", moment=None if term.shape[2] != IN else MOMENT, weight=lambda target: original)
    found, plain = (
        hold_terms((term,), bits, store, nearest, evidence=own).terms for own in (known, Evidence(target="up"))
    )
    assert count(found).bytes == count(abstract_terms((term,), bits, store)).bytes < count((term,)).bytes
    # Without an original, what the term stood for takes its place; only the moment is missing then.
    apart = {name: nearest_values(getattr(term, name)) for name in HELD[type(term)]}
    rounded = lost((replace(term, **apart),), np.eye(term.shape[2])[None], original)
    ours = lost(plain, np.eye(term.shape[2])[None], original)
    if kind in ("dense", "merged", "shared"):
        assert ours == pytest.approx(rounded)
    else:
        assert ours < 0.95 * rounded
        # Of transposed matrices the moment weighs the rows, which the solution does not see.
        assert term.shape[2] != IN or lost(found, MOMENT, original) <= lost(plain, MOMENT, original)


def nearest_values(array):
    flat = array if array.ndim == 3 else array[None]
    own = store(3).fitted(flat.shape[2])
    return round_nearest(flat, own).values(own).reshape(array.shape)


@pytest.mark.parametrize("kind", ["low_rank", "grouped"])
def test_error_feedback_reaches_right_and_left_sides(kind):
    term, bits = TERMS[kind], np.full(EXPERTS, 3)
    original = np.asarray(term.materialize(), np.float64)
    evidence = Evidence(target="up", moment=MOMENT, weight=lambda target: original)
    found, plain = (
        hold_terms((term,), bits, store, rounding, evidence=evidence).terms for rounding in (gptq().round, nearest)
    )
    assert lost(found, MOMENT, original) < 0.98 * lost(plain, MOMENT, original)


def test_each_expert_has_its_own_bits():
    bits = np.array([4, 2, 4, 3])
    (found,), _, outcomes = hold_terms((TERMS["dense"],), bits, store, nearest, evidence=Evidence(target="up"))
    assert isinstance(found.weight, MixedArray)
    assert outcomes == ()
    for expert, own in enumerate(bits):
        alone = round_nearest(WEIGHT[expert : expert + 1], store(int(own))).values(store(int(own)))
        np.testing.assert_array_equal(found.materialize(slice(expert, expert + 1)), alone)
    assert found.count() == abstract_terms((TERMS["dense"],), bits, store)[0].count()
    # What all experts share takes the bits that most have.
    (shared,) = abstract_terms((TERMS["shared_basis"],), bits, store)
    assert isinstance(shared.bases, QuantisedArray)
    assert shared.bases.store.bits == 4
    assert isinstance(shared.coefficients, MixedArray)


def test_a_left_side_is_solved_against_the_rounded_right_one():
    term = LowRank(left=jnp.ones((1, 2, 1)), right=jnp.array([[[0.5, 1.0]]]))
    weight = np.array([[[2.0, 1.0], [1.0, 3.0]]])
    evidence = Evidence(target="up", moment=np.diag([1.0, 4.0])[None], weight=lambda target: weight)
    own = lambda bits: Store(bits=bits, group=0, zero="real", scale="float32")  # noqa: E731
    (found,) = hold_terms((term,), np.array([8]), own, nearest, evidence=evidence).terms
    np.testing.assert_allclose(np.asarray(found.left.values()).ravel(), [1.17647059, 2.94117647], rtol=2e-3)
    assert lost((found,), evidence.moment, weight) == pytest.approx(2.35294118, rel=1e-3)


def test_the_last_of_a_sum_makes_up_for_the_others():
    base = Merged(weight=jnp.asarray(WEIGHT.mean(0, keepdims=True)), labels=jnp.zeros((1, EXPERTS), jnp.int32))
    term = low_rank()
    delta = LowRank(left=term.left, right=term.right)
    terms, bits = (base, delta), np.full(EXPERTS, 2)
    original = np.asarray(base.materialize() + delta.materialize(), np.float64)
    evidence = Evidence(target="up", moment=MOMENT, weight=lambda target: original)
    found = hold_terms(terms, bits, store, nearest, evidence=evidence).terms
    apart = [hold_terms((own,), bits, store, nearest, evidence=Evidence(target="up")).terms[0] for own in terms]
    assert lost(found, MOMENT, original) < 0.92 * lost(apart, MOMENT, original)


def test_rows_that_no_group_divides_and_unknown_terms_are_told():
    odd = Dense(weight=jnp.asarray(WEIGHT[:, :, :20]))
    hashed = Hashed(
        values=jnp.ones((1, 8)),
        seed=jnp.zeros((1, 1), jnp.int32),
        experts=EXPERTS,
        out=OUT,
        in_=20,
        size=EXPERTS,
        buckets=8,
        last=8,
        balanced=True,
    )
    found = hold_terms((odd, hashed), np.full(EXPERTS, 4), store, nearest, evidence=Evidence(target="up"))
    assert [own.kind for own in found.outcomes] == ["other_groups", "kept"]
    assert found.terms[0].weight.store.group == 0
    assert found.terms[1] is hashed


def test_methods_by_name():
    bits = np.full(EXPERTS, 4)
    terms = (TERMS["dense"],)
    for name in ("rtn4", "hqq4", "gptq4"):
        method = methods.get(name)
        settings = gptq(bits=4) if name == "gptq4" else method.settings(bits=4, group=16)
        fit = method.fit(terms, settings, bits, evidence=Evidence(target="up", moment=MOMENT), key=None)
        assert count(fit.terms) == count(method.abstract(terms, settings, bits))
        assert lost(fit.terms, MOMENT, WEIGHT) < 0.01 * float(np.einsum("eoi,eij,eoj->", WEIGHT, MOMENT, WEIGHT))
    unweighted = method.fit(terms, gptq(), bits, evidence=Evidence(target="up"), key=None)
    assert [own.kind for own in unweighted.outcomes] == ["unweighted"]
    assert set(methods.get("gptq").requires(gptq())) == {"intermediate_moments"}


def test_published_settings_and_refusals():
    paper = {name: methods.get(name).settings(setting="paper") for name in ("rtn", "hqq", "gptq")}
    assert [own.store(4).group for own in paper.values()] == [128, 64, 128]
    assert (paper["gptq"].scale, methods.get("gptq").settings().scale) == ("float16", "quantised")
    assert paper["hqq"].zero == "real"
    assert (paper["gptq"].damping, paper["gptq"].order, paper["gptq"].search, paper["gptq"].refine) == (
        0.01,
        False,
        False,
        0,
    )
    with pytest.raises(JaxmoeError, match="real zeros"):
        methods.get("hqq").settings(zero="integer")
    with pytest.raises(JaxmoeError, match="damping"):
        methods.get("gptq").settings(damping=-1.0)
    with pytest.raises(JaxmoeError, match="groups of -1"):
        methods.get("rtn").settings(group=-1)
