"""Recovery of numbers in few bits: codes stay, scales and tables move, and files keep their sizes."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import call
from two_layers import two_layers

import jaxmoe
from jaxmoe.checkpoint import files
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.recovery import Batch, Training, begin, merge, select, split, train_step
from jaxmoe.recovery.scales import floating_scales, stored_scales
from jaxmoe.solvers.rounding import round_nearest

LENGTH, STEPS = 32, 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two rows of text: every step of two rows sees both."""
    path = tmp_path_factory.mktemp("text") / "two_rows.txt"
    path.write_text(demo_texts()[0].read_text()[:190])
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("source") / "demo")


def compressed(source, output, *arguments):
    done = call("compress", source, output, *arguments)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def held(source):
    return compressed(source, source.with_name("rtn2"), "--method", "rtn2", *(f"--set={x}" for x in ROUNDING))


ROUNDING = ("scale=quantised", "search=false")


@pytest.fixture(scope="module")
def recovered(source, text):
    """The same, and recovery behind it, as a recipe."""
    training = {"train": "scales,norms", "steps": STEPS, "rows": 2, "learning_rate": 3e-3}
    settings = [f"--set=rtn2.{x}" for x in ROUNDING] + [f"--set=recover.{name}={x}" for name, x in training.items()]
    texts = ("--text", text, "--length", LENGTH)
    return compressed(source, source.with_name("recovered"), "--method", "rtn2+recover", *texts, *settings)


def tensors(folder):
    return {name: np.array(entry.read()) for name, entry in files.read_tensors(folder).items()}


def test_codes_stay_and_so_do_all_sizes(held, recovered):
    before, after = tensors(held), tensors(recovered)
    assert {n: (x.dtype, x.shape) for n, x in before.items()} == {n: (x.dtype, x.shape) for n, x in after.items()}
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert any(name.endswith("_scale") for name in changed)
    assert all("norm" in name or name.endswith(("_scale", "_unit")) for name in changed)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (held, recovered)]
    assert reports[0]["stored"] == reports[1]["stored"]
    assert reports[1]["recovery"]["trained"]["sets"] == ["scales", "norms"]


def test_the_divergence_falls(recovered):
    losses = [json.loads(line)["loss"] for line in (recovered / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bytes(source, held, recovered, text, tmp_path):
    def stop(event):
        if getattr(event, "done", 0) == 3:
            raise KeyboardInterrupt

    recover = partial(
        jaxmoe.recover,
        held,
        tmp_path / "out",
        text=text,
        teacher=source,
        train=["scales", "norms"],
        length=LENGTH,
        steps=STEPS,
        rows=2,
        learning_rate=3e-3,
        save_every=2,
    )
    with pytest.raises(KeyboardInterrupt):
        recover(on_event=stop)
    recover()
    ours, theirs = tensors(tmp_path / "out"), tensors(recovered)
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in theirs.items()}


def test_a_model_without_scales_is_refused(text, tmp_path):
    with pytest.raises(JaxmoeError, match="cannot train 'scales': the model has none; it has router, factors, norms"):
        jaxmoe.recover(demo_checkpoint(), tmp_path / "out", text=text, train=["scales"], length=LENGTH, rows=2)


STORES = {
    "gate": Store(bits=2, group=64, zero="real"),
    "up": Store(bits=3, group=64, scale="quantised"),
    "down": Store(bits=2, group=64, zero="none", table="matrix"),
}


def in_few_bits(name, weight):
    """Return some matrices in few bits; those of `up` in two widths."""
    weight, store = np.asarray(weight, np.float32), STORES[name]
    if name == "up":
        parts = [(store, weight[:8]), (replace(store, bits=4), weight[8:])]
        held = tuple(QuantisedArray.pack(round_nearest(own, store), store) for store, own in parts)
        order = jnp.arange(len(weight), dtype=jnp.int32)[None]
        return MixedArray(parts=held, order=order, width=weight.shape[2], shape=weight.shape)
    if name == "gate":
        return QuantisedArray.pack(round_nearest(weight, store), store)
    table = jnp.tile(jnp.array([-1.0, -0.25, 0.25, 1.0]), (len(weight), 1))
    scale = np.abs(weight).max(2, keepdims=True).repeat(store.groups(weight.shape[2]), 2)
    codes = np.abs((weight / scale[..., :1])[..., None] - np.asarray(table[0])).argmin(-1)
    return QuantisedArray.pack(Rounded(codes.astype(np.uint8), scale, None, table), store)


@pytest.fixture(scope="module")
def small():
    """One layer of the demo model with its experts in few bits, and a batch."""
    model = StoredModel(demo_checkpoint())
    original = {**model.ends(), "layers": [model.layer(0)]}
    spec = replace(model.spec, layers=model.spec.layers[:1])
    experts = original["layers"][0]["experts"]
    terms = {n: (Dense(weight=in_few_bits(n, own[0].weight)),) for n, own in experts.terms.items()}
    layer = {**original["layers"][0], "experts": CompressedLayer(terms=terms, sizes=experts.sizes)}
    ids = np.random.default_rng(0).integers(0, 4096, (2, 16)).astype(np.int32)
    return {**original, "layers": [layer]}, original, spec, Batch(ids, np.ones_like(ids), np.ones(ids.shape, bool))


def test_scales_zeros_and_tables_of_every_store_are_trained(small):
    stored, original, spec, batch = small
    parameters = floating_scales(stored)
    chosen = select(parameters, ["scales"])
    begin_of = "layers.0.experts.terms."
    assert set(chosen) == {
        begin_of + name
        for name in (
            "gate.0.weight.scale",
            "gate.0.weight.zero",
            "up.0.weight.parts.0.scale",
            "up.0.weight.parts.1.scale",
            "down.0.weight.scale",
            "down.0.weight.table",
        )
    }
    training = Training(rows=2, steps=12, learning_rate=3e-3, weights={"distillation": 1.0}, warmup=0.0)
    step = jax.jit(partial(train_step, specs=(spec, spec), training=training))
    state = begin(split(parameters, chosen), training)
    start, losses = state.trained, []
    for _ in range(8):
        state, found = step(state, merge(parameters, dict.fromkeys(chosen, jnp.zeros(0))), original, batch)
        losses.append(float(found["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    for name, array in state.trained.items():
        assert float(jnp.abs(array - start[name]).max()) > 0, name
    trained = merge(parameters, state.trained)
    up, before = (terms(own, "up") for own in (stored_scales(trained, stored), stored))
    assert (up.count(), up.spec()) == (before.count(), before.spec())
    # Where a unit serves 256 scales, the smaller of them lose most.
    np.testing.assert_allclose(up.materialize(), terms(trained, "up").materialize(), atol=0.01)


def terms(parameters, name):
    return parameters["layers"][0]["experts"].terms[name][0]


def test_scales_of_eight_bits_come_back_as_they_were(small):
    stored, *_ = small
    floats = floating_scales(stored)
    np.testing.assert_array_equal(terms(floats, "up").materialize(), terms(stored, "up").materialize())
    again = stored_scales(floats, stored)
    assert jax.tree.structure(again) == jax.tree.structure(stored)
    for before, after in zip(jax.tree.leaves(stored), jax.tree.leaves(again)):
        np.testing.assert_array_equal(before, after)
