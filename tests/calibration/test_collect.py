"""Calibration through the JAX model: equal to PyTorch's door, to jax.grad, and to itself however it is cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossing import crossed
from random_windows import random_windows
from tiny_models import load_tiny, save_tiny

from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.fisher import layer_backward, sequence_loss, summed_squares
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense
from jaxmoe.model.decoder import embed
from jaxmoe.model.layer import Attended, Intermediates, attended, finish, layer
from jaxmoe.model.routing import Routes
from jaxmoe.streaming import on_device
from jaxmoe.texts import Tokenizer, text_windows

torch = pytest.importorskip("torch")


def close(found, expected, tolerance=2e-5):
    for name, array in expected.arrays().items():
        other = getattr(found, name)
        error = np.linalg.norm(other.astype(float) - array)
        assert error <= tolerance * (np.linalg.norm(array) + 1e-12), f"{name}: {error} of {np.linalg.norm(array)}"


@pytest.mark.parametrize(
    ("family", "gradients"),
    crossed(["qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "mixtral"], ["sequence", None]),
)
def test_both_doors_agree(family, gradients, tmp_path):
    from jaxmoe.torch import statistics

    save_tiny(family, tmp_path / "model")
    texts = [random_windows("one"), random_windows("two", windows=4, seed=1)]
    found = calibrate_windows(
        StoredModel(tmp_path / "model"), texts, tmp_path / "statistics", gradients=gradients, tokens=32
    )
    torch_model = load_tiny(tmp_path / "model", dtype="float32")
    for text in texts:
        batches = [(text.ids, text.counted)]
        expected = statistics(torch_model, batches, gradients=gradients is not None)
        for index in found.layers:
            close(found.layer(index, [text.name]), expected[index])


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_fisher_equals_the_gradient_of_the_whole_model(mode, tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    model, text = StoredModel(tmp_path / "model"), random_windows(windows=3)
    found = calibrate_windows(model, [text], tmp_path / "statistics", gradients=mode, tokens=32)
    ends = on_device(model.ends())
    parameters = [on_device(model.layer(index)) for index in range(len(model.spec.layers))]

    def loss(weights, ids, counted):
        """Run with the experts' matrices copied for every token, so that each copy has its own gradient."""
        x = embed(ids[None], ends, model.spec)
        for index, (own, spec) in enumerate(zip(parameters, model.spec.layers)):
            terms = {name: (Dense(weight=weights[index][name]),) for name in weights[index]}
            x, _ = layer(x, {**own, "experts": CompressedLayer(terms=terms, sizes=own["experts"].sizes)}, spec)
        return sequence_loss(x[0], ids, counted, ends, model.spec)

    weights = [{name: own["experts"].materialize(name) for name in ("gate", "up", "down")} for own in parameters]
    expected = jax.tree.map(jnp.zeros_like, weights)
    gradient = jax.jit(jax.grad(loss))
    for ids, counted in zip(text.ids, text.counted):
        expected = jax.tree.map(lambda a, g: a + g * g, expected, gradient(weights, jnp.asarray(ids), counted))
    for index in found.layers:
        for name in ("gate", "up", "down"):
            array = getattr(found.layer(index), f"fisher_{name}")
            error = np.linalg.norm(array - expected[index][name]) / np.linalg.norm(expected[index][name])
            # Every token by itself is something else, unless no expert has two tokens.
            assert error <= 1e-5 if mode == "sequence" else error > 1e-3


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_fisher_of_one_layer_equals_a_copy_of_the_experts_for_every_token(mode, tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    model = StoredModel(tmp_path)
    spec, parameters = model.spec.layers[1], on_device(model.layer(1))
    x, gradient = np.random.default_rng(0).standard_normal((2, 2, 7, 64)).astype(np.float32)
    walk_back = jax.jit(partial(layer_backward, spec=spec, mode=mode))
    _, found, _ = walk_back(jnp.asarray(x), jnp.asarray(gradient), parameters)

    # Behind attention every token goes its own way: with experts of its own, their gradient is the token's part.
    residual, inputs, routes, _ = jax.jit(partial(attended, spec=spec))(jnp.asarray(x), parameters)
    weights = {name: parameters["experts"].materialize(name) for name in ("gate", "up", "down")}

    def loss(weights, residual, inputs, experts, scores, gradient):
        terms = {name: (Dense(weight=weight),) for name, weight in weights.items()}
        own = {**parameters, "experts": CompressedLayer(terms=terms, sizes=model.shapes[1])}
        state = Attended(residual[None, None], inputs[None], Routes(experts[None], scores[None]))
        return jnp.sum(finish(state, own, spec)[0] * gradient)

    tokens = (residual.reshape(14, 64), inputs, *routes, gradient.reshape(14, 64))
    parts = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0, 0, 0))(weights, *tokens)
    for name, part in parts.items():
        whole = np.asarray(part, np.float64).reshape(2, 7, *part.shape[1:])
        expected = (whole.sum(1) ** 2).sum(0) if mode == "sequence" else (whole**2).sum((0, 1))
        assert np.linalg.norm(found[name] - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("whole", [True, False])
def test_products_of_any_number_of_rows_are_summed(whole):
    """Expert 0 sees every token, expert 1 + s the first tokens of sequence s, as many as `counts` says."""
    counts, length = [0, 1, 16, 17, 200, 256, 300], 300
    experts, tokens = len(counts) + 1, len(counts) * length
    rng = np.random.default_rng(0)
    chosen = np.zeros((tokens, 2), np.int32)
    for sequence, count in enumerate(counts):
        chosen[sequence * length :][:count, 1] = 1 + sequence
        # The rest goes to an expert that nobody asks about.
        chosen[sequence * length + count : (sequence + 1) * length, 1] = experts
    inputs, intermediate = rng.standard_normal((tokens, 5)), rng.standard_normal((tokens, 2, 3))
    deltas = {name: rng.standard_normal((tokens, 2, 5 if name == "down" else 3)) for name in ("gate", "up", "down")}
    numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (inputs, intermediate, deltas))
    seen = Intermediates(numbers[0], Routes(jnp.asarray(chosen), jnp.ones((tokens, 2))), numbers[1], None)
    squares = jax.jit(partial(summed_squares, experts=experts + 1, sequences=len(counts), whole=whole))
    found = squares(seen, numbers[2])
    for name, delta in deltas.items():
        right = intermediate if name == "down" else np.repeat(inputs[:, None], 2, 1)
        for expert in range(experts + 1):
            expected = 0
            for sequence in range(len(counts)):
                rows = slice(sequence * length, (sequence + 1) * length)
                d, x = (part[rows][chosen[rows] == expert] for part in (delta, right))
                expected += (d.T @ x) ** 2 if whole else (d**2).T @ x**2
            assert np.linalg.norm(found[name][expert] - expected) <= 1e-5 * np.linalg.norm(expected), (name, expert)


def test_few_experts_at_a_time_give_the_same(tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    model, text = StoredModel(tmp_path / "model"), random_windows()
    whole = calibrate_windows(model, [text], tmp_path / "whole")
    parts = calibrate_windows(model, [text], tmp_path / "parts", limit=3 * 8 * 2 * (64 * 64 + 24 * 24))
    for index in whole.layers:
        close(parts.layer(index), whole.layer(index), 1e-6)


def test_an_interrupted_run_goes_on(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    model, text = StoredModel(tmp_path / "model"), random_windows()
    for gradients in (None, "sequence"):
        whole = calibrate_windows(model, [text], tmp_path / f"whole-{gradients}", gradients=gradients)
        seen = []

        def stop(event, seen=seen):
            seen.append(event.layer)
            raise KeyboardInterrupt

        folder = tmp_path / f"cut-{gradients}"
        with pytest.raises(KeyboardInterrupt):
            calibrate_windows(model, [text], folder, gradients=gradients, on_event=stop)
        assert not folder.exists()
        with pytest.raises(JaxmoeError, match="not finished"):
            Statistics.open(folder)
        again = []
        found = calibrate_windows(
            model, [text], folder, gradients=gradients, on_event=lambda e, again=again: again.append(e)
        )
        assert [event.layer for event in again] == [index for index in found.layers if index not in seen]
        for index in whole.layers:
            close(found.layer(index), whole.layer(index), 1e-12)
        assert not list(folder.rglob("*.f32"))


def test_demo_matches_pytorch(tmp_path):
    from transformers import AutoModelForCausalLM

    from jaxmoe.torch import statistics

    texts = text_windows(demo_texts()[:2], Tokenizer.open(demo_checkpoint()), length=128, count=6)
    found = calibrate_windows(StoredModel(demo_checkpoint()), texts, tmp_path / "statistics")
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    for text in texts:
        expected = statistics(model, [(text.ids, text.counted)])
        for index in found.layers:
            close(found.layer(index, [text.name]), expected[index], 1e-4)
