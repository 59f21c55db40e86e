"""Checkpoints from which nothing can be removed: said before anything runs. And what travels with multi-token heads."""

import json

import numpy as np
import plain_checkpoint
import pytest
from planned import prune, prune_plan
from safetensors.numpy import save_file

from jaxmoe import Checkpoint, methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.pruning import Pruned, PruningMethod, PruningSettings

FIRST = PruningMethod(
    "first", "", PruningSettings, "experts", lambda e, keep, s, *, groups: Pruned(np.arange(keep)), lambda settings: {}
)


def write(folder, config=None, change=lambda made: None):
    record = {name: value for name, value in {**plain_checkpoint.CONFIG, **(config or {})}.items() if value is not None}
    made = plain_checkpoint.tensors()
    change(made)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def without_router(made):
    del made["model.layers.1.mlp.gate.weight"]


def fewer_in_one_layer(made):
    for projection in ("gate", "up", "down"):
        del made[f"model.layers.1.mlp.experts.3.{projection}_proj.weight"]


# As InternVL has it: nothing of the decoder stands at the top.
ELSEWHERE = {**dict.fromkeys(plain_checkpoint.CONFIG), "llm_config": plain_checkpoint.CONFIG}
BAD = {
    "a count under no known name": ({"num_experts": None, "expert_total": 4}, None, "reap", "config.json does not say"),
    "no router": ({}, without_router, "reap", r"there is no model\.layers\.1\.mlp\.gate\.weight"),
    "an unknown architecture": ({"model_type": "novelty"}, None, "reap", "'novelty' is unknown"),
    "channels of one": ({"model_type": "novelty"}, None, "camera", "'novelty' is unknown"),
    "one whose decoder is elsewhere": ({**ELSEWHERE, "model_type": "novelty"}, None, "reap", "'novelty' is unknown"),
    "channels under no known name": ({"moe_intermediate_size": None}, None, "camera", "not say under a known name"),
    "layers that differ": ({"num_experts": [4, 3]}, fewer_in_one_layer, "frequency", "layers have 3, 4 experts"),
    "no experts per token": ({"num_experts_per_tok": None}, None, "reap", "how many experts a token needs"),
    "groups that do not divide": ({"n_group": 3}, None, "reap", "3 groups of 4 experts"),
    "nothing to spare": ({"num_experts_per_tok": 4}, None, "reap", "can remove no experts"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused_by_the_plan(tmp_path, what):
    config, change, name, message = BAD[what]
    checkpoint = write(tmp_path / "source", config, change or (lambda made: None))
    recipe = methods.get(name)
    with pytest.raises(JaxmoeError, match=message):
        prune_plan(checkpoint, recipe, recipe.settings(multiple=1), ratio=0.2)


def test_groups_of_mamba_are_not_those_of_experts(tmp_path):
    """Nemotron 3 says `n_groups` of its states, and nothing of groups of experts where there is one."""
    checkpoint = write(tmp_path / "source", {"n_groups": 3})
    recipe = methods.get("reap")
    assert prune_plan(checkpoint, recipe, recipe.settings(multiple=1), ratio=0.2).groups == 1


def test_every_name_for_the_count_is_edited(tmp_path):
    checkpoint = write(tmp_path / "source", {"num_local_experts": 4})
    prune(checkpoint, tmp_path / "small", prune_plan(checkpoint, FIRST, PruningSettings(), ratio=0.5), statistics=None)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["num_experts"], config["num_local_experts"]) == (2, 2)
    assert config["num_experts_per_tok"] == 2
    assert Checkpoint.open(tmp_path / "small").layers[0].shape.experts == 2


def test_multi_token_prediction_is_left_out_and_said(tmp_path):
    def predicting(made):
        made["mtp.layers.0.mlp.gate.weight"] = made["model.layers.0.mlp.gate.weight"]

    checkpoint = write(tmp_path / "source", {"num_nextn_predict_layers": 1}, predicting)
    plan = prune_plan(checkpoint, FIRST, PruningSettings(), ratio=0.5)
    report = prune(checkpoint, tmp_path / "small", plan, statistics=None)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not [name for name in Checkpoint.open(tmp_path / "small").tensors if "mtp" in name]
    assert "multi-token prediction are left out" in " ".join(outcome["detail"] for outcome in report["outcomes"])
    assert report["parameters"]["after"] == report["stored"]["parameters"]
