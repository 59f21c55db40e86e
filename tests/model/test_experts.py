"""The experts' products against a plain float64 loop over tokens, whatever is stored and however tokens are routed."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossing import crossed

from jaxmoe.factors import CompressedLayer, Dense, Grouped, Hashed, LayerShape, LowRank, Shared, SharedBasis, Sparse
from jaxmoe.model import experts
from jaxmoe.model.blocked import BlockShape, block_rows, blocks_needed, most_blocks
from jaxmoe.model.experts import _blocked, _ragged, run_experts
from jaxmoe.model.spec import Gate

SIZES = LayerShape(experts=6, hidden=12, intermediate=10)
TOKENS, CHOICES = 37, 2
BOUNDED = Gate(activation="scaled_swish", limit=0.8, alpha=1.702, offset=1.0)


def low_rank(rng, target: str) -> LowRank:
    experts, out, in_ = SIZES.of(target)
    return LowRank(left=rng.normal(size=(experts, out, 3)), right=rng.normal(size=(experts, 3, in_)))


def basis(rng, target: str, transposed: bool) -> SharedBasis:
    experts, out, in_ = SIZES.of(target)
    rows, columns = (in_, out) if transposed else (out, in_)
    return SharedBasis(
        coefficients=rng.normal(size=(experts, rows, 4)),
        bases=rng.normal(size=(2, 4, columns)),
        mixing=rng.normal(size=(experts, 2)),
        mean=rng.normal(size=(1, 1)),
        activation="tanh",
        transposed=transposed,
    )


def dense(rng, target: str) -> Dense:
    return Dense(weight=rng.normal(size=SIZES.of(target)))


def grouped(rng, target: str, mixed: bool = False) -> Grouped:
    experts, out, in_ = SIZES.of(target)
    return Grouped.build(
        rng.normal(size=(experts, out, 4)),
        rng.normal(size=(3, 4, in_)),
        [4, 1, 2],
        size=2,
        order=rng.permutation(experts),
        mixing=rng.normal(size=(experts, 3)) if mixed else None,
        activation="tanh" if mixed else "identity",
    )


def shared(rng, target: str, kept=None, axis: str = "out", dynamic: int = 0) -> Shared:
    experts, out, in_ = SIZES.of(target)
    parts = 2 if target == "gate_up" else 1
    weight = rng.normal(size=(out, in_))
    return Shared.build(weight, experts=experts, kept=kept, axis=axis, parts=parts, dynamic=dynamic)


def hashed(rng, target: str) -> Hashed:
    abstract = Hashed.abstract(SIZES.of(target), "float32", buckets=9, size=4)
    return replace(abstract, values=3 * rng.normal(size=abstract.values.shape), seed=np.array([[5]], np.int32))


def sparse(rng, target: str) -> Sparse:
    experts, out, in_ = SIZES.of(target)
    indices = np.concatenate([rng.permutation(out * in_)[:7] for _ in range(experts)])
    values, counts = 3 * rng.normal(size=(1, len(indices))), np.full((1, experts), 7, np.int32)
    return Sparse(
        values=values, indices=indices.astype(np.int32)[None], counts=counts, experts=experts, out=out, in_=in_
    )


def layer_of(kind: str) -> CompressedLayer:
    """Return random terms in float32."""
    rng = np.random.default_rng(7)
    terms = {
        "dense": lambda: {name: (dense(rng, name),) for name in ("gate", "up", "down")},
        "low rank": lambda: {name: (low_rank(rng, name),) for name in ("gate_up", "down")},
        "basis": lambda: {name: (basis(rng, name, False),) for name in ("gate_up", "down")},
        "transposed basis": lambda: {name: (basis(rng, name, True),) for name in ("gate", "up", "down")},
        "sums": lambda: {
            "gate_up": (basis(rng, "gate_up", True), low_rank(rng, "gate_up")),
            "up": (low_rank(rng, "up"),),
            "down": (dense(rng, "down"), low_rank(rng, "down")),
        },
        "groups and residuals": lambda: {
            "gate": (grouped(rng, "gate"), hashed(rng, "gate")),
            "up": (grouped(rng, "up", mixed=True), sparse(rng, "up")),
            "down": (grouped(rng, "down"),),
        },
        "base and groups": lambda: {
            "gate_up": (shared(rng, "gate_up", [0, 3, 4, 9]), grouped(rng, "gate_up")),
            "up": (shared(rng, "up"),),
            "down": (shared(rng, "down", [1, 2, 7], "in"), low_rank(rng, "down"), shared(rng, "down", [0, 5])),
        },
        "base alone": lambda: {name: (shared(rng, name),) for name in ("gate", "up", "down")},
    }[kind]()
    layer = CompressedLayer(terms=terms, sizes=SIZES).check()

    def scaled(x):
        return jnp.asarray(x) if x.dtype == np.int32 else jnp.asarray(0.3 * x, jnp.float32)

    return jax.tree.map(scaled, layer)


KINDS = (
    "dense",
    "low rank",
    "basis",
    "transposed basis",
    "sums",
    "groups and residuals",
    "base and groups",
    "base alone",
)
WITH_BASE = KINDS[-2:]


def routing(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "all to one":
        return np.full((TOKENS, CHOICES), 4)
    if kind == "unused experts":
        return np.stack([np.full(TOKENS, 1), rng.integers(2, 4, TOKENS)], 1)
    return np.stack([rng.permutation(SIZES.experts)[:CHOICES] for _ in range(TOKENS)])


ROUTINGS = ("even", "all to one", "unused experts")


def inputs():
    return jnp.asarray(np.random.default_rng(5).normal(size=(TOKENS, SIZES.hidden)), jnp.float32)


def biases_of() -> dict[str, jax.Array]:
    rng = np.random.default_rng(6)
    sizes = {"gate": SIZES.intermediate, "up": SIZES.intermediate, "down": SIZES.hidden}
    return {name: jnp.asarray(rng.normal(size=(SIZES.experts, size)), jnp.float32) for name, size in sizes.items()}


def loop(x, chosen, layer, gate: Gate, biases):
    """Return intermediate activations and outputs, one token and one expert at a time."""
    weights = {name: np.asarray(layer.materialize(name), np.float64) for name in ("gate", "up", "down")}
    added = {name: np.asarray(biases.get(name, np.zeros((SIZES.experts, 1))), np.float64) for name in weights}
    inner = np.zeros((*chosen.shape, SIZES.intermediate))
    output = np.zeros((*chosen.shape, SIZES.hidden))
    for token, choices in enumerate(chosen):
        for place, expert in enumerate(choices):
            row = np.asarray(x[token], np.float64)
            first = weights["gate"][expert] @ row + added["gate"][expert]
            second = weights["up"][expert] @ row + added["up"][expert]
            if gate.limit is not None:
                first, second = np.minimum(first, gate.limit), np.clip(second, -gate.limit, gate.limit)
            inner[token, place] = (second + gate.offset) * first / (1 + np.exp(-gate.alpha * first))
            output[token, place] = weights["down"][expert] @ inner[token, place] + added["down"][expert]
    return inner, output


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "routed", "gate"), crossed(KINDS, ROUTINGS, (Gate(), BOUNDED)))
def test_equals_a_loop_over_tokens(kind, routed, gate):
    x, chosen, layer = inputs(), routing(routed), layer_of(kind)
    biases = biases_of() if gate.limit is not None else {}
    inner, output = loop(x, chosen, layer, gate, biases)
    found = run_experts(x, jnp.asarray(chosen), layer, gate, biases)
    close(found.intermediate, inner)
    close(found.output, output)
    compiled = jax.jit(run_experts, static_argnames="gate")(x, jnp.asarray(chosen), layer, gate, biases)
    close(compiled.output, output)


@pytest.mark.parametrize("routed", ROUTINGS)
def test_blocks_chosen_from_counts(routed):
    """Enough blocks for what was routed give the same as enough blocks for anything."""
    x, chosen, layer = inputs(), routing(routed), layer_of("dense")
    expected = run_experts(x, jnp.asarray(chosen), layer, Gate(), {})
    counts = np.bincount(chosen.reshape(-1), minlength=SIZES.experts)
    for rows in (1, 5, 8, 64):
        needed = blocks_needed(counts, rows)
        assert needed <= most_blocks(chosen.size, SIZES.experts, rows)
        assert needed * rows >= chosen.size
        found = run_experts(x, jnp.asarray(chosen), layer, Gate(), {}, BlockShape(rows, needed))
        close(found.output, np.asarray(expected.output))
        close(found.intermediate, np.asarray(expected.intermediate))


@pytest.mark.parametrize(("kind", "routed"), crossed(KINDS, ROUTINGS))
def test_sorted_rows_equal_blocks(kind, routed):
    """What runs on TPU, tried where there is none."""
    x, chosen, layer, biases = inputs(), jnp.asarray(routing(routed)), layer_of(kind), biases_of()
    rows = block_rows(chosen.size, SIZES.experts)
    shape = BlockShape(rows, most_blocks(chosen.size, SIZES.experts, rows))
    own, base = layer.split()
    once = base.sums(x, ("gate", "up"))
    blocked = _blocked({"gate_up": x}, {}, chosen, own, once, biases, {}, gate=BOUNDED, shape=shape)
    ragged = _ragged({"gate_up": x}, {}, chosen, own, once, biases, {}, gate=BOUNDED)
    for a, b in zip(ragged, blocked, strict=True):
        close(a, np.asarray(b))


@pytest.mark.parametrize(("kind", "routed"), crossed(KINDS, ROUTINGS))
def test_gradient_equals_that_of_dense_products(kind, routed):
    x, chosen, layer = inputs(), jnp.asarray(routing(routed)), layer_of(kind)
    target = jnp.asarray(np.random.default_rng(8).normal(size=(TOKENS, CHOICES, SIZES.hidden)), jnp.float32)

    def ours(x, layer):
        return jnp.sum(run_experts(x, chosen, layer, Gate(), {}).output * target)

    def plain(x, layer):
        gate, up, down = (layer.materialize(name) for name in ("gate", "up", "down"))
        first, second = (jnp.einsum("th,eih->tei", x, w, precision="highest") for w in (gate, up))
        out = jnp.einsum("tei,eoi->teo", jax.nn.silu(first) * second, down, precision="highest")
        return jnp.sum(jnp.take_along_axis(out, chosen[:, :, None], 1) * target)

    found = jax.jit(jax.grad(ours, (0, 1), allow_int=True))(x, layer)
    expected = jax.jit(jax.grad(plain, (0, 1), allow_int=True))(x, layer)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        scale = np.abs(a).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-4 * scale, err_msg=str(path))


def test_experts_without_tokens_get_no_gradient():
    x, chosen, layer = inputs(), jnp.asarray(routing("all to one")), layer_of("dense")
    grad = jax.grad(lambda own: jnp.sum(run_experts(x, chosen, own, Gate(), {}).output ** 2))(layer)
    for leaf in jax.tree.leaves(grad):
        sizes = np.abs(leaf).max((1, 2))
        assert sizes[4] > 0
        assert not np.delete(sizes, 4).any()


def weights_of():
    return jnp.asarray(np.random.default_rng(9).uniform(size=(TOKENS, CHOICES)), jnp.float32)


@pytest.mark.parametrize("gate", [Gate(), BOUNDED], ids=["silu", "bounded"])
@pytest.mark.parametrize("routed", ROUTINGS)
@pytest.mark.parametrize("kind", ["sums", *WITH_BASE])
def test_weighted_sum_equals_a_loop_over_tokens(kind, routed, gate):
    """Also with biases of down, whose weights need not add up to one."""
    x, chosen, layer, weights = inputs(), routing(routed), layer_of(kind), weights_of()
    biases = biases_of() if gate.limit is not None else {}
    _, output = loop(x, chosen, layer, gate, biases)
    run = jax.jit(run_experts, static_argnames=("gate", "shape"))
    found = run(x, jnp.asarray(chosen), layer, gate, biases, weights=weights)
    close(found.combined, np.einsum("tk,tkh->th", np.asarray(weights, np.float64), output))
    close(found.output, output)
    close(run(x, jnp.asarray(chosen), layer, gate, biases).combined, output.sum(1))


@pytest.mark.parametrize("kind", WITH_BASE)
def test_gradients_and_probes_of_a_base_equal_those_of_the_dense_layer(kind):
    """Every gradient with respect to tokens, weights and outputs, with terms for all experts or one matrix for each."""
    x, chosen, layer, weights = inputs(), jnp.asarray(routing("even")), layer_of(kind), weights_of()
    target = jnp.asarray(np.random.default_rng(8).normal(size=(TOKENS, SIZES.hidden)), jnp.float32)
    terms = {name: (Dense(weight=layer.materialize(name)),) for name in ("gate", "up", "down")}
    sizes = {"gate": SIZES.intermediate, "up": SIZES.intermediate, "down": SIZES.hidden}
    probes = {name: jnp.zeros((TOKENS, CHOICES, size)) for name, size in sizes.items()}

    def loss(x, weights, probes, own):
        rows = run_experts(x, chosen, own, BOUNDED, biases_of(), probes=probes, weights=weights)
        return jnp.sum(rows.combined * target)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    found = gradient(x, weights, probes, layer)
    expected = gradient(x, weights, probes, CompressedLayer(terms=terms, sizes=SIZES))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("ragged", [False, True])
def test_masked_channels_of_a_base_follow_from_the_tokens(ragged, monkeypatch):
    """Gate and up from the tokens as they come, down from the weighted sum of the activations, for outputs too."""
    rng = np.random.default_rng(2)
    terms = {
        "gate_up": (shared(rng, "gate_up", dynamic=4), low_rank(rng, "gate_up")),
        "down": (shared(rng, "down", dynamic=3), low_rank(rng, "down")),
    }
    terms = jax.tree.map(lambda x: jnp.asarray(0.3 * x, jnp.float32), terms)
    layer = CompressedLayer(terms=terms, sizes=SIZES).check()
    x, chosen, weights = inputs() * jnp.linspace(0.2, 2, SIZES.hidden), routing("even"), weights_of()
    if ragged:
        monkeypatch.setattr(experts, "_blocked", lambda *args, shape, **options: _ragged(*args, **options))
    found = run_experts(x, jnp.asarray(chosen), layer, Gate(), {}, weights=weights)

    def without(term, rows):
        scores = np.linalg.norm(term.weight, axis=0) * np.linalg.norm(rows, axis=0)
        return Dense(weight=np.where(np.argsort(np.argsort(scores)) < term.dynamic, 0, term.materialize()))

    first = without(terms["gate_up"][0], np.asarray(x, np.float64))
    plain = CompressedLayer(terms={**terms, "gate_up": (first, terms["gate_up"][1])}, sizes=SIZES)
    inner, _ = loop(x, chosen, plain, Gate(), {})
    entered = np.einsum("tk,tkf->tf", np.asarray(weights, np.float64), inner)
    plain = CompressedLayer(
        terms={**plain.terms, "down": (without(terms["down"][0], entered), terms["down"][1])}, sizes=SIZES
    )
    _, output = loop(x, chosen, plain, Gate(), {})
    close(found.intermediate, inner)
    close(found.output, output)
    close(found.combined, np.einsum("tk,tkh->th", np.asarray(weights, np.float64), output))


def operations(layer, tokens=64) -> float:
    """Count the floating-point operations of the compiled weighted sum."""
    chosen = jnp.asarray(np.arange(tokens * CHOICES).reshape(tokens, CHOICES) % SIZES.experts)
    x, weights = jnp.ones((tokens, SIZES.hidden)), jnp.ones((tokens, CHOICES))

    def run(x, weights, own):
        return run_experts(x, chosen, own, Gate(), {}, weights=weights).combined

    return jax.jit(run).lower(x, weights, layer).compile().cost_analysis()["flops"]


def test_a_base_costs_one_product_for_every_token():
    rng = np.random.default_rng(0)
    low = {name: (low_rank(rng, name),) for name in ("gate_up", "down")}
    base = {name: (shared(rng, name),) for name in ("gate_up", "down")}
    alone = operations(CompressedLayer(terms=low, sizes=SIZES))
    both = operations(CompressedLayer(terms={name: low[name] + base[name] for name in low}, sizes=SIZES))
    once = 2 * 64 * 3 * SIZES.hidden * SIZES.intermediate
    # Beside the products: sums of both terms and the combined activations, a few for every number of a row.
    assert once <= both - alone < 1.25 * once


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmoe.factors import CompressedLayer, Dense, Grouped, Hashed, LayerShape, LowRank, Shared, SharedBasis, Sparse
from jaxmoe.model.experts import run_experts
from jaxmoe.model.spec import Gate

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
sizes = LayerShape(experts=16, hidden=12, intermediate=10)
draw = lambda *shape: (0.3 * rng.normal(size=shape)).astype(np.float32)
gate = LowRank(left=draw(16, 10, 3), right=draw(16, 3, 12))
up = SharedBasis(coefficients=draw(16, 10, 4), bases=draw(2, 4, 12), mixing=draw(16, 2), activation="tanh")
down = Dense(weight=draw(16, 12, 10))
layer = CompressedLayer(terms={"gate": (gate,), "up": (up,), "down": (down,)}, sizes=sizes).check()
x, chosen = draw(64, 12), np.stack([rng.permutation(16)[:2] for _ in range(64)])

run = jax.jit(lambda x, layer: run_experts(x, chosen, layer, Gate(), {}).output)
grad = jax.jit(jax.grad(lambda layer: jnp.sum(run(x, layer) ** 2)))
spread = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("expert") if leaf.shape[0] == 16 else P()))
sharded = jax.tree.map(spread, layer)
assert len(sharded.terms["down"][0].weight.sharding.device_set) == 8
alone, together = run(x, layer), run(x, sharded)
np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
for a, b in zip(jax.tree.leaves(grad(layer)), jax.tree.leaves(grad(sharded)), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
print("equal")
"""


def test_eight_devices_equal_one():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    # Eight devices that wait for each other need as many threads, however few cores there are.
    environment["NPROC"] = "32"
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == "equal", ran.stderr
