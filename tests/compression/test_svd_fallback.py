"""Whether a method is said to be behind truncated SVD exactly where numpy says so."""

import jax.numpy as jnp
import numpy as np
import pytest
from plain_checkpoint import write
from planned import compress, make_plan
from safetensors.numpy import load_file, save_file
from two_layers import short_demo

from jaxmoe import Checkpoint
from jaxmoe.compression.svd_fallback import TOLERANCE, behind_svd, svd_instead
from jaxmoe.factors import Dense, LowRank, Sparse
from jaxmoe.methods.method import Evidence, count
from jaxmoe.methods.mobe import MOBE
from jaxmoe.methods.svd import SVD

E, P, Q = 3, 8, 14
WEIGHT = np.random.default_rng(0).normal(size=(E, P, Q)) * np.geomspace(1, 0.1, Q)


def moment_of(kind):
    if kind is None:
        return None
    inputs = np.random.default_rng(1).normal(size=(1 if kind == "pooled" else E, 40, Q)) * np.geomspace(3, 0.1, Q)
    return np.einsum("eti,etj->eij", inputs, inputs) / 40


def roots(moment):
    return np.eye(Q)[None] if moment is None else np.linalg.cholesky(moment)


def truncated(rank, moment=None):
    """The best factors of a rank under the moment."""
    root = roots(moment)
    left = np.linalg.svd(WEIGHT @ root, full_matrices=False)[0][..., :rank]
    return LowRank(left=jnp.asarray(left, jnp.float32), right=jnp.asarray(left.swapaxes(1, 2) @ WEIGHT, jnp.float32))


def errors(terms, moment):
    """Squared weighted errors of terms, and of SVD with as many numbers, and the squared norm."""
    root = roots(moment)
    own = np.sum(((WEIGHT - sum(np.asarray(t.materialize(), np.float64) for t in terms)) @ root) ** 2)
    energies = np.linalg.svd(WEIGHT @ root, compute_uv=False) ** 2
    rank = count(terms).numbers // (E * (P + Q))
    return own, energies[:, rank:].sum(), energies.sum()


@pytest.mark.parametrize("kind", [None, "pooled", "own"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_not_behind_itself(rank, kind):
    moment = moment_of(kind)
    assert behind_svd(jnp.asarray(WEIGHT, jnp.float32), (truncated(rank, moment),), moment, "up") is None


@pytest.mark.parametrize("kind", [None, "pooled", "own"])
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02, 0.3])
def test_more_error_than_svd_of_equal_size_is_said(noise, kind):
    moment = moment_of(kind)
    best = truncated(3, moment)
    rng = np.random.default_rng(2)
    term = LowRank(left=best.left, right=best.right + jnp.asarray(noise * rng.normal(size=(E, 3, Q)), jnp.float32))
    own, rival, whole = errors((term,), moment)
    found = behind_svd(jnp.asarray(WEIGHT, jnp.float32), (term,), moment, "gate")
    if noise == 0.3:
        assert own > TOLERANCE * rival
    assert (found is not None) == (own > TOLERANCE * rival)
    if found is not None:
        assert (found.kind, found.target) == ("behind_svd", "gate")
        assert found.detail.startswith("plain" if kind is None else "weighted")
        assert "with rank 3" in found.detail
        both = [float(word) for word in found.detail.split("relative errors ")[1].split(" and ")]
        np.testing.assert_allclose(both, np.sqrt([own / whole, rival / whole]), atol=2e-4)


def test_a_moment_decides_which_of_two_is_closer():
    """Factors that are best under the moment are behind in plain error, and the other way round."""
    moment = moment_of("pooled")
    weight = jnp.asarray(WEIGHT, jnp.float32)
    aware, plain = (truncated(3, moment),), (truncated(3),)
    assert behind_svd(weight, aware, moment, "up") is None
    assert behind_svd(weight, aware, None, "up") is not None
    assert behind_svd(weight, plain, moment, "up") is not None
    assert behind_svd(weight, plain, None, "up") is None


def test_all_terms_and_all_their_numbers_count():
    """A few entries beside factors are measured against SVD of the rank that both together could pay for."""
    low = truncated(2)
    left = WEIGHT - np.asarray(low.materialize(), np.float64)
    entries = 36
    places = np.argsort(-np.abs(left.reshape(E, -1)), axis=1)[:, : entries // E]
    sparse = Sparse(
        values=jnp.asarray(np.take_along_axis(left.reshape(E, -1), places, 1).reshape(1, -1), jnp.float32),
        indices=jnp.asarray(places.reshape(1, -1), jnp.int32),
        counts=jnp.full((1, E), entries // E, jnp.int32),
        experts=E,
        out=P,
        in_=Q,
    )
    own, rival, _ = errors((low, sparse), None)
    assert count((low, sparse)).numbers // (E * (P + Q)) == 3
    found = behind_svd(jnp.asarray(WEIGHT, jnp.float32), (low, sparse), None, "down")
    assert (found is not None) == (own > TOLERANCE * rival)
    assert behind_svd(jnp.asarray(WEIGHT, jnp.float32), (low,), None, "down") is None


def test_nothing_is_behind_where_nothing_is_lost():
    weight = jnp.asarray(WEIGHT, jnp.float32)
    assert behind_svd(weight, (Dense(weight=weight),), None, "up") is None
    zeros = LowRank(left=jnp.zeros((E, P, 1)), right=jnp.zeros((E, 1, Q)))
    assert behind_svd(jnp.zeros((E, P, Q)), (zeros,), None, "up") is None


def test_improved_mobe_stores_svd_where_that_is_closer(tmp_path):
    """A start without steps loses to SVD; published MoBE says so and stays what it is."""
    checkpoint = Checkpoint.open(short_demo())
    stored = {}
    for setting, ratio in (("improved", 0.4), ("paper", 0.2)):
        chosen = MOBE.settings(setting=setting, steps=0)
        plan = make_plan(checkpoint, MOBE, chosen, ratio=ratio)
        most = plan.sizes.after.model.numbers
        report = compress(checkpoint, tmp_path / setting, plan)
        kinds = {outcome["kind"] for outcome in report["outcomes"]}
        stored[setting] = {
            term["kind"] for layer in report["layers"] for own in layer["projections"].values() for term in own["terms"]
        }
        assert kinds & {"svd_instead", "behind_svd"} == {"svd_instead" if setting == "improved" else "behind_svd"}
        assert most - 2 * 2 * 256 < report["parameters"]["after"] <= most
        errors = [own["error"] for layer in report["layers"] for own in layer["projections"].values()]
        if setting == "improved":
            plain = make_plan(checkpoint, SVD, SVD.settings(), ratio=ratio)
            rival = compress(checkpoint, tmp_path / "svd", plain)
            others = [own["error"] for layer in rival["layers"] for own in layer["projections"].values()]
            np.testing.assert_allclose(errors, others, rtol=0.02)
    assert "grouped" in stored["improved"]
    assert stored["paper"] == {"shared_basis", "dense"}


def test_svd_instead_does_not_hide_what_the_fit_did(tmp_path):
    """Every expert is steep in its own directions: long steps leave the valley, and SVD is closer all the same."""
    folder = write(tmp_path / "steep", num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16)
    rng = np.random.default_rng(0)
    made = load_file(folder / "model.safetensors")
    for name, array in made.items():
        if ".experts." in name:
            left, _, right = np.linalg.svd(rng.normal(size=array.shape), full_matrices=False)
            made[name] = (left * np.arange(1, 17.0) ** -2 @ right).astype(array.dtype)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    report = compress(checkpoint, tmp_path / "out", make_plan(checkpoint, MOBE, MOBE.settings(steps=60), ratio=0.25))
    kinds = {}
    for outcome in report["outcomes"]:
        kinds.setdefault(outcome["target"], set()).add(outcome["kind"])
    assert any("svd_instead" in own and own & {"lower_rate", "descent_returned"} for own in kinds.values()), kinds


def test_no_svd_where_a_rank_for_every_expert_is_too_much():
    weight = jnp.asarray(WEIGHT, jnp.float32)
    one = (LowRank(left=jnp.zeros((E, P, 1)), right=jnp.zeros((E, 1, Q))),)
    # The ranks have to be stored too, for which one rank of each leaves no room.
    assert svd_instead(weight, one, Evidence(target="up")) is None
