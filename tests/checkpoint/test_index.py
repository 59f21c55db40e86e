"""Where an index and its files disagree: what is read, as transformers reads it, and what is said about it."""

import json

import numpy as np
import plain_checkpoint
import pytest
from planned import compress, make_plan
from safetensors.numpy import load_file, save_file

from jaxmoe import densify, methods
from jaxmoe.checkpoint import Checkpoint, Planned, read_header, write_tensors
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.files import INDEX, SINGLE, read_weights
from jaxmoe.checkpoint.inspection import inspect
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.orbax import to_orbax

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


class Parts:
    """A checkpoint in two files, `a` and `b`, to be changed."""

    def __init__(self, folder):
        self.folder = plain_checkpoint.write(folder)
        self.all = load_file(self.folder / SINGLE)
        (self.folder / SINGLE).unlink()
        self.held = {"a": {}, "b": {}}
        for position, name in enumerate(sorted(self.all)):
            self.held["ab"[position % 2]][name] = self.all[name]
        self.map = {name: f"{file}.safetensors" for file, own in self.held.items() for name in own}

    def where(self, name):
        """Return the file that holds a tensor, and the other one."""
        return ("a", "b") if name in self.held["a"] else ("b", "a")

    def write(self):
        for file, own in self.held.items():
            save_file(own, self.folder / f"{file}.safetensors", metadata={"format": "pt"})
        (self.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.map}))
        return self.folder


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "checkpoint")


def opened(parts, said):
    """Open the checkpoint, and return its tensors; exactly one note must say so."""
    checkpoint = Checkpoint.open(parts.write())
    assert [said in note for note in checkpoint.notes] == [True]
    assert inspect(parts.folder)["notes"] == list(checkpoint.notes)
    return {name: entry.read() for name, entry in checkpoint.tensors.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_agreement_needs_no_note(parts):
    assert Checkpoint.open(parts.write()).notes == ()


@pytest.mark.parametrize("name", [EXPERT, QUERY])
def test_of_two_equal_copies_one_is_read(parts, name):
    _, other = parts.where(name)
    parts.held[other][name] = parts.all[name]
    same(opened(parts, "lie in more than one file, and the index decides"), parts.all)


@pytest.mark.parametrize("named", ["a", "b"])
def test_of_two_copies_the_index_decides(parts, named):
    for file, own in parts.held.items():
        own[EXPERT] = parts.all[EXPERT] * (1 if file == named else 2)
    parts.map[EXPERT] = f"{named}.safetensors"
    checkpoint = Checkpoint.open(parts.write())
    np.testing.assert_array_equal(checkpoint.tensors[EXPERT].read(), parts.all[EXPERT])
    differing = [note for note in checkpoint.notes if "other values in the last file" in note]
    assert len(differing) == 1
    assert EXPERT in differing[0]


@pytest.mark.parametrize("name", [EXPERT, QUERY, "lm_head.weight", "model.norm.weight"])
def test_a_tensor_without_a_name_is_read_where_the_model_needs_it(parts, name):
    del parts.map[name]
    same(opened(parts, f"since the model has a place for them: {name}"), parts.all)
    StoredModel(parts.folder)


def test_a_tensor_without_a_name_is_ignored_where_the_model_has_no_place_for_it(parts):
    parts.held["a"]["model.leftover.weight"] = np.ones(3, "float32")
    same(opened(parts, "ignored, since neither the index names them"), parts.all)
    StoredModel(parts.folder)


@pytest.mark.parametrize("name", [EXPERT, QUERY])
def test_a_tensor_is_found_in_another_file_than_the_index_says(parts, name):
    parts.map[name] = f"{parts.where(name)[1]}.safetensors"
    same(opened(parts, f"lie in another file than the index says, and are read there: {name}"), parts.all)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.self_attn.q_proj.weight", "model.extra"]
)
def test_a_name_of_nothing_is_ignored(parts, name):
    parts.map[name] = "a.safetensors"
    same(opened(parts, f"belong to no tensor in any file, and are ignored: {name}"), parts.all)


@pytest.mark.parametrize("name", [EXPERT, QUERY, "lm_head.weight"])
def test_a_name_of_nothing_is_an_error_where_the_model_needs_it(parts, name):
    del parts.held[parts.where(name)[0]][name]
    with pytest.raises(JaxmoeError, match="no expert 2 of 4" if name == EXPERT else f"no file holds.*{name}"):
        Checkpoint.open(parts.write())


def test_a_single_file_comes_before_an_index(parts):
    parts.held["a"][EXPERT] = parts.held["b"][EXPERT] = parts.all[EXPERT] * 3
    folder = parts.write()
    save_file(parts.all, folder / SINGLE)
    same(opened(parts, f"{SINGLE} is read, and the {INDEX} beside it is not"), parts.all)
    # transformers asks whether it is a file, and so does this.
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    assert {entry.file.name for entry in read_weights(folder).tensors.values()} == {"a.safetensors", "b.safetensors"}


def test_a_factored_checkpoint_has_notes_too(tmp_path):
    source = Checkpoint.open(plain_checkpoint.write(tmp_path / "source"))
    recipe = methods.get("svd")
    compress(source, tmp_path / "factored", make_plan(source, recipe, recipe.settings(), ratio=0.3))
    path = tmp_path / "factored" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.leftover"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    said = "1 names in the index belong to no tensor in any file, and are ignored: model.leftover."
    assert said in inspect(tmp_path / "factored")["notes"]
    assert densify(tmp_path / "factored", tmp_path / "dense")["notes"] == [said]
    assert to_orbax(tmp_path / "factored", tmp_path / "orbax")["notes"] == [said]
    # A name that the model needs is missed at once.
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        (tmp_path / name).mkdir()
        held = read_header(tmp_path / "factored" / index["weight_map"][name])
        arrays = [Planned(n, x.dtype, x.shape, x.read) for n, x in held.items() if n != name]
        for file in (tmp_path / "factored").iterdir():
            if file.name != index["weight_map"][name] and file.is_file():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        write_tensors(tmp_path / name / index["weight_map"][name], arrays)
        with pytest.raises(JaxmoeError, match=f"the index names tensors that no file holds.*{name}"):
            CompressedCheckpoint.open(tmp_path / name)
