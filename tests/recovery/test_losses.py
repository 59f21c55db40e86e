"""The losses and their gradients, against PyTorch's models and numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.decoder import forward
from jaxmoe.recovery import Batch, Side, batch_losses, merge, select, split
from jaxmoe.recovery import losses as module

pytest.importorskip("torch")
import tiny_models
import torch
from torch.nn import functional as F

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "qwen3_moe"
    tiny_models.save_tiny("qwen3_moe", path)
    return path


@pytest.fixture(scope="module")
def side(folder):
    model = StoredModel(folder)
    return Side(model.parameters(), model.spec)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "qwen3_moe"
    tiny_models.save_tiny("qwen3_moe", path, seed=1)
    model = StoredModel(path)
    return Side(model.parameters(), model.spec)


def whole_rows(count=3, seed=0):
    ids = np.random.default_rng(seed).integers(0, tiny_models.VOCABULARY, (count, LENGTH)).astype(np.int32)
    learned = np.ones(ids.shape, bool)
    learned[:, 0] = False
    return Batch(ids, np.ones_like(ids), learned)


def measured(side, batch, teacher=None, **options):
    return jax.jit(lambda p: batch_losses(Side(p, side.spec), teacher, batch, **options))(side.parameters)


def test_gradients_are_those_of_pytorch(folder, side):
    batch = whole_rows()
    chosen = select(side.parameters, ["all"])
    trained = split(side.parameters, chosen)

    def loss(trained):
        return batch_losses(Side(merge(side.parameters, trained), side.spec), None, batch, wanted=("next_token",))[
            "next_token"
        ]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    model = tiny_models.load_tiny(folder)
    ids = torch.tensor(batch.ids).long()
    theirs = model(ids, labels=ids).loss
    theirs.backward()
    assert float(value) == pytest.approx(float(theirs.detach()), rel=1e-5)
    own = dict(model.named_parameters())
    pairs = {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.0.router.weight": "model.layers.0.mlp.gate.weight",
        "layers.1.input_norm.weight": "model.layers.1.input_layernorm.weight",
        "layers.1.attention.value.weight": "model.layers.1.self_attn.v_proj.weight",
        "layers.1.experts.terms.down.0.weight": "model.layers.1.mlp.experts.down_proj",
    }
    for ours, name in pairs.items():
        expected = own[name].grad.numpy()
        assert np.abs(expected).max() > 0, name
        np.testing.assert_allclose(gradient[ours], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_balance_is_that_of_transformers(side):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    batch = whole_rows()
    found = measured(side, batch, wanted=("next_token", "balance"))
    inputs = []
    x = side.parameters["embedding.weight"][batch.ids].astype(jnp.float32)
    from jaxmoe.model.layer import layer

    for own, rules in zip(side.parameters["layers"], side.spec.layers):
        x, seen = jax.jit(layer, static_argnums=2)(x, own, rules)
        inputs.append(np.asarray(seen.inputs @ own["router.weight"].T))
    router = side.spec.layers[0].feed_forward.router
    # Theirs joins all layers first; by single layers it is the mean of theirs.
    theirs = [load_balancing_loss_func((torch.tensor(x),), router.experts, router.top_k) for x in inputs]
    assert float(found["balance"]) == pytest.approx(float(sum(theirs)) / len(theirs) / router.top_k, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_and_outputs_in_float64(side, other, temperature):
    batch = whole_rows()
    batch = batch._replace(learned=batch.learned & (np.arange(LENGTH) % 3 != 0))
    found = measured(side, batch, other, wanted=("next_token", "distillation", "outputs"), temperature=temperature)
    run = jax.jit(forward, static_argnums=2)
    logits, aims = (np.asarray(run(batch.ids, s.parameters, s.spec), np.float64) for s in (side, other))
    counted = torch.tensor(batch.learned[:, 1:])
    own, aim = (F.log_softmax(torch.tensor(x[:, :-1]) / temperature, -1) for x in (logits, aims))
    divergence = F.kl_div(own, aim, reduction="none", log_target=True).sum(-1)[counted].mean() * temperature**2
    assert float(found["distillation"]) == pytest.approx(float(divergence), rel=1e-4)
    nats = F.cross_entropy(
        torch.tensor(logits[:, :-1])[counted], torch.tensor(batch.ids[:, 1:]).long()[counted], reduction="mean"
    )
    assert float(found["next_token"]) == pytest.approx(float(nats), rel=1e-5)
    from jaxmoe.model.layer import layer

    states = []
    for s in (side, other):
        x, passed = s.parameters["embedding.weight"][batch.ids].astype(jnp.float32), []
        for own_layer, rules in zip(s.parameters["layers"], s.spec.layers):
            x, _ = jax.jit(layer, static_argnums=2)(x, own_layer, rules)
            passed.append(np.asarray(x, np.float64))
        states.append(passed)
    ratios = [np.square(a - b).sum() / np.square(b).sum() for a, b in zip(*states)]
    assert float(found["outputs"]) == pytest.approx(np.mean(ratios), rel=1e-4)


def test_a_model_is_at_no_distance_from_itself(side):
    found = measured(side, whole_rows(), side, wanted=("distillation", "outputs"))
    assert float(found["distillation"]) == pytest.approx(0, abs=1e-6)
    assert float(found["outputs"]) == pytest.approx(0, abs=1e-9)


def test_documents_of_a_row_do_not_see_each_other(side):
    apart = whole_rows(2)
    ids = apart.ids[:, : LENGTH // 2].reshape(1, LENGTH)
    numbers = np.repeat([[1, 2]], LENGTH // 2, axis=1)
    learned = np.ones((1, LENGTH), bool)
    learned[0, [0, LENGTH // 2]] = False
    packed = Batch(ids, numbers.astype(np.int32), learned)
    single = Batch(*(part[:, : LENGTH // 2] for part in apart))
    wanted = ("next_token",)
    together, alone = (float(measured(side, b, wanted=wanted)["next_token"]) for b in (packed, single))
    assert together == pytest.approx(alone, rel=1e-5)
    joined = packed._replace(documents=np.ones_like(ids))
    assert abs(float(measured(side, joined, wanted=wanted)["next_token"]) - alone) > 1e-3


def test_what_fills_a_row_changes_nothing(side):
    batch = whole_rows(2)
    filled = Batch(*(np.pad(part, ((0, 0), (0, 7))) for part in batch))
    wanted = ("next_token", "distillation", "outputs", "balance")
    teacher = Side(jax.tree.map(lambda x: x, side.parameters), side.spec)
    plain, other = (measured(side, own, teacher, wanted=wanted) for own in (batch, filled))
    for name, value in plain.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-7)


def test_logits_of_some_tokens_at_a_time_are_the_same(side, other, monkeypatch):
    batch, wanted = whole_rows(), ("next_token", "distillation")
    whole = measured(side, batch, other, wanted=wanted)
    monkeypatch.setattr(module, "LOGITS", 10 * tiny_models.VOCABULARY)
    for name, value in measured(side, batch, other, wanted=wanted).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5)


def test_bfloat16_computes_nearly_the_same(side):
    batch = whole_rows()
    exact = float(measured(side, batch, wanted=("next_token",))["next_token"])
    rounded = float(measured(side, batch, wanted=("next_token",), dtype=jnp.bfloat16)["next_token"])
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"guess": 1.0}, "give some of next_token"),
        ({"next_token": 0.0}, "positive weight"),
        ({"next_token": float("nan")}, "positive weight"),
        ({"balance": 1.0}, "nothing to learn from"),
        ({}, "nothing to learn from"),
    ],
)
def test_losses_that_make_no_sense(weights, message):
    with pytest.raises(JaxmoeError, match=message):
        module.check_weights(weights)
