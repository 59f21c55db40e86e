"""Finished folders are opened again before they get their names: whatever went wrong on the way is not published."""

import numpy as np
import plain_checkpoint
import planned
import pytest
from planned import compress, make_plan

import jaxmoe.export.folder
from jaxmoe import Checkpoint, densify, methods
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import tensor_file
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.export import orbax
from jaxmoe.export.checking import answers, check_written, first_and_last
from jaxmoe.export.orbax import to_orbax, to_safetensors
from jaxmoe.export.trained import write_trained
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank
from jaxmoe.recovery.trainable import select
from jaxmoe.texts import Windows


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a small checkpoint, statistics of which lie beside it."""
    folder = plain_checkpoint.write(tmp_path_factory.mktemp("checking") / "source")
    ids = np.random.default_rng(0).integers(0, 32, (4, 16)).astype(np.int32)
    text = Windows(name="text", fingerprint="x", ids=ids, counted=np.ones(ids.shape, bool), left_out=0)
    calibrate_windows(StoredModel(folder), [text], folder.with_name("statistics"), tokenizer=None)
    return folder


@pytest.fixture(scope="module")
def factored(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("checking") / "factored"
    run(source, output)
    return output


def run(source, output, **options):
    opened, method = Checkpoint.open(source), methods.get("svd")
    plan = make_plan(opened, method, method.settings(), ratio=0.4)
    return compress(opened, output, plan, **options)


def trained(source, output):
    output.mkdir()
    model = StoredModel(source)
    parameters = model.parameters()
    write_trained(model, parameters, select(parameters, ("factors",)), output)


def slimmed(source, output, name):
    statistics = Statistics.open(source.with_name("statistics"))
    planned.run(Checkpoint.open(source), output, name, ratio=0.25, settings={"multiple": 1}, statistics=statistics)


def fewer(source, output):
    planned.run(StoredModel(source).checkpoint, output, "compressed_experts", main_experts=1)


WRITERS = {
    "factored": lambda source, factored, output: run(source, output),
    "dense": lambda source, factored, output: run(source, output, export="dense"),
    "densified": lambda source, factored, output: densify(factored, output),
    "trained": lambda source, factored, output: trained(factored, output),
    "trained dense": lambda source, factored, output: trained(source, output),
    "fewer experts": lambda source, factored, output: slimmed(source, output, "frequency"),
    "smaller experts": lambda source, factored, output: slimmed(source, output, "camera"),
    "compressed_experts": lambda source, factored, output: fewer(source, output),
    "compressed_experts of factors": lambda source, factored, output: fewer(factored, output),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("layer", [0, 1])
def test_other_numbers_are_not_published(source, factored, tmp_path, monkeypatch, writer, layer):
    """The experts of one tensor come in another order, as after a mistake in the layout."""
    original = tensor_file._contiguous_bytes
    damaged = []

    def written(tensor):
        content = original(tensor)
        if f".layers.{layer}." in tensor.name and ".down" in tensor.name and not damaged and len(content) > 64:
            damaged.append(tensor.name)
            return np.ascontiguousarray(content[::-1].reshape(-1, 2)[:, ::-1]).reshape(-1)
        return content

    monkeypatch.setattr(tensor_file, "_contiguous_bytes", written)
    with pytest.raises(JaxmoeError, match=rf"layer {layer}, \S*down: the experts do not answer"):
        WRITERS[writer](source, factored, tmp_path / "out")
    assert damaged
    assert "trained" in writer or not (tmp_path / "out").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_lost_tensor_is_not_published(source, factored, tmp_path, monkeypatch, writer):
    original = jaxmoe.export.folder.shards

    def fewer(tensors, *rest):
        return original([x for x in tensors if x.name != "model.layers.1.input_layernorm.weight"], *rest)

    monkeypatch.setattr(jaxmoe.export.folder, "shards", fewer)
    monkeypatch.setattr("jaxmoe.compression.run.Workspace.publish", lambda workspace: pytest.fail("published"))
    with pytest.raises((JaxmoeError, RuntimeError), match=r"input_layernorm\.weight is missing|a defect of jaxmoe"):
        WRITERS[writer](source, factored, tmp_path / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_right_is_published(source, factored, tmp_path, writer):
    WRITERS[writer](source, factored, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_conversions_that_hold_other_numbers_are_not_published(source, tmp_path, monkeypatch):
    to_orbax(source, tmp_path / "orbax")
    saved, written = orbax.save_arrays, tensor_file._contiguous_bytes

    def save(path, arrays, **options):
        saved(path, {name: array + array.dtype.type(1) for name, array in arrays.items()}, **options)

    monkeypatch.setattr(orbax, "save_arrays", save)
    with pytest.raises(JaxmoeError, match="is not what was written: convert the checkpoint again"):
        to_orbax(source, tmp_path / "out")
    monkeypatch.setattr(tensor_file, "_contiguous_bytes", lambda tensor: written(tensor)[::-1].copy())
    with pytest.raises(JaxmoeError, match="so it gets no name: convert the checkpoint again"):
        to_safetensors(tmp_path / "orbax", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_belongs_to_nothing_is_named(factored, tmp_path):
    config = (factored / "config.json").read_bytes()
    arrays = {name: entry.read() for path in factored.glob("*.safetensors") for name, entry in read(path).items()}
    for stray in ("model.layers.1.mlp.experts.0.up_proj.bias", "model.layers.1.mlp.experts.down_proj_bias"):
        folder = tmp_path / stray
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        made = {**arrays, stray: np.zeros((4, 16) if stray.endswith("_bias") else 8, "float32")}
        planned = [tensor_file.Planned(n, x.dtype, x.shape, lambda x=x: x) for n, x in made.items()]
        tensor_file.write_tensors(folder / "model.safetensors", planned)
        with pytest.raises(JaxmoeError, match=stray):
            check_written(folder, Checkpoint.open(plain_checkpoint.write(tmp_path / f"{stray}-source")), {})


def read(path):
    return tensor_file.read_header(path)


def test_experts_with_biases_that_have_no_place_are_refused_first(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = plain_checkpoint.write(tmp_path / "source")
    made = load_file(folder / "model.safetensors")
    for expert in range(4):
        made[f"model.layers.1.mlp.experts.{expert}.down_proj.bias"] = np.zeros(16, made["lm_head.weight"].dtype)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JaxmoeError, match=r"layers 1 have biases.*--export dense"):
        run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_answers_are_those_of_the_matrices():
    random = np.random.default_rng(1)
    shape = LayerShape(experts=3, hidden=5, intermediate=4)
    left, right = random.standard_normal((3, 8, 2)), random.standard_normal((3, 2, 5))
    down = random.standard_normal((3, 5, 4)).astype("float32")
    terms = {"gate_up": (LowRank(left=left.astype("float32"), right=right.astype("float32")),)}
    layer = CompressedLayer(terms={**terms, "down": (Dense(weight=down),)}, sizes=shape)
    dense = {"gate": (left @ right)[:, :4], "up": (left @ right)[:, 4:], "down": down}
    for name, numbers in answers(layer).items():
        drawn = np.random.default_rng(0)
        u, v = (drawn.standard_normal((4, size), np.float32) for size in dense[name].shape[1:])
        np.testing.assert_allclose(numbers, np.einsum("ro,eoi,ri->er", u, dense[name], v).ravel(), rtol=1e-4, atol=1e-4)
    assert first_and_last([5]) == {5}
