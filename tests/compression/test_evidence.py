"""Calibrated compression: which sums weigh what, what the report says, and that layers are asked for one at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
from plain_checkpoint import write
from planned import compress, make_plan

from jaxmoe import Checkpoint, methods
from jaxmoe.compression.evidence import moments, outcomes
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape
from jaxmoe.factors.error import relative_errors
from jaxmoe.solvers.second_moment import expert_moments

E, D, F = 4, 16, 8
SHAPE = LayerShape(experts=E, hidden=D, intermediate=F)
COUNTS = np.array([300, 200, 5, 0])


def layer(seed=0, counts=COUNTS, **changes):
    rng = np.random.default_rng(seed)

    def sums(side):
        inputs = [rng.normal(size=(count, side)) * np.geomspace(3, 0.03, side) for count in counts]
        return np.stack([x.T @ x for x in inputs])

    own, inner = sums(D), sums(F)
    made = {"input_moments": own, "intermediate_moments": inner, "input_moment": own.sum(0) / 2}
    return SimpleNamespace(tokens=int(counts.sum()) // 2, counts=counts, **(made | changes))


class Recorded:
    """Statistics that note which layers were asked for, and which were done."""

    def __init__(self, seed=0, **changes):
        self.seed, self.changes, self.asked, self.followed = seed, changes, [], []

    reads = ()

    @property
    def keeps(self):
        return frozenset(vars(layer(self.seed, **self.changes)))

    def layer(self, index):
        self.asked.append(index)
        return layer(self.seed + index, **self.changes)

    def follow(self, index, compressed):
        self.followed.append(index)

    def describe(self):
        return {"tokens": 253, "domains": {"code": 253}, "sequential": False}

    def fingerprint(self):
        return f"seed {self.seed}"


def run(folder, output, statistics, name="svd", **settings):
    checkpoint, recipe = Checkpoint.open(folder), methods.get(name)
    plan = make_plan(checkpoint, recipe, recipe.settings(**settings), ratio=0.4, weighted=statistics is not None)
    return compress(checkpoint, output, plan, statistics=statistics)


def test_sums_weighted_by_the_router_go_first():
    plain = layer()
    weighted = layer(weighted_input_moments=np.stack([np.eye(D)] * E))
    found = moments(weighted, "gate_up")
    assert found is not None
    np.testing.assert_array_equal(found[0] / found[0, 0, 0], np.eye(D))
    np.testing.assert_array_equal(moments(weighted, "down"), moments(plain, "down"))
    np.testing.assert_array_equal(moments(plain, "up"), expert_moments(plain.input_moments, COUNTS))


def test_a_pooled_moment_serves_the_inputs_and_what_has_none_is_reported():
    pooled = layer(input_moments=None, intermediate_moments=None)
    found = moments(pooled, "gate", floor=0.0)
    assert found is not None
    shape = pooled.input_moment / np.trace(pooled.input_moment)
    np.testing.assert_allclose(found[1] / np.trace(found[1]), shape, rtol=1e-12, atol=1e-14)
    assert moments(pooled, "down") is None
    kinds = [(x.kind, x.target) for x in outcomes(pooled, ["gate_up", "down"], SHAPE)]
    assert kinds == [("unweighted", "down"), ("never_routed", ""), ("starved", "")]


def test_a_layer_that_no_token_reached_is_fitted_unweighted():
    empty = layer(counts=0 * COUNTS)
    assert moments(empty, "down") is moments(None, "down") is None
    assert [x.kind for x in outcomes(empty, ["down"], SHAPE)] == ["unweighted"]


def test_weighted_errors_equal_numpy():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(E, F, D)).astype(np.float32)
    rough = (weight + 0.1 * rng.normal(size=weight.shape)).astype(np.float32)
    terms = {"up": (Dense(weight=rough),), "down": (Dense(weight=np.zeros((E, D, F), np.float32)),)}
    compressed = CompressedLayer(sizes=SHAPE._replace(gated=False), terms=terms)
    moment = expert_moments(layer().input_moments, COUNTS)
    roots = np.linalg.cholesky(moment)
    expected = np.linalg.norm((weight - rough) @ roots, axis=(1, 2)) / np.linalg.norm(weight @ roots, axis=(1, 2))
    np.testing.assert_allclose(relative_errors(weight, compressed, "up", moment=moment), expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "settings"), [("svd", {}), ("mobe", {"steps": 150})])
def test_compression_serves_the_calibrated_inputs(tmp_path, name, settings):
    folder = write(tmp_path / "model")
    statistics = Recorded()
    aware = run(folder, tmp_path / "aware", statistics, name, **settings)
    plain = run(folder, tmp_path / "plain", None, name, **settings)
    assert statistics.asked == statistics.followed == [0, 1]
    assert aware["calibration"]["tokens"] == 253
    assert aware["run"]["statistics"] == "seed 0"
    assert plain["run"]["statistics"] is None
    assert aware["predicted_peak_bytes"] > plain["predicted_peak_bytes"]
    # What a descent did on its way depends on the weights, not on what is tested here.
    kinds = {x["kind"] for x in aware["outcomes"]} - {"descent_returned", "lower_rate"}
    assert kinds == {"loads_in", "never_routed", "starved"}
    for mine, other in zip(aware["layers"], plain["layers"], strict=True):
        for projection, record in mine["projections"].items():
            assert 0 < record["weighted_error"] < record["error"]
            assert record["error"] > other["projections"][projection]["error"]
            assert other["projections"][projection]["weighted_error"] is None


def test_other_statistics_are_another_run(tmp_path):
    folder = write(tmp_path / "model")
    first = run(folder, tmp_path / "out", Recorded())
    again = Recorded()
    assert run(folder, tmp_path / "out", again)["run"] == first["run"]
    assert again.asked == []
    with pytest.raises(JaxmoeError, match="holds something else"):
        run(folder, tmp_path / "out", Recorded(seed=9))
