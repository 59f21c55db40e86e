"""Compressed Experts against a float64 loop over tokens, with every kind of router, and the method's invariants."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank, Shared, SharedBasis
from jaxmoe.model.compressed_experts import by_weight, check_main, divide, input_scales, mixing, ones, vector_shapes
from jaxmoe.model.layer import Attended, finish
from jaxmoe.model.routing import Routes, route
from jaxmoe.model.spec import Attention, DenseBlock, ExpertBlock, LayerSpec, Norm, Router

# More intermediate than hidden numbers, which the published code cannot hold.
SIZES = LayerShape(experts=8, hidden=10, intermediate=14)
TOKENS = 23

ROUTERS = {
    "softmax": Router(experts=8, top_k=4),
    "normalised": Router(experts=8, top_k=4, normalize=True),
    "chosen": Router(experts=8, top_k=3, score="chosen", bias=True),
    "sigmoid with a selection bias": Router(
        experts=8, top_k=4, score="sigmoid", selection_bias=True, normalize=True, scale=2.5
    ),
    "groups": Router(experts=8, top_k=3, groups=4, kept_groups=2, scale=1.5),
    "sparse mixer": Router(experts=8, top_k=2, score="sparse_mixer", jitter=0.2),
}


def array(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def terms(rng, kind: str) -> CompressedLayer:
    """Return random terms: dense ones, or bases for all experts, mixtures and factors, of gate and up together too."""

    def low_rank(target):
        experts, out, in_ = SIZES.of(target)
        return LowRank(left=array(rng, experts, out, 3, scale=0.3), right=array(rng, experts, 3, in_))

    def shared(target):
        _, out, in_ = SIZES.of(target)
        return Shared.build(array(rng, out, in_, scale=0.3), experts=SIZES.experts)

    def basis(target):
        experts, out, in_ = SIZES.of(target)
        return SharedBasis(
            coefficients=array(rng, experts, out, 4, scale=0.3),
            bases=array(rng, 2, 4, in_),
            mixing=array(rng, experts, 2),
            mean=None,
            activation="silu",
            transposed=False,
        )

    layer = {
        "dense": lambda: {name: (Dense(weight=array(rng, *SIZES.of(name), scale=0.3)),) for name in SIZES.projections},
        "base and factors": lambda: {
            "gate_up": (shared("gate_up"), low_rank("gate_up")),
            "down": (shared("down"), low_rank("down")),
        },
        "mixtures": lambda: {name: (basis(name),) for name in ("gate_up", "down")},
    }[kind]()
    return CompressedLayer(terms=layer, sizes=SIZES).check()


def parameters(rng, router: Router, kind: str = "dense") -> dict:
    arrays = {
        "router.weight": array(rng, router.experts, SIZES.hidden),
        "router.bias": array(rng, router.experts),
        "router.selection_bias": array(rng, router.experts),
        "experts": terms(rng, kind),
    }
    return arrays | {name: 1 + array(rng, *shape, scale=0.4) for name, shape in vector_shapes(SIZES).items()}


def spec_of(router: Router, **block) -> LayerSpec:
    attention = Attention(heads=1, kv_heads=1, head=10, value=10, rotary=None, scale=1.0)
    experts = ExpertBlock(shape=SIZES, router=router, **block)
    return LayerSpec(hidden=SIZES.hidden, attention=attention, feed_forward=experts, norm=Norm())


def run(x, arrays, spec: LayerSpec):
    """Return what the feed-forward block adds, by the second half of the layer."""
    block = spec.feed_forward
    routes = route(x, arrays, block.router)
    if block.running < block.router.top_k:
        routes = by_weight(routes)
    zeros = jnp.zeros((1, *x.shape))
    return finish(Attended(zeros, x, routes), arrays, spec)[0][0]


def oracle(x, arrays, router: Router, main: int, renorm: str = "none") -> np.ndarray:
    """Return the block's sum by the paper's formulas, one token and one expert after the other, in float64."""
    weights = {name: np.asarray(arrays["experts"].materialize(name), np.float64) for name in SIZES.projections}
    vectors = {name: np.asarray(arrays[f"auxiliary.{name}"], np.float64) for name in SIZES.projections}
    chosen = route(x, arrays, router)
    out = np.zeros(x.shape)
    for token, (experts, own) in enumerate(zip(np.asarray(chosen.experts), np.asarray(chosen.weights, np.float64))):
        pairs = sorted(zip(-own, experts))
        first, rest = pairs[:main], pairs[main:]
        left = sum(-w for w, _ in rest)
        theta = {name: sum(-w / left * vectors[name][e] for w, e in rest) for name in vectors}
        factor = sum(w for w, _ in pairs) / sum(w for w, _ in first) if renorm == "main" else 1.0
        row = np.asarray(x[token], np.float64)
        for w, e in first:
            gate = weights["gate"][e] @ (row * theta["gate"])
            up = weights["up"][e] @ (row * theta["up"])
            hidden = gate / (1 + np.exp(-gate)) * up * theta["down"]
            out[token] += -w * factor * (weights["down"][e] @ hidden)
    return out


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_a_loop_over_tokens(rng, name):
    router = ROUTERS[name]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    for main in range(1, router.top_k):
        for renorm in ("none", "main"):
            found = run(x, arrays, spec_of(router, main=main, renorm=renorm))
            np.testing.assert_allclose(found, oracle(x, arrays, router, main, renorm), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["base and factors", "mixtures"])
def test_scales_the_inputs_of_every_term(rng, kind):
    """Also where gate and up share a term, or all experts do."""
    router = ROUTERS["normalised"]
    arrays, x = parameters(rng, router, kind), array(rng, TOKENS, SIZES.hidden)
    found = run(x, arrays, spec_of(router, main=2))
    np.testing.assert_allclose(found, oracle(x, arrays, router, 2), rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_ones_leave_the_auxiliary_experts_out(rng, name):
    """The sum of all experts less those of the auxiliary ones: weights stay as they are, normalised over all."""
    router = ROUTERS[name]
    arrays, x = parameters(rng, router) | ones(SIZES), array(rng, TOKENS, SIZES.hidden)
    main = router.top_k - 1
    _, auxiliary = divide(by_weight(route(x, arrays, router)), main)
    everything = run(x, arrays, spec_of(router))
    left_out = np.zeros(x.shape)
    for token, (expert, weight) in enumerate(zip(auxiliary.experts[:, 0], auxiliary.weights[:, 0])):
        dense = {name: np.asarray(arrays["experts"].materialize(name))[expert] for name in SIZES.projections}
        gate = dense["gate"] @ x[token]
        left_out[token] = weight * (dense["down"] @ (gate / (1 + np.exp(-gate)) * (dense["up"] @ x[token])))
    found = run(x, arrays, spec_of(router, main=main))
    np.testing.assert_allclose(found, everything - left_out, rtol=1e-4, atol=1e-5)


def test_no_auxiliary_experts_is_the_original(rng):
    router = ROUTERS["softmax"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    np.testing.assert_array_equal(run(x, arrays, spec_of(router, main=4)), run(x, arrays, spec_of(router)))


def test_order_of_experts_does_not_matter(rng):
    router = ROUTERS["softmax"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    order = rng.permutation(SIZES.experts)
    turned = {name: rows[order] for name, rows in arrays.items() if name != "experts"}
    turned["experts"] = jax.tree.map(lambda weight: weight[order], arrays["experts"])
    spec = spec_of(router, main=2)
    np.testing.assert_allclose(run(x, turned, spec), run(x, arrays, spec), rtol=1e-5, atol=1e-6)


def test_equal_vectors_fold_into_the_matrices(rng):
    router = ROUTERS["normalised"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    rows = {name: arrays[name][:1] for name in vector_shapes(SIZES)}
    scaled = {
        name: (Dense(weight=arrays["experts"].materialize(name) * rows[f"auxiliary.{name}"]),)
        for name in SIZES.projections
    }
    folded = arrays | ones(SIZES) | {"experts": CompressedLayer(terms=scaled, sizes=SIZES)}
    equal = arrays | {name: jnp.broadcast_to(row, vector_shapes(SIZES)[name]) for name, row in rows.items()}
    spec = spec_of(router, main=2)
    np.testing.assert_allclose(run(x, equal, spec), run(x, folded, spec), rtol=1e-4, atol=1e-5)


def test_shared_experts_read_the_plain_tokens(rng):
    router = ROUTERS["softmax"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    for name in ("gate", "up", "down"):
        _, out, in_ = SIZES.of(name)
        arrays[f"shared.{name}.weight"] = array(rng, out, in_, scale=0.3)
    shared = DenseBlock(intermediate=SIZES.intermediate)
    both, alone = (run(x, arrays, spec_of(router, main=1, shared=own)) for own in (shared, None))
    gate, up = x @ arrays["shared.gate.weight"].T, x @ arrays["shared.up.weight"].T
    expected = (jax.nn.silu(gate) * up) @ arrays["shared.down.weight"].T
    np.testing.assert_allclose(both - alone, expected, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_lower_index():
    routes = by_weight(Routes(jnp.array([[5, 2, 7, 0]]), jnp.array([[0.2, 0.3, 0.3, 0.2]])))
    assert routes.experts.tolist() == [[2, 7, 0, 5]]


def test_vanishing_weights_stay_finite():
    routes = Routes(jnp.array([[1, 0], [2, 1]]), jnp.array([[0.0, 0.0], [1e-9, 3e-9]]))
    np.testing.assert_allclose(mixing(routes, 3), [[0.5, 0.5, 0], [0, 0.75, 0.25]], rtol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(mixing(routes._replace(weights=w), 3) ** 2))(routes.weights)
    assert np.isfinite(gradient).all()


def test_averages_in_float32(rng):
    """Ones stay one within rounding where weights and vectors come in bfloat16."""
    weights = jnp.asarray(rng.random((64, 6)), jnp.bfloat16)
    chosen = jnp.asarray([rng.permutation(8)[:6] for _ in range(64)])
    vectors = {name: own.astype(jnp.bfloat16) for name, own in ones(SIZES).items()}
    for scale in input_scales(Routes(chosen, weights), vectors).values():
        assert scale.dtype == jnp.float32
        assert np.abs(np.asarray(scale) - 1).max() <= 1e-6


def test_one_auxiliary_expert_gives_the_router_no_gradient(rng):
    router = ROUTERS["normalised"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    routes = by_weight(route(x, arrays, router))

    def total(weights, main):
        _, auxiliary = divide(routes._replace(weights=weights), main)
        return sum(jnp.sum(scale**2) for scale in input_scales(auxiliary, arrays).values())

    assert not np.any(jax.grad(total)(routes.weights, 3))
    assert np.abs(jax.grad(total)(routes.weights, 2)).max() > 1e-1


def test_gradients_reach_auxiliary_experts_alone_and_agree_with_differences(rng):
    router = ROUTERS["softmax"]
    arrays, x = parameters(rng, router), array(rng, 3, SIZES.hidden)
    spec = spec_of(router, main=2)
    vectors = {name: arrays[name] for name in vector_shapes(SIZES)}
    direction = array(rng, 3, SIZES.hidden)

    def loss(vectors):
        return jnp.sum(direction * run(x, arrays | vectors, spec))

    gradients = jax.grad(loss)(vectors)
    _, auxiliary = divide(by_weight(route(x, arrays, router)), 2)
    reached = set(np.asarray(auxiliary.experts).reshape(-1).tolist())
    assert 2 <= len(reached) < SIZES.experts
    for name, gradient in gradients.items():
        assert set(np.flatnonzero(np.abs(gradient).max(1)).tolist()) == reached
        expert, step = next(iter(reached)), 1e-3
        moved = [
            {**arrays, name: np.asarray(arrays[name], np.float64) + sign * step * np.eye(8)[expert][:, None]}
            for sign in (1, -1)
        ]
        ahead, behind = (np.sum(np.asarray(direction) * oracle(x, own, router, 2)) for own in moved)
        assert np.isclose(np.sum(gradient[expert]), (ahead - behind) / (2 * step), rtol=2e-3, atol=1e-4)


def test_jitted_blocks_hold_main_assignments_alone(rng):
    """The same numbers compiled, with blocks for two of four experts of a token."""
    from jaxmoe.streaming import block_shape

    router = ROUTERS["softmax"]
    arrays, x = parameters(rng, router), array(rng, TOKENS, SIZES.hidden)
    spec = spec_of(router, main=2)
    state = Attended(jnp.zeros((1, *x.shape)), x, by_weight(route(x, arrays, router)))
    shape, whole = block_shape(state, spec), block_shape(state, spec_of(router))
    assert shape is not None
    assert whole is not None
    assert shape.rows * shape.blocks < whole.rows * whole.blocks
    compiled = jax.jit(lambda state, arrays: finish(state, arrays, spec, shape=shape)[0][0])
    np.testing.assert_allclose(compiled(state, arrays), run(x, arrays, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("main", "top_k", "word"), [(0, 4, "1 to 3"), (4, 4, "1 to 3"), (1, 1, "none to spare")])
def test_refuses_impossible_numbers(main, top_k, word):
    with pytest.raises(JaxmoeError, match=word):
        check_main(main, top_k)


def test_experts_without_gate_have_no_vector_for_it():
    assert set(vector_shapes(SIZES._replace(gated=False))) == {"auxiliary.up", "auxiliary.down"}
    assert replace(spec_of(ROUTERS["softmax"]).feed_forward, main=3).running == 3
