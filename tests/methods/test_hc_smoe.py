"""HC-SMoE: clusters against a plain loop, and merged experts that are one function."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, Merged
from jaxmoe.methods.hc_smoe import HC_SMOE
from jaxmoe.methods.method import Evidence
from jaxmoe.solvers.clustering import cluster, merge

SHAPE = LayerShape(experts=5, hidden=6, intermediate=4)


def average_linkage(points, clusters):
    """Join the two clusters of the least mean distance until so many are left."""
    groups = [[index] for index in range(len(points))]
    while len(groups) > clusters:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        distance = lambda pair: np.mean(  # noqa: E731
            [np.linalg.norm(points[i] - points[j]) for i in groups[pair[0]] for j in groups[pair[1]]]
        )
        a, b = min(pairs, key=distance)
        groups[b] += groups.pop(a)
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("clusters", [1, 2, 4, 9])
def test_clusters_are_those_of_average_linkage(clusters):
    points = np.random.default_rng(0).standard_normal((9, 4))
    labels = cluster(points, clusters)
    found = {frozenset(np.flatnonzero(labels == number).tolist()) for number in range(clusters)}
    assert found == average_linkage(points, clusters)


def test_equal_outputs_still_give_as_many_clusters():
    for clusters in range(1, 5):
        assert set(cluster(np.ones((4, 3)), clusters).tolist()) == set(range(clusters))


def test_shares_weigh_and_never_routed_experts_are_averaged():
    weight = np.random.default_rng(1).standard_normal((4, 2, 3))
    labels = np.array([0, 1, 0, 1])
    found = merge(weight, labels, np.array([3.0, 0.0, 1.0, 0.0]))
    np.testing.assert_allclose(found[0], 0.75 * weight[0] + 0.25 * weight[2], rtol=1e-6)
    np.testing.assert_allclose(found[1], (weight[1] + weight[3]) / 2, rtol=1e-6)


def fitted(weights, target, clusters, statistics, **settings):
    evidence = Evidence(
        target=target,
        counts=statistics["counts"],
        statistic=statistics.get,
        weight=lambda name: jnp.asarray(weights[name]),
    )
    template = (Merged.abstract(SHAPE.of(target), "float32", clusters=clusters),)
    (term,) = HC_SMOE.fit(weights[target], template, HC_SMOE.settings(**settings), evidence=evidence).terms
    return term


def test_experts_that_differ_in_the_order_of_their_neurons_merge_without_loss():
    rng = np.random.default_rng(2)
    weights = {name: rng.standard_normal(SHAPE.of(name)).astype(np.float32) for name in SHAPE.projections}
    order = rng.permutation(SHAPE.intermediate)
    weights["gate"][3], weights["up"][3] = weights["gate"][1][order], weights["up"][1][order]
    weights["down"][3] = weights["down"][1][:, order]
    sums = rng.standard_normal((SHAPE.experts, SHAPE.hidden)) * 10
    sums[3] = sums[1]
    statistics = {"counts": np.array([4, 2, 4, 2, 4]), "output_sums": sums}

    def outputs(layer):
        x = np.random.default_rng(3).standard_normal(SHAPE.hidden)
        gate, up, down = (np.asarray(layer[name], np.float64) for name in ("gate", "up", "down"))
        inner = np.einsum("efd,d->ef", gate, x)
        inner = inner / (1 + np.exp(-inner)) * np.einsum("efd,d->ef", up, x)
        return np.einsum("edf,ef->ed", down, inner)

    merged = {name: fitted(weights, name, 4, statistics).materialize() for name in SHAPE.projections}
    np.testing.assert_allclose(outputs(merged), outputs(weights), rtol=1e-5)
    plain = {name: fitted(weights, name, 4, statistics, setting="paper").materialize() for name in SHAPE.projections}
    assert np.abs(outputs(plain) - outputs(weights)).max() > 1e-2


def test_without_statistics_it_says_what_it_needs():
    assert set(HC_SMOE.requires(HC_SMOE.settings())) == {"counts", "output_sums"}
    with pytest.raises(JaxmoeError, match="lack counts"):
        fitted({name: np.zeros(SHAPE.of(name)) for name in SHAPE.projections}, "up", 2, {"counts": None})
