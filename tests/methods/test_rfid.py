"""RFID-MoE against numpy in float64: who gets which rank, what is stored, and how much of the experts it loses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from crossing import crossed
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_plan

from jaxmoe import Checkpoint, methods
from jaxmoe.allocation import water_fill
from jaxmoe.compression.engine import check_statistics
from jaxmoe.compression.factor import Factor
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Grouped, Hashed, LayerShape, Sparse
from jaxmoe.methods import Evidence
from jaxmoe.methods.method import count
from jaxmoe.methods.rfid import RFIDSettings, choose_ranks
from jaxmoe.scores import effective_rank
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.group_spectra import group_energies
from jaxmoe.solvers.grouped_bases import group

RFID = methods.get("rfid")
E, F, D = 10, 6, 20
SHAPE = LayerShape(experts=E, hidden=D, intermediate=F)
COUNTS = np.array([3, 40, 7, 7, 0, 90, 12, 1, 25, 7])
"""Ties, an expert that nobody chose, and 10 experts: in groups of four the last has two."""
CLOSED: dict = {"setting": "paper", "mixing": "none"}
"""The paper's ranks and residual without its long descent."""


def drawn(shape=(E, F, D), seed=0):
    """Experts whose spectra decay at unequal pace, so that groups have unequal information."""
    rng = np.random.default_rng(seed)
    decay = np.geomspace(1, np.geomspace(0.9, 0.05, shape[0]), shape[2]).T[:, None]
    return (0.02 * rng.normal(size=shape) * decay).astype(np.float32)


WEIGHT = drawn()


def fitted(target="gate", weight=WEIGHT, *, kept=0.7, level=None, counts=COUNTS, moment=None, dtype="float32", **given):
    """Return a fit, the template that it filled and its settings."""
    chosen = RFIDSettings(**given)
    experts, out, in_ = weight.shape
    sizes = LayerShape(experts, in_, out // 2 if target == "gate_up" else out)
    slot = RFID.slot(target, sizes, np.dtype(dtype), chosen, kept, weighted=moment is not None)
    ladder = slot.ladder()
    template = slot.at(ladder.floor(kept * ladder.dense) if level is None else level)
    evidence = Evidence(target=target, counts=counts, moment=moment)
    fit = RFID.fit(jnp.asarray(weight), template, chosen, evidence=evidence, key=jax.random.key(3))
    return fit, template, chosen


def kinds(fit):
    return [outcome.kind for outcome in fit.outcomes]


def shared_out(weight=WEIGHT, *, kept=0.7, level=None, counts=COUNTS, **given):
    """Return ranks alone, without the fit that a compiler would see anew for each: ranks, total, budget, outcomes."""
    chosen = RFIDSettings(**(CLOSED | given))
    sizes = LayerShape(weight.shape[0], weight.shape[2], weight.shape[1])
    slot = RFID.slot("gate", sizes, np.dtype("float32"), chosen, kept)
    template = slot.at(slot.ladder().floor(kept * weight.size) if level is None else level)
    grouping = group(weight, np.argsort(-counts, kind="stable"), size=template[0].size)
    ranks, outcomes = choose_ranks(grouping, counts.astype(float), template, chosen)
    return tuple(ranks.tolist()), template[0].bases.shape[0], slot.ladder().step, outcomes


def blocks(counts, size):
    """The experts' numbers group by group, most frequent first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def energies(weight, members):
    return np.linalg.svd(np.concatenate(weight[members].astype(np.float64)), compute_uv=False) ** 2


def information(weight, members):
    shares = energies(weight, members)
    shares = shares / shares.sum() if shares.any() else np.ones(1)
    return np.exp(-sum(q * np.log(q) for q in shares if q > 0))


def importance(weight, counts, size, xi):
    own = blocks(counts, size)
    density = np.array([information(weight, members) for members in own])
    frequency = np.array([counts[members].sum() for members in own], np.float64)
    frequency = frequency / frequency.sum() if frequency.any() else np.full(len(own), 1 / len(own))
    return xi * density / density.sum() + (1 - xi) * frequency


def dense(terms):
    return sum(np.asarray(term.materialize(), np.float64) for term in terms)


def squared(x):
    return float(np.sum(np.square(np.asarray(x, np.float64))))


@pytest.mark.parametrize("size", [1, 4, 10])
def test_information_of_groups_is_that_of_their_singular_values(size):
    order = np.argsort(-COUNTS, kind="stable")
    found = effective_rank(group_energies(jnp.asarray(WEIGHT)[order], size=size))
    expected = [information(WEIGHT, members) for members in blocks(COUNTS, size)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("xi", "kept", "size"), crossed([None, 0.0, 0.4, 1.0], [0.5, 0.8], [2, 4]))
def test_published_ranks_are_equation_13(size, kept, xi):
    ranks, total, _, outcomes = shared_out(kept=kept, xi=xi, group=size)
    wanted = total * importance(WEIGHT, COUNTS, size, (0.8 if kept == 0.8 else 0.7) if xi is None else xi)
    assert (abs(wanted - np.round(wanted)) > 1e-3).all() or xi == 0, "single precision decides: choose another seed"
    floors = np.maximum(1, np.floor(wanted + 1e-9)).astype(int)
    caps = np.minimum(D, [len(members) * F for members in blocks(COUNTS, size)])
    assert ranks == tuple(np.minimum(floors, caps))
    assert [outcome.kind for outcome in outcomes] == ["capped_ranks"] * bool((floors > caps).any())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=E, max_size=E), st.sampled_from([0.45, 0.6, 0.8]), st.floats(0, 1))
def test_exact_ranks_spend_the_budget(counts, kept, xi):
    counts = np.array(counts)
    ranks, total, step, _ = shared_out(kept=kept, xi=xi, counts=counts, paper_exact=False)
    members = [len(group) for group in blocks(counts, 4)]
    costs = np.array([m * F + D for m in members])
    left = total * step - costs @ ranks
    open_costs = [cost for cost, m, rank in zip(costs, members, ranks) if rank < min(m * F, D)]
    assert left >= 0
    assert not open_costs or left < min(open_costs)
    assert min(ranks) >= 1


def test_information_alone_ignores_how_often_and_frequency_alone_is_in_proportion():
    steeper = np.square(COUNTS)
    both = [shared_out(xi=1.0, counts=counts)[0] for counts in (COUNTS, steeper)]
    assert both[0] == both[1]
    mixed = [shared_out(xi=0.5, counts=counts)[0] for counts in (COUNTS, steeper)]
    assert mixed[0] != mixed[1]
    counts = np.array([30, 30, 30, 20, 20, 20, 10, 10])
    ranks, total, _, _ = shared_out(drawn((8, F, 40)), xi=0.0, group=2, counts=counts, kept=0.5)
    np.testing.assert_array_equal(ranks, np.floor(total * np.array([60, 50, 40, 20]) / 170))


@pytest.mark.parametrize("exact", [True, False])
def test_a_group_that_nobody_chose_has_a_rank(exact):
    counts = np.array([0, 0, 9, 9, 9, 9, 9, 9])
    ranks, total, _, _ = shared_out(drawn((8, F, D)), counts=counts, xi=0.0, level=8, paper_exact=exact, group=2)
    assert total == 8
    assert ranks == ((2, 2, 2, 1) if exact else (3, 2, 2, 1))


@pytest.mark.parametrize("size", [4, 20])
def test_groups_of_their_own_lose_the_tails_of_their_spectra(size):
    """Without mixing the optimum is Eckart and Young's: nothing at full rank, never more at a larger rank."""
    own = blocks(COUNTS, size)
    lost = []
    for level in (2 * len(own), 100 * len(own)):
        fit, _, _ = fitted(level=level, group=size, paper_exact=False, residual="none", **CLOSED)
        ranks = fit.terms[0].group_ranks
        assert len(ranks) == len(own)
        difference = dense(fit.terms) - WEIGHT
        for rank, members in zip(ranks, own):
            tail = energies(WEIGHT, members)[rank:].sum()
            assert squared(difference[members]) == pytest.approx(tail, rel=1e-3, abs=1e-9 * squared(WEIGHT))
        lost.append(squared(difference))
    assert lost[0] > lost[1]
    assert ranks == tuple(min(D, len(members) * F) for members in own)
    # Materialised experts stand where the originals do, whatever the order of their groups.
    np.testing.assert_allclose(dense(fit.terms), WEIGHT, atol=1e-5)


def test_mixing_with_equal_ranks_is_the_published_basis_learning_bit_for_bit():
    rng = np.random.default_rng(5)
    half = drawn((4, F, D))
    # The second group is the first with permuted columns: both carry the same information.
    counts = np.array([70, 60, 50, 40, 30, 20, 10, 5])[place := rng.permutation(8)]
    weight = np.concatenate([half, half[:, :, rng.permutation(D)]])[place]
    order = np.argsort(-counts, kind="stable")
    options = {"setting": "paper", "steps": 60, "xi": 1.0, "paper_exact": False, "residual": "none"}
    fit, _, _ = fitted(weight=weight, counts=counts, level=10, **options)
    (term,) = fit.terms
    assert term.group_ranks == (5, 5)
    assert not np.array_equal(order, np.arange(8))
    plain = learn_basis(jnp.asarray(weight)[order], bases=2, rank=5, steps=60, key=jax.random.key(3))
    coefficients, bases = term.padded()
    np.testing.assert_array_equal(np.asarray(coefficients)[order], plain.coefficients)
    np.testing.assert_array_equal(bases, plain.bases)
    np.testing.assert_array_equal(np.asarray(term.mixing)[order], plain.mixing)
    np.testing.assert_array_equal(fit.losses, plain.losses)
    assert fit.losses[-1] < fit.losses[0]


@pytest.mark.parametrize("setting", ["paper", "improved"])
def test_blends_of_unequal_bases_are_equation_14(setting):
    function = {
        "paper": lambda x: x / (1 + np.exp(-x)),
        "improved": lambda x: x * (1 - x**2) / (1 + x**2) ** 3,
    }[setting]
    fit, _, _ = fitted(setting=setting, group=4, xi=0.2, steps=30, residual="none", kept=0.55)
    (term,) = fit.terms
    ranks, order = term.group_ranks, np.asarray(term.order)[0]
    assert len(set(ranks)) > 1
    bases = np.zeros((3, max(ranks), D))
    stored = np.split(np.asarray(term.bases, np.float64), np.cumsum(ranks)[:-1])
    for basis, own in zip(bases, stored):
        basis[: len(own)] = own
    rows = np.split(np.asarray(term.coefficients, np.float64), np.cumsum(np.repeat(ranks, 4)[:E])[:-1])
    expected = np.zeros((E, F, D))
    for place, expert in enumerate(order):
        blended = np.tensordot(np.asarray(term.mixing, np.float64)[expert], bases, 1)
        expected[expert] = rows[place].T @ function(blended[: ranks[place // 4]])
    np.testing.assert_allclose(term.materialize(), expected, atol=1e-6)
    # Rows beyond the ranks contribute nothing at all.
    wider = replace(term, widest=term.widest + 5)
    np.testing.assert_array_equal(wider.materialize(), term.materialize())
    if setting == "improved":
        lost = squared(expected - WEIGHT) / squared(WEIGHT)
        assert lost == pytest.approx(float(np.min(fit.losses)), rel=0.02)


@pytest.mark.parametrize(
    ("setting", "residual", "dtype"),
    [
        ("paper", "hash", "float32"),
        ("paper", "topk", ml_dtypes.bfloat16),
        ("improved", "hash", ml_dtypes.bfloat16),
        ("improved", "topk", "float32"),
    ],
)
def test_a_residual_never_increases_the_error(setting, residual, dtype):
    options = {"setting": setting, "mixing": "none", "residual_fraction": 0.1, "group": 4, "dtype": dtype}
    fit, template, _ = fitted(residual=residual, **options)
    grouped, rest = fit.terms
    assert isinstance(rest, {"hash": Hashed, "topk": Sparse}[residual])
    before, after = squared(WEIGHT - dense([grouped])), squared(WEIGHT - dense(fit.terms))
    taken = squared(rest.materialize())
    assert after < before
    assert after == pytest.approx(before - taken, rel=1e-5 if dtype == "float32" else 1e-3)
    assert rest.count() == template[1].count()


def test_the_largest_entries_take_exactly_their_energy():
    fit, template, _ = fitted(residual="topk", residual_fraction=0.2, **CLOSED)
    grouped, sparse = fit.terms
    left = np.asarray(WEIGHT - grouped.materialize(), np.float64)
    entries = int(0.2 * E * F * D - E) // 2
    largest = np.sort(np.square(left).ravel())[-entries:]
    assert sparse.values.shape == (1, entries)
    assert squared(sparse.values) == pytest.approx(largest.sum(), rel=1e-6)
    assert squared(left - dense([sparse])) == pytest.approx(squared(left) - largest.sum(), rel=1e-6)
    assert sparse.count().numbers == 2 * entries + E <= 0.2 * E * F * D
    assert template[1].count() == sparse.count()


@pytest.mark.parametrize(
    ("setting", "mixing", "residual", "size"),
    [
        ("paper", "padded", "hash", 4),
        ("paper", "none", "hash", 5),
        ("paper", "none", "topk", 4),
        ("improved", "padded", "topk", 4),
        ("improved", "none", "hash", 3),
        ("improved", "none", "none", 5),
    ],
)
def test_stored_numbers_are_those_of_the_publication_and_all_small_ones(setting, mixing, residual, size):
    fit, template, _ = fitted(
        setting=setting, mixing=mixing, residual=residual, group=size, steps=0, xi=0.9, kept=0.8, residual_fraction=0.1
    )
    own = blocks(COUNTS, size)
    groups, ranks = len(own), fit.terms[0].group_ranks
    numbers = sum(len(members) * F * rank + rank * D for members, rank in zip(own, ranks))
    numbers += groups + E + (E * groups if mixing == "padded" else 0)
    buckets = round(0.1 * size * F * D)
    last = max(1, buckets * len(own[-1]) // size)
    numbers += {
        "none": 0,
        "hash": (groups - 1) * buckets + last + 1 + E,
        "topk": 2 * (int(0.1 * E * F * D - E) // 2) + E,
    }[residual]
    stored = sum(array.size for term in fit.terms for array in term.tensors().values())
    assert stored == count(fit.terms).numbers == numbers
    assert stored <= count(template).numbers <= 0.8 * WEIGHT.size
    if mixing == "padded":
        assert "not_fitted" in kinds(fit)


def test_gate_and_up_share_the_order():
    gate, _, _ = fitted("gate", **CLOSED)
    up, _, _ = fitted("up", drawn(seed=1), **CLOSED)
    expected = np.argsort(-COUNTS, kind="stable")
    for fit in (gate, up):
        for term in fit.terms:
            np.testing.assert_array_equal(term.order, expected[None])


@pytest.mark.parametrize(("removed", "total"), [(0.2, 30_276), (0.4, 22_412), (0.6, 14_548)])
def test_ranks_of_a_published_model(removed, total):
    """Qwen3-30B-A3B: the sum of ranks as published counts no order, no ranks and no seed, which cost part of a rank."""
    sizes = LayerShape(experts=128, hidden=2048, intermediate=768)
    ladder = RFID.slot("gate", sizes, np.dtype(ml_dtypes.bfloat16), RFIDSettings(setting="paper"), 1 - removed).ladder()
    experts, groups, buckets = 128, 32, 188_744
    assert ladder.step == 4 * 768 + 2048
    budget = round((1 - removed) * experts * 768 * 2048)
    before = budget - groups * buckets - experts * groups
    assert before // ladder.step == total
    # The groups' ranks, the order of the experts in both terms, and the seed of the hash.
    small = groups + 2 * experts + 1
    assert ladder.fixed == groups * buckets + experts * groups + small
    assert ladder.floor(budget) == (before - small) // ladder.step
    assert total - ladder.floor(budget) == (1 if before % ladder.step < small else 0)


@pytest.mark.parametrize("setting", ["paper", "improved"])
def test_settings_and_targets(setting):
    chosen = RFIDSettings(setting=setting)
    assert list(RFID.targets(SHAPE, chosen)) == (["gate", "up"] if setting == "paper" else ["gate_up", "down"])
    assert (chosen.group, chosen.residual, chosen.paper_exact, chosen.balanced, chosen.activation) == (
        (4, "hash", True, False, "silu") if setting == "paper" else (None, "none", False, True, "wavelet")
    )
    assert set(RFID.requires(chosen)) == ({"counts"} if setting == "paper" else set())


@pytest.mark.parametrize(("kept", "xi"), [(0.8, 0.8), (0.7, 0.8), (0.65, 0.7)])
def test_weight_of_the_information_follows_the_ratio(kept, xi):
    """A ratio of 0.3 counts as up to 30 % though whole ranks remove a little more."""
    weight = drawn((8, 16, 48))
    counts = np.geomspace(300, 2, 8).astype(int)
    options = {"counts": counts, "kept": kept, "group": 2, "residual": "none"}
    by_rule, total, step, _ = shared_out(weight, **options)
    assert total * step < kept * weight.size
    given = {x: shared_out(weight, xi=x, **options)[0] for x in (0.7, 0.8)}
    assert given[0.7] != given[0.8]
    assert by_rule == given[xi]


def moments(size, seed=2):
    inputs = np.random.default_rng(seed).normal(size=(E, 60, size)) * np.geomspace(3, 0.05, size)
    return np.einsum("eti,etj->eij", inputs, inputs) / 60


def test_the_published_method_takes_nothing_but_counts_from_calibration():
    plain, _, _ = fitted(setting="paper", steps=20)
    known, _, _ = fitted(setting="paper", steps=20, moment=moments(D))
    for one, other in zip(jax.tree.leaves(plain.terms), jax.tree.leaves(known.terms), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("target", "mixing"), [("gate_up", "none"), ("down", "none"), ("down", "padded")])
def test_improved_ranks_are_the_water_level_of_weighted_spectra(mixing, target):
    weight = drawn((E, 2 * F, D)) if target == "gate_up" else np.swapaxes(drawn(), 1, 2)
    weight = weight * np.geomspace(1, 4, E, dtype=np.float32)[:, None, None]
    moment = moments(weight.shape[2])
    sizes = {"gate_up": LayerShape(E, D, F), "down": LayerShape(E, D, F)}[target]
    chosen = RFIDSettings(mixing=mixing, group=3, steps=5)
    slot = RFID.slot(target, sizes, np.dtype("float32"), chosen, 0.6, weighted=True)
    template = slot.at(slot.ladder().floor(0.6 * weight.size))
    evidence = Evidence(target=target, counts=COUNTS, moment=moment)
    fit = RFID.fit(jnp.asarray(weight), template, chosen, evidence=evidence, key=jax.random.key(0))
    term = fit.terms[0]
    own = blocks(COUNTS, 3)
    spectra, costs, caps = [], [], []
    for members in own:
        if term.transposed:
            stacked = [np.linalg.cholesky(moment[e]).T @ weight[e].T.astype(np.float64) for e in members]
            spectrum = np.linalg.svd(np.concatenate(stacked), compute_uv=False) ** 2
        else:
            root = np.linalg.cholesky(moment[members].mean(0))
            spectrum = np.linalg.svd(np.concatenate(weight[members].astype(np.float64)) @ root, compute_uv=False) ** 2
        rows, columns = weight.shape[1:][:: -1 if term.transposed else 1]
        costs.append(len(members) * rows + columns)
        spectra.append(spectrum)
        caps.append(len(spectrum) if mixing == "none" else min(rows, columns))
    ranks = np.array(term.group_ranks)
    budget = count(template).numbers - (count(fit.terms).numbers - int(np.dot(costs, ranks)))
    expected, _ = water_fill(spectra, costs, budget, minimum=1, caps=caps)
    np.testing.assert_array_equal(ranks, expected)
    assert len(set(ranks)) > 1


def test_published_ranks_on_demand_where_moments_are_known():
    options = {"level": 15, "mixing": "none", "group": 4, "paper_exact": True, "moment": moments(D)}
    fit, _, _ = fitted("gate_up", drawn((E, 2 * F, D)), **options)
    assert sum(fit.terms[0].group_ranks) <= 15
    named, _, _ = fitted("gate_up", drawn((E, 2 * F, D)), xi=0.7, **options)
    assert fit.terms[0].group_ranks == named.terms[0].group_ranks


def test_without_any_counts_all_are_as_frequent_and_it_is_said():
    zero, _, _ = fitted(counts=np.zeros(E, int), xi=0.0, paper_exact=False, **CLOSED)
    none, _, _ = fitted(counts=None, xi=0.0, paper_exact=False, **CLOSED)
    for fit in (zero, none):
        assert kinds(fit) == ["uniform_frequency"]
        assert max(fit.terms[0].group_ranks) - min(fit.terms[0].group_ranks) <= 1
        np.testing.assert_array_equal(fit.terms[0].order, np.arange(E)[None])


@pytest.mark.parametrize("residual", ["hash", "topk"])
def test_a_residual_of_less_than_a_number_is_off_and_it_is_said(residual):
    fit, template, _ = fitted(residual=residual, residual_fraction=1e-4, **CLOSED)
    assert kinds(fit) == ["no_residual"]
    assert len(template) == len(fit.terms) == 1


@pytest.mark.parametrize(
    ("setting", "mixing"), [("paper", "none"), pytest.param("improved", "padded", marks=pytest.mark.slow)]
)
def test_zeros_stay_zeros(setting, mixing):
    fit, _, _ = fitted(weight=np.zeros_like(WEIGHT), setting=setting, mixing=mixing, residual="hash", steps=5)
    assert not dense(fit.terms).any()


def test_a_group_of_zeros_has_an_effective_rank_of_one():
    weight = drawn((8, F, D))
    weight[:4] = 0
    ranks, total, _, _ = shared_out(weight, counts=np.arange(8, 0, -1), xi=1.0)
    share = 1 / (1 + information(weight, np.arange(4, 8)))
    assert ranks[0] == max(1, int(total * share))


def test_groups_larger_than_the_layer_are_one():
    slots = [RFID.slot("gate", SHAPE, "float32", RFIDSettings(group=size, **CLOSED), 0.5) for size in (E, 64)]
    assert slots[0].ladder() == slots[1].ladder()
    for term in slots[1].at(7):
        assert term.size == E
    assert shared_out(group=64, level=7)[0] == (7,)


def test_ranks_beyond_the_matrices_are_capped_and_it_is_said():
    counts = np.array([0] * 6 + [50] * 4)
    fit, template, _ = fitted(counts=counts, xi=0.0, kept=0.9, **CLOSED)
    assert kinds(fit) == ["capped_ranks"]
    total = template[0].bases.shape[0]
    assert total > D
    (outcome,) = fit.outcomes
    assert f"{total} of group 0" in outcome.detail
    assert f"{total - D} ranks unspent" in outcome.detail
    assert fit.terms[0].group_ranks == (D, 1, 1)


def test_floors_beyond_the_budget_are_refused_with_the_mend():
    counts = np.array([50] * 4 + [0] * 6)
    with pytest.raises(JaxmoeError, match="paper_exact=false"):
        fitted(counts=counts, xi=0.0, level=6, **CLOSED)
    fit, _, _ = fitted(counts=counts, xi=0.0, level=6, paper_exact=False, **CLOSED)
    assert fit.terms[0].group_ranks == (4, 1, 1)


def test_what_cannot_be_planned_names_the_range_and_what_is_missing_the_mend(tmp_path):
    checkpoint = Checkpoint.open(plain_checkpoint.write(tmp_path / "source"))
    paper = RFID.settings(setting="paper")
    with pytest.raises(JaxmoeError, match=r"out of reach for rfid.*of touched.*of experts.*of model") as error:
        make_plan(checkpoint, RFID, paper, ratio=0.95, of="touched")
    least, most = (float(word) for word in str(error.value).split("remove ")[1].split(" of touched")[0].split(" to "))
    assert make_plan(checkpoint, RFID, paper, ratio=round(most - 0.001, 3), of="touched").sizes.removed()
    with pytest.raises(JaxmoeError, match="out of reach"):
        make_plan(checkpoint, RFID, paper, ratio=round(most + 0.002, 3), of="touched")
    assert least < 0.1
    with pytest.raises(JaxmoeError, match=r"rfid.*no statistics.*--text or --statistics.*--setting improved"):
        check_statistics(Factor(method=RFID, settings=paper), None)
    check_statistics(Factor(method=RFID, settings=RFID.settings()), None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"setting": "best"},
        {"group": 0},
        {"xi": 1.2},
        {"xi": -0.1},
        {"mixing": "some"},
        {"residual": "all"},
        {"residual_fraction": 0.6},
        {"activation": "sigmoid"},
        {"steps": -1},
        {"patience": 0},
    ],
)
def test_wrong_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(JaxmoeError, match=f"{name}.*{value}"):
        RFIDSettings(**wrong)


def test_abstract_and_real_terms_agree():
    """What a plan counts is what a fit of equal groups stores; a shorter last group stores at most as much."""
    fit, template, _ = fitted(weight=drawn((8, F, D)), counts=np.arange(8), paper_exact=False, **CLOSED)
    assert count(fit.terms) == count(template)
    for abstract, term in zip(template, fit.terms):
        assert type(abstract) is type(term)
        assert isinstance(term, Grouped | Hashed)
        assert {n: x.dtype for n, x in term.tensors().items()} == {n: x.dtype for n, x in abstract.tensors().items()}
