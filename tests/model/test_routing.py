"""Routing against transformers' router of every architecture, against plain loops in float64, and its tie rule."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import _CONFIGS, EXPERTS, HIDDEN, load_tiny, save_tiny

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.model.routing import route
from jaxmoe.model.spec import ExpertBlock, Router

TOKENS, CHOICES = 4096, 4
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GROUPS = {"n_group": 4, "topk_group": 2}

# The path of the router in transformers' layer, and further settings.
ROUTERS: dict[str, tuple[str, dict]] = {
    "mixtral": ("mlp.gate", {}),
    "qwen2_moe": ("mlp.gate", {"norm_topk_prob": False}),
    "qwen3_moe": ("mlp.gate", {"norm_topk_prob": True}),
    "olmoe": ("mlp.gate", {"norm_topk_prob": False}),
    "flex_olmo": ("mlp.gate", {"norm_topk_prob": True}),
    "phimoe": ("mlp.router", {"num_experts_per_tok": 2, "router_jitter_noise": 0.05}),
    "deepseek_v2": ("mlp.gate", {**_GROUPS, "routed_scaling_factor": 16.0}),
    "deepseek_v3": ("mlp.gate", {**_GROUPS, "routed_scaling_factor": 2.5}),
    "kimi_k2": ("mlp.gate", {"routed_scaling_factor": 2.827}),
    "glm4_moe": ("mlp.gate", {**_GROUPS, "norm_topk_prob": False}),
    "dots1": ("mlp.gate", {**_GROUPS, "norm_topk_prob": True}),
    "minimax_m2": ("mlp.gate", {}),
    "gpt_oss": ("mlp.router", {}),
    "ernie4_5_moe": ("mlp.gate", {"moe_k": 4}),
    "hunyuan_v1_moe": ("mlp.gate", {"moe_topk": 4}),
    "granitemoe": ("block_sparse_moe.router", {}),
    "granitemoeshared": ("block_sparse_moe.router", {}),
    "glm4_moe_lite": ("mlp.gate", {**_GROUPS, "routed_scaling_factor": 1.8}),
    "solar_open": ("mlp.gate", _GROUPS),
    "exaone_moe": ("mlp.gate", _GROUPS),
    "hy_v3": ("mlp.gate", {"router_scaling_factor": 2.826}),
    "mimo_v2_flash": ("mlp.gate", _GROUPS),
    "cohere2_moe": ("mlp.gate", {"expert_selection_fn": "sigmoid"}),
    "afmoe": ("mlp.router", {"route_scale": 2.5}),
}


def saved(family: str, folder: Path) -> StoredModel:
    """Write a tiny model with 16 experts, of which every token chooses 4, and open it."""
    names = {name: 16 for name in _EXPERTS if _CONFIGS[family].get(name) == EXPERTS}
    save_tiny(family, folder, **{**names, "num_experts_per_tok": CHOICES, **ROUTERS[family][1]})
    return StoredModel(folder)


@pytest.mark.parametrize("family", ROUTERS)
def test_equals_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    stored = saved(family, tmp_path)
    last = len(stored.spec.layers) - 1
    block = stored.spec.layers[last].feed_forward
    assert isinstance(block, ExpertBlock)
    spec = block.router
    assert (spec.experts, spec.top_k) == (16, 2 if family == "phimoe" else CHOICES)
    x = np.random.default_rng(1).normal(size=(TOKENS, HIDDEN)).astype(np.float32)

    path = ROUTERS[family][0]
    layer = load_tiny(tmp_path, dtype="float32").model.layers[last]
    biases = {"minimax_m2": "e_score_correction_bias", "hy_v3": "e_score_correction_bias", "afmoe": "expert_bias"}
    extra = (getattr(layer.mlp, biases[family]),) if family in biases else ()
    tokens = torch.tensor(x)[None] if family == "afmoe" else torch.tensor(x)
    with torch.no_grad():
        _, weights, experts = layer.get_submodule(path)(tokens, *extra)

    found = jax.jit(route, static_argnames="spec")(x, stored.layer(last), spec=spec)
    expected, order = np.sort(experts.numpy(), -1), np.argsort(experts.numpy(), -1)
    np.testing.assert_array_equal(np.sort(found.experts, -1), expected)
    ours = np.take_along_axis(np.asarray(found.weights), np.argsort(found.experts, -1), -1)
    theirs = np.take_along_axis(weights.float().numpy(), order, -1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=7e-6 if spec.scale > 1 else 1e-6)
    # A bias that changes nobody's choice would test nothing.
    if spec.selection_bias:
        assert np.abs(stored.layer(last)["router.selection_bias"]).max() > 0.05
    assert len(np.unique(expected)) == 16


def oracle(logits: np.ndarray, bias: np.ndarray, spec: Router) -> tuple[list[int], list[float]]:
    """Route one token in float64, step by step as the papers say it."""
    if spec.score == "sparse_mixer":
        return sparse_mixer(logits, spec.jitter)
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum() if spec.score == "softmax" else 1 / (1 + np.exp(-logits))
    worth = {expert: scores[expert] + (bias[expert] if spec.selection_bias else 0) for expert in range(spec.experts)}
    size = spec.experts // spec.groups
    groups = [[worth[g * size + k] for k in range(size)] for g in range(spec.groups)]
    value = [max(g) if spec.group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
    kept = sorted(range(spec.groups), key=lambda g: -value[g])[: spec.kept_groups]
    open_ = [expert for expert in worth if expert // size in kept]
    chosen = sorted(open_, key=lambda expert: -worth[expert])[: spec.top_k]
    weights = [scores[expert] for expert in chosen]
    if spec.normalize:
        weights = [w / (sum(weights) + spec.epsilon) for w in weights]
    return chosen, [w * spec.scale for w in weights]


def sparse_mixer(logits: np.ndarray, jitter: float) -> tuple[list[int], list[float]]:
    chosen: list[int] = []
    weights = []
    for _ in range(2):
        left = [expert for expert in range(len(logits)) if expert not in chosen]
        best = max(left, key=lambda expert: logits[expert])
        top = logits[best]
        near = [expert for expert in left if (top - logits[expert]) / max(abs(logits[expert]), top) <= 2 * jitter]
        weights.append(1 / sum(np.exp(logits[expert] - top) for expert in near))
        chosen.append(best)
    return chosen, weights


ORACLES = {
    "sparse_mixer": Router(experts=16, top_k=2, score="sparse_mixer", jitter=0.05),
    "groups by their best": Router(experts=16, top_k=4, groups=4, kept_groups=2, scale=16.0),
    "groups by their best two": Router(
        experts=16,
        top_k=4,
        score="sigmoid",
        selection_bias=True,
        groups=4,
        group_score="top2",
        kept_groups=2,
        normalize=True,
        epsilon=1e-20,
        scale=2.5,
    ),
    "biased softmax": Router(experts=16, top_k=4, selection_bias=True, normalize=True),
    "sigmoid": Router(experts=16, top_k=4, score="sigmoid", selection_bias=True, normalize=True),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_plain_loops(name):
    spec = ORACLES[name]
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(512, 24)), rng.normal(size=(16, 24)) * 0.4
    bias = rng.normal(size=16) * 0.2
    parameters = {"router.weight": jnp.asarray(weight, jnp.float32)}
    if spec.selection_bias:
        parameters["router.selection_bias"] = jnp.asarray(bias, jnp.float32)
    found = route(jnp.asarray(x, jnp.float32), parameters, spec)
    for token in range(len(x)):
        experts, weights = oracle(weight @ x[token], bias, spec)
        assert found.experts[token].tolist() == experts
        np.testing.assert_allclose(found.weights[token], weights, rtol=2e-5)


ALL_RULES = [
    *ORACLES.values(),
    Router(experts=16, top_k=4),
    Router(experts=16, top_k=4, score="chosen", bias=True),
]


@pytest.mark.parametrize("spec", ALL_RULES, ids=lambda spec: f"{spec.score}-{spec.groups}")
def test_ties_go_to_the_lowest_index(spec):
    parameters = {
        "router.weight": jnp.zeros((16, 8)),
        "router.bias": jnp.zeros(16),
        "router.selection_bias": jnp.zeros(16),
    }
    found = route(jnp.ones((3, 8)), parameters, spec)
    np.testing.assert_array_equal(found.experts, np.tile(np.arange(spec.top_k), (3, 1)))


def test_weights_and_bias_may_be_narrow():
    """Whatever the dtype of checkpoint and activations, scores and weights are float32."""
    spec = ORACLES["groups by their best two"]
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(jnp.bfloat16)
    parameters = {"router.weight": weight, "router.selection_bias": np.zeros(16, np.float32)}
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(jnp.bfloat16)
    narrow = route(jnp.asarray(x), parameters, spec)
    wide = {**parameters, "router.weight": weight.astype(np.float32)}
    assert narrow.weights.dtype == jnp.float32
    np.testing.assert_array_equal(narrow.weights, route(jnp.asarray(x, jnp.float32), wide, spec).weights)
