"""The head in blocks of the vocabulary against the whole of the logits in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.evaluation.scoring import Side, compare, score
from jaxmoe.model.spec import DecoderSpec, Norm

TOKENS, HIDDEN, VOCABULARY = 7, 6, 53
SPEC = DecoderSpec(vocabulary=VOCABULARY, hidden=HIDDEN, layers=(), norm=Norm())


def draw(seed: int, scale: float = 3.0):
    """Return hidden states and a head that spreads the logits."""
    rng = np.random.default_rng(seed)
    x, norm, weight = (
        rng.normal(size=(TOKENS, HIDDEN)),
        1 + 0.1 * rng.normal(size=HIDDEN),
        scale * rng.normal(size=(VOCABULARY, HIDDEN)),
    )
    return x.astype(np.float32), {"norm.weight": norm.astype(np.float32), "head.weight": weight.astype(np.float32)}


def log_softmax(x, ends):
    """Return log-probabilities in float64, computed without jaxmoe."""
    x, norm, weight = (np.asarray(a, np.float64) for a in (x, ends["norm.weight"], ends["head.weight"]))
    logits = (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm) @ weight.T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


TARGETS = np.array([0, 9, 10, 19, 50, 52, 31])


@pytest.mark.parametrize("block", [1, 10, 50, 53, 1024])
def test_blocks_give_what_all_logits_give(block):
    x, ends = draw(0)
    expected = log_softmax(x, ends)
    found = jax.jit(lambda x: score(Side(x, ends, SPEC), jnp.asarray(TARGETS), block=block))(x)
    np.testing.assert_allclose(found.nats, -expected[np.arange(TOKENS), TARGETS], rtol=2e-5)
    np.testing.assert_array_equal(found.top, expected.argmax(-1))


@pytest.mark.parametrize("block", [10, 4096])
def test_divergence(block):
    (x, ends), (y, others) = draw(0), draw(1)
    q, p = log_softmax(x, ends), log_softmax(y, others)
    run = jax.jit(lambda a, b: compare(Side(a, ends, SPEC), Side(b, others, SPEC), jnp.asarray(TARGETS), block=block))
    found = run(x, y)
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(-1), rtol=2e-5)
    np.testing.assert_allclose(found.scores.nats, -q[np.arange(TOKENS), TARGETS], rtol=2e-5)
    np.testing.assert_allclose(found.original.nats, -p[np.arange(TOKENS), TARGETS], rtol=2e-5)
    np.testing.assert_array_equal(found.original.top, p.argmax(-1))


def test_a_small_divergence_is_not_lost():
    (x, ends), (_, noise) = draw(0), draw(1, 1e-3)
    others = {**ends, "head.weight": ends["head.weight"] + noise["head.weight"]}
    p, q = log_softmax(x, ends), log_softmax(x, others)
    expected = (np.exp(p) * (p - q)).sum(-1)
    found = compare(
        Side(jnp.asarray(x), others, SPEC), Side(jnp.asarray(x), ends, SPEC), jnp.asarray(TARGETS), block=10
    )
    assert expected.max() < 1e-5
    np.testing.assert_allclose(found.divergence, expected, atol=2e-6)


def test_of_equal_logits_the_first_is_the_top():
    ends = {"norm.weight": np.ones(HIDDEN, np.float32), "head.weight": np.zeros((VOCABULARY, HIDDEN), np.float32)}
    found = score(Side(jnp.ones((TOKENS, HIDDEN)), ends, SPEC), jnp.asarray(TARGETS), block=10)
    np.testing.assert_array_equal(found.top, 0)
    np.testing.assert_allclose(found.nats, np.log(VOCABULARY), rtol=1e-6)


@pytest.mark.parametrize("entry", [3, VOCABULARY - 1])
def test_damage_anywhere_in_the_head_shows(entry):
    x, ends = draw(0)
    ends["head.weight"][entry, 2] = np.nan
    found = score(Side(jnp.asarray(x), ends, SPEC), jnp.asarray(TARGETS), block=10)
    assert not np.isfinite(found.nats).any()
