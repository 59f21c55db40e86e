"""Vectors that learn from text: they find what is there to be found, and what they find makes the model better."""

import json
import signal
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest
from program import ENVIRONMENT, call, checksums, command

import jaxmoe
from jaxmoe import StoredModel
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.compression.expert_vectors import Examples, distil, importance
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape
from jaxmoe.methods.compressed_experts import Settings
from jaxmoe.model.compressed_experts import vector_shapes
from jaxmoe.model.layer import routed
from jaxmoe.model.routing import Routes
from jaxmoe.model.spec import ExpertBlock, Router
from jaxmoe.report.events import LayerDone
from jaxmoe.texts import Tokenizer, text_windows

METHOD = "compressed_experts"
TEXT = demo_texts()[0].parent
LEARN = ("--text", TEXT, "--sequences", "6", "--length", "64", "--set", "steps=30", "--set", "batch=512")


def run(*arguments) -> dict:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compress(output, *options) -> dict:
    return run("compress", demo_checkpoint(), output, "--method", METHOD, *options)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A checkpoint of which one expert runs, its vectors learned from little text, and its report."""
    folder = tmp_path_factory.mktemp("learned")
    return folder / "small", compress(folder / "small", "--main-experts", "1", *LEARN)


TOKENS = 1200


@pytest.fixture(scope="module")
def synthetic():
    """Examples of a layer whose outputs are those of known vectors, the layer, and these."""
    rng, tokens = np.random.default_rng(0), TOKENS
    sizes = LayerShape(experts=6, hidden=12, intermediate=8)
    block = ExpertBlock(shape=sizes, router=Router(experts=6, top_k=3), main=1)
    terms = {name: (Dense(weight=_draw(rng, sizes.of(name), 0.5)),) for name in sizes.projections}
    layer = {"experts": CompressedLayer(terms=terms, sizes=sizes)}
    truth = {name: 1 + _draw(rng, shape, 0.3) for name, shape in vector_shapes(sizes).items()}
    # Expert 5 is always the best: never auxiliary.
    chosen = np.array([rng.permutation(5)[:3] for _ in range(tokens)], np.int32)
    chosen[::4, 0] = 5
    weights = np.sort(rng.random((tokens, 3)).astype(np.float32))[:, ::-1]
    x = _draw(rng, (tokens, sizes.hidden), 1.0)
    rows, _ = routed(x, Routes(jnp.asarray(chosen), jnp.asarray(weights)), {**layer, **truth}, block)
    return Examples(*(np.asarray(array) for array in (x, chosen, weights, rows.combined))), layer, block, truth


def _draw(rng, shape, scale):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def test_finds_the_vectors_that_made_the_outputs(synthetic):
    examples, layer, block, truth = synthetic
    found = distil(examples, layer, block, Settings(steps=900, batch=256, rate=0.03, patience=100), (0, 0))
    assert found.before > 0.05
    assert found.after < found.before / 50
    assert found.never == (5,)
    for vectors in found.vectors.values():
        np.testing.assert_array_equal(vectors[5], 1)
    # What up and down are scaled by can change places; what gate is scaled by cannot.
    assert np.abs(found.vectors["auxiliary.gate"][:5] - truth["auxiliary.gate"][:5]).mean() < 0.1


def test_stops_where_nothing_is_better(synthetic):
    """Outputs of the main experts alone: ones are right, and stay."""
    examples, layer, block, _ = synthetic
    ones = {name: jnp.ones(shape) for name, shape in vector_shapes(block.shape).items()}
    routes = Routes(jnp.asarray(examples.experts), jnp.asarray(examples.weights))
    rows, _ = routed(jnp.asarray(examples.inputs), routes, {**layer, **ones}, block)
    exact = examples._replace(outputs=np.asarray(rows.combined))
    found = distil(exact, layer, block, Settings(steps=1000, batch=256, patience=2), (0, 0))
    assert found.after <= found.before < 1e-10
    assert found.steps < 1000


def test_too_few_tokens_are_an_error(synthetic):
    examples, layer, block, _ = synthetic
    with pytest.raises(JaxmoeError, match="5 tokens to learn from"):
        distil(Examples(*(array[:5] for array in examples)), layer, block, Settings(), (0, 0))


def test_importance_sums_to_the_whole(synthetic):
    examples, _, block, _ = synthetic
    found = importance(examples, 6, block.running)
    assert sum(found["by_rank"]) == pytest.approx(1)
    assert sum(found["main"]) == pytest.approx(found["by_rank"][0])
    assert sum(found["auxiliary"]) == pytest.approx(sum(found["by_rank"][1:]))
    mass = sum(row[1:][expert == 5].sum() for row, expert in zip(examples.weights, examples.experts[:, 1:]))
    assert found["auxiliary"][5] == pytest.approx(mass)


def test_less_error_in_every_layer_and_less_loss(learned, tmp_path):
    """Full top-k < learned vectors < experts left out, on text that was not learned from."""
    folder, report = learned
    for layer in report["layers"]:
        assert layer["error"]["after"] < layer["error"]["before"]
        assert layer["importance"]["by_rank"] == sorted(layer["importance"]["by_rank"], reverse=True)
    compress(tmp_path / "plain", "--main-experts", "1")
    # The last windows of the texts; those that were learned from are spread over them, 6 of many.
    texts = text_windows([TEXT], Tokenizer.open(demo_checkpoint()), length=64)
    from jaxmoe.evaluation.evaluate import evaluate_windows

    rest = [text._replace(ids=text.ids[-12:], counted=text.counted[-12:]) for text in texts]
    loss = {
        name: np.mean([text.nats_per_token for text in evaluate_windows(StoredModel(own), rest).texts])
        for name, own in {"full": demo_checkpoint(), "learned": folder, "plain": tmp_path / "plain"}.items()
    }
    assert loss["full"] < loss["learned"] < loss["plain"]


def test_only_vectors_differ_from_the_source(learned):
    folder, report = learned
    model, source = StoredModel(folder), StoredModel(demo_checkpoint())
    assert [layer.feed_forward.main for layer in model.spec.layers] == [1] * 4
    for index in range(4):
        mine, own = model.layer(index), source.layer(index)
        assert mine.keys() - own.keys() == set(vector_shapes(model.shapes[index]))
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(mine["experts"].materialize(name), own["experts"].materialize(name))
        assert not np.array_equal(mine["auxiliary.down"], np.ones_like(mine["auxiliary.down"]))
        never = report["layers"][index]["never_auxiliary"]
        assert all(np.all(mine[name][never] == 1) for name in vector_shapes(model.shapes[index]))
    kinds = {outcome["layer"] for outcome in report["outcomes"] if outcome["kind"] == "never_auxiliary"}
    assert kinds == {layer["layer"] for layer in report["layers"] if layer["never_auxiliary"]}


def test_other_commands_take_it(learned, tmp_path):
    folder, report = learned
    assert run("inspect", folder)["main_experts"] == 1
    measured = run("evaluate", folder, "--text", TEXT, "--length", "64", "--sequences", "2", "--generate", "2")
    assert np.isfinite(measured["geometric_mean_perplexity"])
    texts = text_windows([TEXT], Tokenizer.open(folder), length=32, count=2)
    seen = calibrate_windows(StoredModel(folder), texts, tmp_path / "statistics", moments="pooled").layer(2)
    assert seen.counts.sum() == seen.tokens, "one expert of each token ran"
    with pytest.raises(JaxmoeError, match="without gradients"):
        calibrate_windows(StoredModel(folder), texts, tmp_path / "gradients", gradients="token")
    card = (folder / "README.md").read_text()
    assert f"| {report['layers'][0]['error']['before']:.4f} |" in card
    assert f"| active parameters | {report['active_parameters']['before']:,} |" in card


def test_a_stopped_run_resumes_to_the_same_bytes(learned, tmp_path):
    folder, _ = learned
    learn = {"text": [TEXT], "sequences": 6, "length": 64, "set": {"steps": 30, "batch": 512}}

    def go(on_event):
        jaxmoe.compress(demo_checkpoint(), tmp_path / "small", METHOD, main_experts=1, **learn, on_event=on_event)

    def stop(event):
        if isinstance(event, LayerDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(stop)
    assert not (tmp_path / "small").exists()
    seen = []
    go(seen.append)
    assert [event.resumed for event in seen if isinstance(event, LayerDone)] == [True, False, False, False]
    assert checksums(tmp_path / "small") == checksums(folder)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(learned, tmp_path):
    folder, _ = learned
    arguments = ("compress", demo_checkpoint(), tmp_path / "small", "--method", METHOD)
    arguments += ("--main-experts", "1", *LEARN)
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    entry = tmp_path / "small.partial" / ".jaxmoe" / "layer00001.json"
    while not entry.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "small").exists()
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert "layer 0 (1 of 4, kept from an earlier run)" in done.stderr
    assert checksums(tmp_path / "small") == checksums(folder)
    again, other = (call(*arguments, "--seed", seed) for seed in ("0", "1"))
    assert again.returncode == 0
    assert again.stderr.strip() == f"written: {tmp_path / 'small'}"
    assert other.returncode == 1
    assert "something else" in other.stderr


BAD = {
    "ratio": (("--main-experts", "2", "--ratio", "0.4"), ("--ratio", "svd")),
    "none": ((), ("--main-experts", "1 to 3")),
    "zero": (("--main-experts", "0"), ("0 main experts", "1 to 3")),
    "all": (("--main-experts", "4"), ("4 main experts", "1 to 3")),
    "export": (("--main-experts", "2", "--export", "dense"), ("--export dense",)),
    "slim export": (("--main-experts", "2", "--export", "slim"), ("--export slim",)),
    "statistics": (("--main-experts", "2", "--statistics", "somewhere"), ("--statistics", "--text")),
    "layers": (("--main-experts", "2", "--layers", "0:2"), ("--layers",)),
    "paper": (("--main-experts", "2", "--setting", "paper", "--text", TEXT), ("recover",)),
    "renorm": (("--main-experts", "2", "--set", "renorm=half"), ("renorm 'half'", "none or main")),
    "steps": (("--main-experts", "2", "--set", "steps=0"), ("steps=0",)),
    "unknown": (("--main-experts", "2", "--set", "ranks=3"), ("ranks=3", "renorm")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name, tmp_path):
    options, words = BAD[name]
    line = ["compress", demo_checkpoint(), tmp_path / "small", "--method", METHOD, *options]
    done = call(*line)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "word"), [(("--main-experts", "2"), 1, "compressed_experts"), ((), 2, "--ratio")]
)
@pytest.mark.parametrize("name", ["plan", "compress"])
def test_other_methods_take_a_ratio(name, options, code, word, tmp_path):
    output = [tmp_path / "small"] if name == "compress" else []
    done = call(name, demo_checkpoint(), *output, "--method", "svd", *options)
    assert done.returncode == code
    assert word in done.stderr


def test_vectors_do_not_compensate_twice(learned, tmp_path):
    line = ["compress", learned[0], tmp_path / "twice", "--method", METHOD, "--main-experts", "1"]
    done = call(*line)
    assert done.returncode == 1
    assert "compensate for experts already" in done.stderr
