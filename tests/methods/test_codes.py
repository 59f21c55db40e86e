"""SqueezeLLM, MiLo and SliM-LLM: what is stored, in the bytes of the plan, and what each does for the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense, Grouped, LowRank, Sparse
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Store
from jaxmoe.methods.method import Evidence, count
from jaxmoe.solvers.compensation import excess_kurtosis

SHAPE = (4, 32, 128)
RNG = np.random.default_rng(0)
WEIGHT = (RNG.normal(size=SHAPE) * np.geomspace(1, 0.3, 128) * 0.02).astype(np.float32)
INPUTS = RNG.normal(size=(4, 300, 128)) * np.geomspace(2, 0.1, 128)
MOMENT = np.einsum("eti,etj->eij", INPUTS, INPUTS) / 300
FISHER = RNG.exponential(size=SHAPE)
STATISTICS = {"fisher_up": FISHER, "input_moments": 10 * MOMENT}
EVIDENCE = Evidence(
    target="up", moment=MOMENT, counts=np.full(4, 10), statistic=STATISTICS.get, weight=lambda target: WEIGHT
)
NOTHING = Evidence(target="up", weight=lambda target: WEIGHT)
DENSE = (Dense(weight=jnp.asarray(WEIGHT)),)
PLANNED = (Dense.abstract(SHAPE, "float32"),)


def fitted(name, bits, evidence=EVIDENCE, terms=DENSE, **settings):
    """Return a fit, after comparing its bytes with those of the plan."""
    method = methods.get(name)
    chosen, bits = method.settings(**settings), np.broadcast_to(bits, SHAPE[:1])
    fit = method.fit(terms, chosen, bits, evidence=evidence, key=jax.random.key(0))
    planned = method.abstract(PLANNED if terms is DENSE else terms, chosen, bits)
    assert count(fit.terms).bytes == count(planned).bytes
    return fit


def rest(fit):
    return WEIGHT - sum(np.asarray(term.materialize(), np.float64) for term in fit.terms)


def weighted(fit):
    left = rest(fit)
    return float(np.sqrt(np.einsum("eoi,eij,eoj->", left, MOMENT, left)))


@pytest.mark.parametrize("name", ["squeezellm", "milo", "slim_llm"])
def test_bits_of_each_expert(name):
    """The error falls with the bits."""
    mixed = fitted(name, [2, 3, 3, 2])
    assert isinstance(mixed.terms[0].weight, MixedArray)
    error = np.linalg.norm(np.einsum("eoi,eij->eoj", rest(mixed), np.linalg.cholesky(MOMENT)), axis=(1, 2))
    assert max(error[1:3]) < min(error[[0, 3]])


@pytest.mark.parametrize("name", ["squeezellm", "milo", "slim_llm"])
def test_improved_serves_the_inputs(name):
    aware, blind = (fitted(name, 3, evidence) for evidence in (EVIDENCE, NOTHING))
    assert weighted(aware) < 0.9 * weighted(blind)
    assert np.linalg.norm(rest(aware)) > np.linalg.norm(rest(blind))


def test_published_squeezellm():
    """Tables of rows, weighted by the gradients; the numbers that matter most stand beside, as they are."""
    fit = fitted("squeezellm", 3, setting="paper", sensitive=0.01, large=0.02)
    dense, sparse = fit.terms
    assert isinstance(sparse, Sparse)
    assert dense.weight.store == Store(bits=3, group=0, zero="none", table="row")
    numbers, matters = SHAPE[1] * SHAPE[2], FISHER.reshape(4, -1)
    for expert in range(4):
        flat = np.abs(WEIGHT[expert]).reshape(-1).copy()
        first = np.argsort(-matters[expert])[: int(0.01 * numbers)]
        flat[first] = -1
        second = np.argsort(-flat)[: int(0.02 * numbers)]
        places = np.sort(np.concatenate([first, second]))
        start = int(np.asarray(sparse.counts)[0, :expert].sum())
        np.testing.assert_array_equal(np.asarray(sparse.indices)[0, start : start + len(places)], places)
        np.testing.assert_allclose(rest(fit)[expert].reshape(-1)[places], 0, atol=1e-8)
    # Of the rest, weighted error no larger than without gradients; and these two are all that is missing.
    assert np.sum(FISHER * rest(fit) ** 2) < np.sum(
        FISHER * rest(fitted("squeezellm", 3, NOTHING, setting="paper")) ** 2
    )
    assert [own.kind for own in fitted("squeezellm", 3, NOTHING, setting="paper").outcomes] == ["no_fisher"]
    assert set(methods.get("squeezellm").requires(methods.get("squeezellm").settings(setting="paper"))) == {
        "fisher_up",
        "fisher_down",
    }


def test_squeezellm_stores_what_suits_the_rows():
    (dense,) = fitted("squeezellm", 3).terms
    assert dense.weight.store == Store(bits=3, zero="none", table="matrix", scale="quantised")
    method = methods.get("squeezellm")
    long = method.abstract((Dense.abstract((2, 8, 1024), "bfloat16"),), method.settings(), np.array([3, 3]))
    assert long[0].weight.store.table == "row"
    # Factors have tables under scales, in both settings, and nothing kept apart.
    factors = (
        LowRank(left=jnp.asarray(WEIGHT[:, :, :64]), right=jnp.asarray(RNG.normal(size=(4, 64, 128)), jnp.float32)),
    )
    for setting in ("paper", "improved"):
        (term,) = fitted("squeezellm", 4, NOTHING, factors, setting=setting).terms
        assert isinstance(term.right, QuantisedArray)
        assert term.right.store.table == "matrix"


def test_published_milo():
    """Ranks in proportion to 2^kurtosis, codes of HQQ, factors of 3 bits."""
    heavy = RNG.normal(size=SHAPE).astype(np.float32)
    heavy[1] *= RNG.exponential(size=SHAPE[1:])
    terms = (Dense(weight=jnp.asarray(heavy)),)
    method = methods.get("milo")
    settings = method.settings(setting="paper", rank=4, rounds=2)
    dense, compensators = method.fit(terms, settings, np.full(4, 3), evidence=EVIDENCE).terms
    kurtosis = excess_kurtosis(heavy)
    assert kurtosis[1] > 1 > max(kurtosis[[0, 2, 3]])
    assert compensators.group_ranks == (0, 16, 0, 0)
    assert dense.weight.store == Store(bits=3, zero="real", scale="float16")
    assert {compensators.coefficients.store.bits, compensators.bases.store.bits} == {3}
    alone = method.fit(
        terms, method.settings(setting="paper", rank=1, rounds=0), np.full(4, 3), evidence=EVIDENCE
    ).terms
    left, right = (
        np.linalg.norm(heavy[1] - sum(np.asarray(x.materialize())[1] for x in own))
        for own in (alone, (dense, compensators))
    )
    assert right < left
    # As published, rank 16 in the mean, but no more than what a matrix stores itself.
    planned = method.abstract(PLANNED, method.settings(setting="paper"), np.full(4, 3))[1]
    assert planned.bases.shape[0] == 4 * 16
    assert method.abstract(PLANNED, method.settings(rank=99), np.full(4, 3))[1].bases.shape[0] == 4 * 25


def test_compensators_take_off_error_and_the_report_weighs_them_against_bits():
    fit = fitted("milo", 2, rank=3)
    _, compensators = fit.terms
    assert isinstance(compensators, Grouped)
    assert sum(compensators.group_ranks) == 12
    plain = fitted("gptq", 2, refine=0)
    assert weighted(fit) < 0.95 * weighted(plain)
    assert all(outcome.kind == "bits_instead" for outcome in fit.outcomes)
    assert fitted("milo", 8, NOTHING, rounds=0).outcomes == ()
    noise = (Dense(weight=jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)),)
    (outcome,) = fitted("milo", 2, NOTHING, terms=noise).outcomes
    assert "bits more in the codes" in outcome.detail


@pytest.mark.parametrize("bits", [2, 3])
def test_shifted_bits_cost_no_bytes(bits):
    """As many blocks go up as down; with all bits at the mean, the bytes are the same and the error is larger."""
    (dense,) = fitted("slim_llm", bits).terms
    widths = {part.store.bits: part.shape[0] for part in dense.weight.parts}
    assert sum(widths.values()) == 8
    assert widths[bits - 1] == widths[bits + 1] > 0
    assert {part.store.zero for part in dense.weight.parts} == {"real" if bits == 2 else "integer"}
    uniform = Dense(weight=QuantisedArray.abstract((8, 32, 64), dense.weight.parts[0].store))
    order = 8 * 4
    per_bit = 8 * 32 * 64 // 8 + (0 if bits == 2 else 8 * 32 // 8)
    assert dense.count().bytes - order == uniform.count().bytes + per_bit
    plain = fitted("gptq", bits, refine=0, **({"zero": "real"} if bits == 2 else {}))
    assert weighted(fitted("slim_llm", bits)) < 0.9 * weighted(plain)


def test_rows_that_are_too_narrow_keep_their_bits():
    fit = fitted("slim_llm", 3, setting="paper")
    assert isinstance(fit.terms[0].weight, QuantisedArray)
    (outcome,) = fit.outcomes
    assert outcome.kind == "no_shifts"
    assert "[32, 128] have no groups of 128" in outcome.detail
    wide = fitted("slim_llm", 3, setting="paper", group=32)
    shifted = {part.store.bits: part.shape[0] for part in wide.terms[0].weight.parts}
    assert shifted.get(2, 0) == shifted.get(4, 0)
    assert sum(shifted.values()) == 16


def test_what_cannot_be_done_is_named():
    factors = (LowRank.abstract(SHAPE, "float32", rank=3),)
    for name in ("milo", "slim_llm"):
        method = methods.get(name)
        with pytest.raises(JaxmoeError, match="not of low_rank: behind it take gptq"):
            method.abstract(factors, method.settings(), np.full(4, 3))
    for name, wrong in (
        ("squeezellm", {"large": 0.7}),
        ("squeezellm", {"refine": -1}),
        ("milo", {"rank": 0}),
        ("milo", {"factor_bits": 11}),
        ("slim_llm", {"group": 48}),
        ("slim_llm", {"bits": 9}),
    ):
        with pytest.raises(JaxmoeError, match=str(next(iter(wrong.values())))):
            methods.get(name).settings(**wrong)
