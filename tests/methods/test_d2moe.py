"""D²-MoE against numpy in float64: bases, deviations, pruning, accounting, and what happens at the edges."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from crossing import crossed
from planned import make_plan

from jaxmoe import Checkpoint, methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Grouped, LayerShape, LowRank, Shared
from jaxmoe.methods import Evidence
from jaxmoe.methods.d2moe import D2MOE, D2MoESettings
from jaxmoe.methods.method import count
from jaxmoe.methods.published_size import published_keep
from jaxmoe.model.experts import run_experts
from jaxmoe.model.spec import Gate
from jaxmoe.solvers.merging import merge, regmean, ties
from jaxmoe.solvers.second_moment import expert_moments
from jaxmoe.solvers.shared_right import shared_right

SHAPE = LayerShape(experts=5, hidden=14, intermediate=10)
COUNTS = np.array([40, 30, 5, 60, 25])
PAPER = {"setting": "paper", "sparsity": 0.0}
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.normal(size=SHAPE.of(name)).astype(np.float32) for name in SHAPE.projections}
"""Experts with nothing in common."""


def related(spread=0.4):
    """Return experts around a common matrix."""
    rng = np.random.default_rng(1)
    return {
        name: (rng.normal(size=SHAPE.of(name)[1:]) + spread * weight).astype(np.float32)
        for name, weight in WEIGHTS.items()
    }


def sums(counts, side, seed):
    """Return sums of x x' over the tokens of every expert, each with inputs of its own."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(z, side)) * rng.permutation(np.geomspace(3, 0.1, side)) for z in counts]
    return np.stack([x.T @ x for x in rows])


def statistics(counts=COUNTS, **changes):
    rng = np.random.default_rng(2)
    found = {
        "input_moments": sums(counts, SHAPE.hidden, 3),
        "intermediate_moments": sums(counts, SHAPE.intermediate, 4),
        **{f"fisher_{name}": 1e-9 * rng.normal(size=SHAPE.of(name)) ** 2 for name in SHAPE.projections},
    }
    return {**found, **changes}


def stacked(weights, target):
    return np.concatenate([weights["gate"], weights["up"]], axis=1) if target == "gate_up" else weights[target]


def moments_of(found, target):
    return found["intermediate_moments" if target == "down" else "input_moments"]


def fitted(target, weights=WEIGHTS, *, level, found=None, counts=COUNTS, dtype="float32", **settings):
    """Fit one target with everything that a calibration knows."""
    chosen = D2MoESettings(**settings)
    assert target in D2MOE.targets(SHAPE, chosen)
    found = statistics(counts) if found is None else found
    moment = expert_moments(moments_of(found, target), counts) if np.sum(counts) else None
    evidence = Evidence(
        target=target,
        moment=moment,
        counts=counts,
        statistic=found.get,
        weight=lambda name: stacked(weights, name),
    )
    template = D2MOE.slot(target, SHAPE, np.dtype(dtype), chosen, 0.5, weighted=True).at(level)
    fit = D2MOE.fit(jnp.asarray(stacked(weights, target)), template, chosen, evidence=evidence)
    assert count(fit.terms).numbers <= count(template).numbers
    assert count(fit.terms).bytes <= count(template).bytes
    return fit


def dense(terms):
    return sum(np.asarray(term.materialize(), np.float64) for term in terms)


def kinds(fit):
    return [outcome.kind for outcome in fit.outcomes]


def cholesky_form(delta, moment, rank):
    """Return the published approximation: the SVD of D S, S S' = C, times the inverse of S, and its singular values."""
    factor = np.linalg.cholesky(moment)
    u, s, v = np.linalg.svd(delta @ factor)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(factor), s


def average(weight, say):
    return (say * weight.astype(np.float64)).sum(0) / say.sum(0)


def network(x, chosen, weights, matrices):
    """Run tokens through their experts in float64, one at a time."""
    out = np.zeros((len(x), SHAPE.hidden))
    for t, row in enumerate(x):
        for e, w in zip(chosen[t], weights[t]):
            gate, up = matrices["gate"][e] @ row, matrices["up"][e] @ row
            out[t] += w * (matrices["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def tokens(number=17, seed=5):
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(SHAPE.experts)[:2] for _ in range(number)]).astype(np.int32)
    return rng.normal(size=(number, SHAPE.hidden)).astype(np.float32), chosen, rng.random((number, 2), np.float32)


RUN = jax.jit(lambda x, chosen, w, layer: run_experts(x, chosen, layer, Gate(), {}, weights=w).combined)


def compressed(weights=WEIGHTS, *, rank=None, **settings):
    """Return a layer of which every target is fitted, `rank` for every expert, the full one if None."""
    chosen = D2MoESettings(**settings)
    terms = {}
    for target in D2MOE.targets(SHAPE, chosen):
        own = min(SHAPE.of(target)[1:]) if rank is None else rank
        level = own if chosen.setting == "paper" else own * SHAPE.experts
        terms[target] = fitted(target, weights, level=level, **settings).terms
    return CompressedLayer(terms=terms, sizes=SHAPE).check()


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


# What is approximated, and how well.


@pytest.mark.parametrize("settings", [PAPER, {"sparsity": 0.0, "base": "always"}, {"sparsity": 0.0}])
def test_full_rank_and_a_whole_base_leave_the_outputs_as_they_are(settings):
    layer = compressed(**settings)
    x, chosen, w = tokens()
    assert relative(RUN(x, chosen, w, layer), network(x, chosen, w, WEIGHTS)) < 1e-4


@pytest.mark.parametrize(("target", "rank"), crossed(["gate", "down"], [1, 4]))
def test_deviations_are_the_published_ones_and_lose_the_tails(target, rank):
    fit = fitted(target, level=rank, **PAPER)
    base = np.asarray(fit.terms[0].weight, np.float64)
    moments = moments_of(statistics(), target) / COUNTS[:, None, None]
    for e, weight in enumerate(WEIGHTS[target].astype(np.float64)):
        # Expert 2 has fewer tokens than inputs: its moment has no Cholesky factor, and is tested by itself.
        if e == 2:
            continue
        expected, singular = cholesky_form(weight - base, moments[e], rank)
        deviation = dense(fit.terms[1:])[e]
        assert relative(deviation, expected) < 1e-4
        rest = weight - base - deviation
        assert np.trace(rest @ moments[e] @ rest.T) == pytest.approx(np.sum(singular[rank:] ** 2), rel=1e-4)


@pytest.mark.parametrize("target", ["gate", "down"])
def test_singular_moments_are_projected_on_as_well(target):
    fit = fitted(target, level=3, **PAPER)
    moment = moments_of(statistics(), target)[2] / COUNTS[2]
    assert np.linalg.matrix_rank(moment) == 5
    delta = WEIGHTS[target][2].astype(np.float64) - np.asarray(fit.terms[0].weight, np.float64)
    values, vectors = np.linalg.eigh(moment)
    tail = np.linalg.svd(delta @ (vectors * np.sqrt(np.maximum(values, 0))), compute_uv=False)[3:]
    rest = delta - dense(fit.terms[1:])[2]
    assert np.sum(tail**2) > 1e-3
    assert np.trace(rest @ moment @ rest.T) == pytest.approx(np.sum(tail**2), rel=1e-4)


def errors(fit, target, found):
    """Return the error of every expert weighed by what it saw, and plain."""
    rest = WEIGHTS[target] - dense(fit.terms)
    return np.einsum("eoi,eij,eoj->e", rest, moments_of(found, target), rest), np.sum(rest**2, axis=(1, 2))


@pytest.mark.parametrize("target", ["gate", "down"])
def test_each_way_to_fit_deviations_is_best_at_its_own_error(target):
    found = statistics()
    lost = {
        delta: errors(fitted(target, level=4, delta=delta, found=found, **PAPER), target, found)
        for delta in ("whitened", "asvd", "plain")
    }
    for other in ("asvd", "plain"):
        assert (lost["whitened"][0] < lost[other][0]).all()
    for other in ("asvd", "whitened"):
        assert (lost["plain"][1] < lost[other][1]).all()


@pytest.mark.parametrize("target", ["gate", "down"])
def test_asvd_scales_inputs_by_the_root_of_their_size(target):
    fit = fitted(target, level=4, delta="asvd", **PAPER)
    delta = WEIGHTS[target].astype(np.float64) - np.asarray(fit.terms[0].weight, np.float64)
    diagonal = np.einsum("eii->ei", moments_of(statistics(), target)) / COUNTS[:, None]
    for e in range(SHAPE.experts):
        expected, _ = cholesky_form(delta[e], np.diag(np.sqrt(diagonal[e])), 4)
        assert relative(dense(fit.terms[1:])[e], expected) < 1e-4


def test_inputs_of_equal_size_make_all_ways_equal():
    found = statistics(input_moments=COUNTS[:, None, None] * np.eye(SHAPE.hidden))
    plain = dense(fitted("gate", level=4, delta="plain", found=found, **PAPER).terms)
    for delta in ("whitened", "asvd"):
        np.testing.assert_allclose(
            dense(fitted("gate", level=4, delta=delta, found=found, **PAPER).terms), plain, atol=1e-4
        )


@pytest.mark.parametrize("settings", [PAPER, {"sparsity": 0.0, "base": "always"}])
def test_the_error_falls_with_the_rank(settings):
    target, found = "down", statistics()
    weigh = moments_of(found, target) if settings is PAPER else expert_moments(moments_of(found, target), COUNTS)
    lost = []
    for rank in (1, 2, 4, 7):
        level = rank if settings is PAPER else rank * SHAPE.experts
        rest = WEIGHTS[target] - dense(fitted(target, level=level, **settings).terms)
        lost.append(np.einsum("eoi,eij,eoj->e", rest, weigh, rest))
    steps = np.diff(lost if settings is PAPER else np.sum(lost, axis=1, keepdims=True), axis=0)
    assert (steps <= 1e-5 * np.array(lost[0]).sum()).all()


# The base.


@pytest.mark.parametrize(
    ("target", "method"), crossed(["gate", "down"], ["fisher", "fisher_freq", "freq", "mean", "regmean", "ties"])
)
def test_bases_are_the_solvers(method, target):
    base = fitted(target, level=1, merge=method, **PAPER).terms[0].weight
    weight, found = WEIGHTS[target], statistics()
    fisher = found[f"fisher_{target}"]
    if method == "regmean":
        moment = expert_moments(moments_of(found, target), COUNTS)
        expected = regmean(weight, jnp.asarray(moment, jnp.float32), ridge=0.0)
    elif method == "ties":
        expected = ties(weight)
    else:
        expected = merge(weight, method=method, fisher=1e9 * fisher, counts=COUNTS)
        freq = COUNTS[:, None, None] * np.ones(weight.shape)
        say = {"fisher": fisher, "fisher_freq": fisher * freq, "freq": freq, "mean": np.ones(weight.shape)}[method]
        np.testing.assert_allclose(base, average(weight, say), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(base, expected, rtol=1e-4, atol=1e-5)


def test_the_base_of_gate_and_up_is_merged_by_the_fisher_information_of_both():
    base = fitted("gate_up", level=5, merge="fisher", sparsity=0.0, base="always").terms[0].weight
    expected = average(
        stacked(WEIGHTS, "gate_up"), np.concatenate([statistics()[f"fisher_{p}"] for p in ("gate", "up")], 1)
    )
    np.testing.assert_allclose(base, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [PAPER, {"sparsity": 0.0, "base": "always"}])
def test_deviations_see_the_base_as_it_is_stored(settings):
    common = 100 * RNG.normal(size=SHAPE.of("down")[1:])
    weights = {**WEIGHTS, "down": (common + WEIGHTS["down"]).astype(np.float32)}
    level = 10 if settings is PAPER else 50
    fit = fitted("down", weights, level=level, dtype=ml_dtypes.bfloat16, delta="plain", **settings)
    assert fit.terms[0].weight.dtype == ml_dtypes.bfloat16
    lost = np.linalg.norm(weights["down"] - dense(fit.terms), axis=(1, 2))
    rounding = np.linalg.norm(
        weights["down"].mean(0).astype(ml_dtypes.bfloat16).astype(float) - weights["down"].mean(0)
    )
    assert rounding > 1
    assert (lost < 0.2 * rounding).all(), "what rounds the base off is in the deviations"


def test_deviations_see_the_base_before_it_is_pruned_as_published_and_improved_after():
    sparse = {"sparsity": 0.3, "dynamic": 0.0, "mode": "column", "delta": "plain", "merge": "mean"}
    for setting, level in (("paper", 10), ("improved", 50)):
        fit = fitted("down", level=level, setting=setting, base="always", **sparse)
        lost = WEIGHTS["down"] - dense(fit.terms)
        cut = np.setdiff1d(np.arange(10), fit.terms[0].kept)
        assert len(cut) == 3
        expected = np.zeros_like(lost)
        if setting == "paper":
            expected[:, :, cut] = WEIGHTS["down"].mean(0)[:, cut]
        np.testing.assert_allclose(lost, expected, atol=1e-4)


def test_without_fisher_information_frequency_decides_and_it_is_said():
    nothing = statistics(fisher_gate=np.zeros(SHAPE.of("gate")))
    fit = fitted("gate", level=1, found=nothing, **PAPER)
    assert "no_fisher" in kinds(fit)
    expected = average(WEIGHTS["gate"], COUNTS[:, None, None] * np.ones(SHAPE.of("gate")))
    np.testing.assert_allclose(fit.terms[0].weight, expected, rtol=1e-4, atol=1e-5)
    some = statistics()["fisher_gate"].copy()
    some[:, 2, 3] = some[:, 4, 1] = 0
    fit = fitted("gate", level=1, found=statistics(fisher_gate=some), **PAPER)
    (said,) = [outcome.detail for outcome in fit.outcomes if outcome.kind == "partial_fisher"]
    assert said.startswith("2 entries")
    np.testing.assert_allclose(fit.terms[0].weight[2, 3], expected[2, 3], rtol=1e-4)
    assert "no_fisher" not in kinds(fitted("gate", level=1, **PAPER))


# Pruning.


@pytest.mark.parametrize(("method", "setting"), crossed(["regmean", "freq", "fisher"], ["paper", "improved"]))
def test_neuron_pruning_cuts_the_same_neurons_out_of_every_projection(setting, method):
    options = {"setting": setting, "merge": method, "mode": "neuron", "sparsity": 0.4, "dynamic": 0.0, "base": "always"}
    # Inputs of which the base that is closest under them ranks the neurons differently than the one by frequency does.
    found = statistics(intermediate_moments=sums(COUNTS, SHAPE.intermediate, 11))
    layer = {
        target: fitted(target, level=5, found=found, **options)
        for target in D2MOE.targets(SHAPE, D2MoESettings(**options))
    }
    bases = {target: fit.terms[0] for target, fit in layer.items()}
    (kept,) = {tuple(np.asarray(base.kept)[0].tolist()) for base in bases.values()}
    assert len(kept) == 6
    say = found["fisher_down"] if method == "fisher" else COUNTS[:, None, None] * np.ones(SHAPE.of("down"))
    down = average(WEIGHTS["down"], say)
    scores = np.linalg.norm(down, axis=0) * np.sqrt(np.einsum("eii->i", found["intermediate_moments"]))
    assert set(kept) == set(np.argsort(-scores)[:6].tolist())

    uncut = {
        target: fitted(target, level=5, found=found, **{**options, "sparsity": 0.0}).terms[0].weight for target in bases
    }
    for target, base in bases.items():
        whole, expected = np.asarray(uncut[target]), np.zeros(SHAPE.of(target)[1:])
        if target == "down":
            expected[:, kept] = whole[:, kept]
        else:
            for half in range(0, len(whole), SHAPE.intermediate):
                rows = half + np.array(kept)
                expected[rows] = whole[rows]
        np.testing.assert_allclose(base.materialize()[0], expected, atol=1e-6)


@pytest.mark.parametrize("target", ["gate", "up", "down"])
def test_column_pruning_keeps_the_largest_columns_times_inputs(target):
    fit = fitted(target, level=2, setting="paper", sparsity=0.4, dynamic=0.5)
    whole = np.asarray(fitted(target, level=2, **PAPER).terms[0].weight, np.float64)
    scores = np.linalg.norm(whole, axis=0) * np.sqrt(np.einsum("eii->i", moments_of(statistics(), target)))
    fewer = whole.shape[1] - int(0.2 * whole.shape[1])
    expected = np.sort(np.argsort(-scores)[:fewer])
    assert np.asarray(fit.terms[0].kept)[0].tolist() == expected.tolist()
    np.testing.assert_allclose(fit.terms[0].weight, whole[:, expected], atol=1e-6)


def test_a_whole_number_of_channels_is_not_lost_to_rounding():
    shape = LayerShape(experts=2, hidden=100, intermediate=100)
    settings = D2MoESettings(setting="paper", sparsity=0.29, dynamic=0.0)
    base = D2MOE.slot("gate", shape, np.dtype("float32"), settings, 0.5).at(1)[0]
    assert base.kept is not None
    assert base.kept.shape == (1, 71)


def test_what_every_batch_masks_is_stored_and_named_beside_the_honest_size():
    still = fitted("gate", level=2, setting="paper", sparsity=0.2, dynamic=0.0)
    moving = fitted("gate", level=2, setting="paper", sparsity=0.4, dynamic=0.5)
    assert count(still.terms) == count(moving.terms)
    assert "published_size" not in kinds(still)
    (said,) = [outcome.detail for outcome in moving.outcomes if outcome.kind == "published_size"]
    honest, published = map(float, re.findall(r"0\.\d+", said))
    experts, out, in_ = SHAPE.of("gate")
    stored, masked = count(moving.terms).numbers, int(0.2 * in_)
    assert honest == pytest.approx(1 - stored / (experts * out * in_), abs=1e-4)
    assert published == pytest.approx(1 - (stored - masked * out) / (experts * out * in_), abs=1e-4)


def test_what_is_masked_lies_among_what_is_kept_and_follows_the_batch():
    base = fitted("down", level=2, setting="paper", sparsity=0.6, dynamic=0.5).terms[0]
    cut = set(range(10)) - set(np.asarray(base.kept)[0].tolist())
    assert len(cut) == base.dynamic == 3
    norms = np.linalg.norm(np.asarray(base.weight, np.float64), axis=0)
    masks = set()
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(size=(3, 10)).astype(np.float32)
        before = np.asarray(base.materialize()[0])
        scores = norms * np.linalg.norm(rows[:, np.asarray(base.kept)[0]], axis=0)
        expected = np.asarray(base.kept)[0][np.argsort(scores)[:3]]
        dropped = set(np.flatnonzero((np.asarray(base.masked(rows).materialize()[0]) == 0).all(0)).tolist())
        assert dropped == cut | set(expected.tolist())
        np.testing.assert_array_equal(base.materialize()[0], before)
        masks.add(tuple(sorted(expected.tolist())))
    assert len(masks) > 1


@pytest.mark.parametrize("dynamic", [0.0, 0.5])
def test_the_batch_matters_only_where_it_is_asked(dynamic):
    layer = compressed(related(), rank=2, setting="paper", sparsity=0.6, dynamic=dynamic)
    x, chosen, w = tokens()
    together = np.asarray(RUN(x, chosen, w, layer))
    again = np.asarray(RUN(x, chosen, w, layer))
    np.testing.assert_array_equal(together, again)
    reversed_ = np.asarray(RUN(x[::-1], chosen[::-1], w[::-1], layer))[::-1]
    assert relative(reversed_, together) < 1e-5
    half = np.concatenate([RUN(x[:8], chosen[:8], w[:8], layer), RUN(x[8:], chosen[8:], w[8:], layer)])
    assert (relative(half, together) < 1e-5) == (dynamic == 0)


def test_batches_of_one_size_share_one_program():
    layer = compressed(related(), rank=2, setting="paper", sparsity=0.6, dynamic=0.5)
    run = jax.jit(lambda x, chosen, w, layer: run_experts(x, chosen, layer, Gate(), {}, weights=w).combined)
    for seed in range(3):
        run(*tokens(seed=seed), layer)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"setting": "paper", "sparsity": 0.3, "dynamic": 0.0},
        {"setting": "paper", "mode": "neuron", "sparsity": 0.3, "dynamic": 0.0},
        {"sparsity": 0.3, "base": "always"},
        {"sparsity": 0.3, "base": "always", "share_v": True},
    ],
)
def test_a_base_applied_once_is_the_dense_network(settings):
    rank = 1 if "share_v" in settings else 3
    layer = compressed(related(), rank=rank, **settings)
    assert all(isinstance(terms[0], Shared) for terms in layer.terms.values())
    matrices = {name: np.asarray(layer.materialize(name), np.float64) for name in SHAPE.projections}
    x, chosen, w = tokens()
    found = RUN(x, chosen, w, layer)
    assert relative(found, network(x, chosen, w, matrices)) < 1e-5
    assert relative(found, network(x, chosen, w, related())) > 1e-2


# Which experts get how much, and whether there is a base at all.


def test_one_right_factor_is_the_solvers():
    fit = fitted("down", level=4, share_v=True, base="always", sparsity=0.0)
    base, deviations = fit.terms
    assert isinstance(deviations, Grouped)
    assert deviations.group_ranks == (4,)
    moment = expert_moments(statistics()["intermediate_moments"], COUNTS)
    left, right = shared_right(WEIGHTS["down"] - np.asarray(base.weight), rank=4, moment=jnp.asarray(moment))
    np.testing.assert_allclose(deviations.materialize(), np.asarray(left) @ np.asarray(right), atol=1e-4)


@pytest.mark.parametrize("setting", ["paper", "improved"])
def test_trimming_gives_the_ranks_of_the_least_routed_to_the_others(setting):
    fit = fitted("gate" if setting == "paper" else "gate_up", level=12, setting=setting, trim=0.4, base="always")
    deviations = fit.terms[1]
    assert isinstance(deviations, Grouped)
    ranks = np.array(deviations.group_ranks)
    least = np.argsort(COUNTS)[:2]
    assert (ranks[least] == 0).all()
    others = np.delete(ranks, least)
    assert others.min() >= 1
    assert ranks.sum() == 12, "no rank is lost"
    if setting == "paper":
        assert others.tolist() == [4, 4, 4]
    (said,) = [outcome.detail for outcome in fit.outcomes if outcome.kind == "trimmed"]
    assert "experts 2, 4," in said
    assert not np.asarray(deviations.materialize())[least].any()


def test_trimmed_slots_hold_no_more_than_the_others_can_use():
    settings = D2MoESettings(trim=0.8)
    slot = D2MOE.slot("down", SHAPE, np.dtype("float32"), settings, 0.5)
    assert (slot.low, slot.high) == (1, 10)


def test_improved_ranks_keep_the_most_energy():
    fit = fitted("down", level=17, sparsity=0.0, base="always")
    base = np.asarray(fit.terms[0].weight, np.float64)
    moment = expert_moments(statistics()["intermediate_moments"], COUNTS)
    energies = []
    for e in range(SHAPE.experts):
        energies.append(
            np.linalg.svd((WEIGHTS["down"][e] - base) @ np.linalg.cholesky(moment[e]), compute_uv=False) ** 2
        )
    threshold = np.sort([x for own in energies for x in own[1:]])[-(17 - SHAPE.experts)]
    expected = [1 + int((own[1:] >= threshold).sum()) for own in energies]
    assert list(fit.terms[1].group_ranks) == expected
    assert len(set(expected)) > 1


def share_of(detail):
    return float(re.search(r"explains (0\.\d+|1\.0+)", detail)[1])


@pytest.mark.parametrize(("dtype", "delta"), crossed(["float32", ml_dtypes.bfloat16], ["whitened", "asvd", "plain"]))
def test_improved_keeps_a_base_only_where_the_experts_have_something_in_common(dtype, delta):
    options = {"level": 15, "sparsity": 0.0, "dtype": dtype, "delta": delta}
    alone = fitted("down", WEIGHTS, **options)
    assert kinds(alone) == ["no_base"]
    (term,) = alone.terms
    assert isinstance(term, Grouped)
    common = fitted("down", related(), **options)
    assert kinds(common) == ["base"]
    assert isinstance(common.terms[0], Shared)
    moment = expert_moments(statistics()["intermediate_moments"], COUNTS)
    base, weight = np.asarray(common.terms[0].weight, np.float64), related()["down"]
    if delta == "plain":
        moment = np.tile(np.eye(10), (5, 1, 1))
    if delta == "asvd":
        moment = np.stack([np.diag(np.sqrt(np.diag(own))) for own in moment])
    whole, rest = (np.einsum("eoi,eij,eoj->", x, moment, x) for x in (weight, weight - base))
    assert share_of(common.outcomes[0].detail) == pytest.approx(1 - rest / whole, abs=2e-4)
    assert share_of(common.outcomes[0].detail) > 0.5 > share_of(alone.outcomes[0].detail)
    assert "1 / experts: 0.2000" in alone.outcomes[0].detail


@pytest.mark.parametrize("share_v", [False, True])
def test_no_base_never_takes_more_bytes_than_were_planned(share_v):
    """Ranks of single experts are stored too, which uniform ranks and one shared factor do not need."""
    shape = LayerShape(experts=16, hidden=6, intermediate=6)
    weight = np.random.default_rng(0).normal(size=shape.of("down")) * np.geomspace(0.1, 2, 16)[:, None, None]
    settings = D2MoESettings(setting="paper", merge="mean", delta="plain", base="auto", share_v=share_v)
    template = D2MOE.slot("down", shape, np.dtype(ml_dtypes.bfloat16), settings, 0.5).at(1)
    fit = D2MOE.fit(jnp.asarray(weight, jnp.float32), template, settings, evidence=Evidence(target="down"))
    assert kinds(fit) == ["no_base"]
    assert count(fit.terms).bytes <= count(template).bytes
    assert count(fit.terms).numbers <= count(template).numbers


# What is stored.


@pytest.mark.parametrize(("sparsity", "dynamic"), crossed([0.0, 0.1, 0.6], [0.0, 0.5]))
def test_stored_numbers_are_those_of_the_notes(sparsity, dynamic):
    shape = LayerShape(experts=8, hidden=40, intermediate=30)
    E, D, F, rank = 8, 40, 30, 3
    static = sparsity * (1 - dynamic)
    D_kept, F_kept = D - int(static * D + 1e-9), F - int(static * F + 1e-9)

    def stored(level, **settings):
        chosen = D2MoESettings(sparsity=sparsity, dynamic=dynamic, **settings)
        slots = [D2MOE.slot(target, shape, np.dtype("float32"), chosen, 0.5) for target in D2MOE.targets(shape, chosen)]
        return sum(count(slot.at(level)).numbers for slot in slots)

    deltas = 3 * E * rank * (D + F)
    pruned = D_kept < D or F_kept < F
    assert stored(rank, setting="paper") == 2 * F * D_kept + D * F_kept + deltas + (
        (D_kept < D) * 2 * D_kept + (F_kept < F) * F_kept
    )
    # Every target holds its own copy of the neurons that are kept.
    assert stored(rank, setting="paper", mode="neuron") == 3 * D * F_kept + deltas + pruned * 3 * F_kept
    total = E * rank
    assert stored(total) == 3 * D * F_kept + total * (2 * F + D) + total * (F + D) + 2 * E + pruned * 2 * F_kept
    shared = rank * (2 * D + F) + E * rank * (2 * F + D)
    assert stored(rank, setting="paper", share_v=True, mode="neuron") == (
        3 * D * F_kept + shared + 3 + pruned * 3 * F_kept
    )


MIXTRAL = {"model": 46_702_792_704, "layers": 32, "experts": 8, "hidden": 4096, "intermediate": 14336}


@pytest.mark.parametrize(
    ("sparsity", "published"),
    [
        (0.1, {0.2: 68.05, 0.4: 47.34, 0.6: 26.62, 0.7: 16.26, 0.8: 5.93}),
        (0.6, {0.2: 74.30, 0.4: 53.58, 0.6: 32.86, 0.7: 22.54, 0.8: 12.18}),
    ],
)
def test_kept_fractions_are_the_published_ones(sparsity, published):
    for total, percent in published.items():
        assert abs(100 * published_keep(total, **MIXTRAL, sparsity=sparsity) - percent) < 0.01


@pytest.mark.parametrize("total", [0.95, -0.01])
def test_totals_that_no_rank_reaches_are_named(total):
    with pytest.raises(JaxmoeError, match=rf"total {total}: .* remove 0\.\d+ to 0\.8\d+ of this model"):
        published_keep(total, **MIXTRAL, sparsity=0.0)


PHI = {"model": 41.87e9, "layers": 32, "experts": 16, "hidden": 4096, "intermediate": 6400}
DEEPSEEK = {"model": 16.38e9, "layers": 27, "experts": 64, "hidden": 2048, "intermediate": 1408}
QWEN2 = {"model": 57.41e9, "layers": 28, "experts": 64, "hidden": 3584, "intermediate": 2560}


@pytest.mark.parametrize(
    ("sizes", "sparsity", "rows"),
    [
        (MIXTRAL, 0.1, [(2167, 0.200, 0.194, 0.188), (1508, 0.400, 0.394, 0.388), (848, 0.600, 0.594, 0.588)]),
        (MIXTRAL, 0.6, [(1046, 0.600, 0.564, 0.528), (717, 0.700, 0.664, 0.628), (388, 0.800, 0.764, 0.727)]),
        (PHI, 0.1, [(1838, 0.200, 0.197, 0.194), (1318, 0.400, 0.397, 0.394), (799, 0.600, 0.597, 0.594)]),
        (DEEPSEEK, 0.1, [(640, 0.200, 0.199, 0.198), (458, 0.399, 0.398, 0.398), (274, 0.600, 0.600, 0.599)]),
        (QWEN2, 0.1, [(1124, 0.200, 0.200, 0.199), (777, 0.400, 0.399, 0.399), (429, 0.600, 0.600, 0.599)]),
    ],
)
def test_honest_compression_at_the_published_ranks(sizes, sparsity, rows):
    """Claimed, with the static half removed, and as the released code stores it: everything."""
    shape = LayerShape(experts=sizes["experts"], hidden=sizes["hidden"], intermediate=sizes["intermediate"])

    def removed(rank, sparsity, dynamic):
        settings = D2MoESettings(setting="paper", mode="neuron", sparsity=sparsity, dynamic=dynamic)
        stored = 0
        for target in D2MOE.targets(shape, settings):
            stored += count(D2MOE.slot(target, shape, np.dtype("float32"), settings, 0.5).at(rank)).numbers
        return sizes["layers"] * (shape.numbers - stored) / sizes["model"]

    for rank, *printed in rows:
        found = [removed(rank, sparsity, 0.0), removed(rank, sparsity, 0.5), removed(rank, 0.0, 0.0)]
        np.testing.assert_allclose(found, printed, atol=7e-4)
        kept = published_keep(printed[0], **sizes, sparsity=sparsity)
        full = shape.hidden * shape.intermediate / (shape.hidden + shape.intermediate)
        # The notes round the fractions, and with them the ranks, down.
        assert abs(kept * full - rank) <= 2


def test_the_stored_size_of_a_model_is_what_the_slots_say():
    slot = D2MOE.slot("down", SHAPE, np.dtype("float32"), D2MoESettings(), 0.5)
    ladder = slot.ladder()
    for level in (slot.low, slot.high):
        assert ladder.numbers(level) == count(slot.at(level)).numbers < ladder.dense


# The edges.


def test_an_expert_without_tokens_takes_the_pooled_moment():
    counts = np.array([40, 30, 0, 60, 25])
    fit = fitted("gate", level=4, counts=counts, **PAPER)
    moments = sums(counts, SHAPE.hidden, 3)
    assert not moments[2].any()
    delta = WEIGHTS["gate"][2].astype(np.float64) - np.asarray(fit.terms[0].weight, np.float64)
    expected, _ = cholesky_form(delta, moments.sum(0) / counts.sum(), 4)
    assert relative(dense(fit.terms[1:])[2], expected) < 1e-4


@pytest.mark.parametrize("method", ["fisher", "fisher_freq", "freq"])
def test_a_layer_that_no_token_reached_is_fitted_plainly_around_the_mean(method):
    nothing = np.zeros(5, int)
    zeros = {name: np.zeros_like(array) for name, array in statistics().items()}
    fit = fitted("down", level=4, counts=nothing, found=zeros, merge=method, **PAPER)
    assert "unweighted" in kinds(fit)
    assert ("unweighted_merge" in kinds(fit)) == (method != "fisher")
    mean = WEIGHTS["down"].astype(np.float64).mean(0)
    np.testing.assert_allclose(fit.terms[0].weight, mean, rtol=1e-4, atol=1e-5)
    expected = np.stack([cholesky_form(weight - mean, np.eye(10), 4)[0] for weight in WEIGHTS["down"]])
    assert relative(dense(fit.terms[1:]), expected) < 1e-4


def test_improved_without_calibration_says_so():
    settings = D2MoESettings()
    template = D2MOE.slot("down", SHAPE, np.dtype("float32"), settings, 0.5).at(10)
    fit = D2MOE.fit(jnp.asarray(related()["down"]), template, settings, evidence=Evidence(target="down"))
    assert kinds(fit) == ["unweighted", "base"]


@pytest.mark.parametrize("setting", ["paper", "improved"])
def test_one_expert_is_its_own_base_and_equal_experts_have_no_deviation(setting):
    settings = D2MoESettings(setting=setting, sparsity=0.0, base="always")
    for experts in (1, 4):
        shape = LayerShape(experts=experts, hidden=6, intermediate=4)
        weight = np.repeat(np.random.default_rng(0).normal(size=(1, 6, 4)), experts, 0).astype(np.float32)
        found = {
            "intermediate_moments": np.tile(np.diag([4.0, 3.0, 2.0, 1.0]), (experts, 1, 1)),
            "fisher_down": np.random.default_rng(1).random(weight.shape),
        }
        counts = np.full(experts, 7)
        evidence = Evidence(
            target="down",
            moment=expert_moments(found["intermediate_moments"], counts),
            counts=counts,
            statistic=found.get,
        )
        template = D2MOE.slot("down", shape, np.dtype("float32"), settings, 0.5).at(experts)
        fit = D2MOE.fit(jnp.asarray(weight), template, settings, evidence=evidence)
        np.testing.assert_array_equal(fit.terms[0].weight, weight[0])
        np.testing.assert_array_equal(fit.terms[1].materialize(), np.zeros_like(weight))
        np.testing.assert_array_equal(dense(fit.terms), weight)


@pytest.mark.parametrize("setting", ["paper", "improved"])
@pytest.mark.parametrize("ratio", [0.001, 0.9])
def test_ratios_out_of_reach_name_the_range(tmp_path, setting, ratio):
    checkpoint = Checkpoint.open(plain_checkpoint.write(tmp_path / "model"))
    settings = D2MoESettings(setting=setting, sparsity=0.0)
    with pytest.raises(JaxmoeError, match=rf"ratio {ratio} .* out of reach for d2moe .*0\.\d+ to 0\.\d+ of experts"):
        make_plan(checkpoint, methods.get("d2moe"), settings, ratio=ratio)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"setting": "best"}, "setting 'best'"),
        ({"merge": "median"}, "merge 'median': give one of fisher, .*ties"),
        ({"delta": "half"}, "delta 'half': give one of whitened, asvd, plain"),
        ({"mode": "row"}, "mode 'row': give one of column, neuron"),
        ({"base": "never"}, "base 'never': give one of always, auto"),
        ({"sparsity": 1.0}, "sparsity=1.0: give a fraction"),
        ({"dynamic": 1.5}, "dynamic=1.5: give a fraction"),
        ({"trim": -0.1, "sparsity": float("nan")}, "sparsity=nan.*; trim=-0.1"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(JaxmoeError, match=words):
        D2MoESettings(**wrong)


def test_what_a_method_needs_follows_from_its_settings():
    def needs(**settings):
        return set(D2MOE.requires(D2MoESettings(**settings)))

    moments = {"input_moments", "intermediate_moments"}
    assert needs() == set()
    assert needs(setting="paper") == {"fisher_up", "fisher_down"} | moments
    assert needs(setting="paper", merge="freq", delta="plain") == {"counts"}
    assert needs(merge="fisher_freq") == {"fisher_up", "fisher_down", "counts"}


def test_a_base_and_low_rank_terms_are_what_the_paper_stores():
    layer = compressed(rank=2, setting="paper")
    assert list(layer.terms) == list(SHAPE.projections)
    assert all([type(term) for term in terms] == [Shared, LowRank] for terms in layer.terms.values())
