"""Keys of config.json that other programs leave: harmless ones run, others are refused until the user says so."""

import inspect
import json

import numpy as np
import plain_checkpoint
import published
import pytest
from planned import make_plan, prune_plan

from jaxmoe import Checkpoint, StoredModel, methods
from jaxmoe.checkpoint.families import FAMILIES, decoder_spec
from jaxmoe.checkpoint.families.parts.harmless import HARMLESS, NEUTRAL
from jaxmoe.cli.app import app
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation.evaluate import evaluate_windows
from jaxmoe.texts import Windows

LEFT = {
    "Unsloth": {"unsloth_fixed": True, "unsloth_version": "2026.3.3"},
    "transformers 4.46": {"_attn_implementation_autoset": True, "_flash_attn_2_enabled": True},
    "attention": {"attn_implementation": "flash_attention_2", "use_flash_attention_2": True},
    "generation": {"temperature": 0.7, "top_k": 50, "bad_words_ids": [[5]], "max_length": 20, "do_sample": True},
    "a whole dump": {"pruned_heads": {"0": [1]}, "torchscript": True, "use_bfloat16": True, "num_labels": 3},
    "training": {"neftune_noise_alpha": 5, "gradient_checkpointing": True, "model_max_length": 2048},
    "programs": {"transformers.js_config": {"dtype": "q4"}, "language_model_only": True, "tokenizer_class": "Qwen2"},
}


@pytest.mark.parametrize("program", LEFT)
def test_what_programs_leave_changes_nothing(program):
    record = published.config("qwen3-30b-a3b")
    shapes = published.shapes(record)
    assert decoder_spec({**record, **LEFT[program]}, shapes) == decoder_spec(record, shapes)


def test_everything_that_transformers_keeps_of_generation_is_harmless():
    transformers = pytest.importorskip("transformers")
    general = transformers.PretrainedConfig().to_dict()
    assert general.keys() <= HARMLESS
    assert {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")} <= HARMLESS


def test_what_is_neutral_is_so_with_its_value_alone():
    record = published.config("qwen3-30b-a3b")
    shapes = published.shapes(record)
    for name, values in NEUTRAL.items():
        assert decoder_spec({**record, name: values[0]}, shapes) == decoder_spec(record, shapes)
    with pytest.raises(JaxmoeError, match="n_group"):
        decoder_spec({**record, "n_group": 4}, shapes)


@pytest.mark.parametrize("name", ["ernie-4.5-21b-a3b", "gpt-oss-20b", "hunyuan-a13b", "minimax-m2"])
def test_what_one_architecture_has_is_harmless_there_alone(name):
    record, other = published.config(name), published.config("qwen3-30b-a3b")
    shapes, others = published.shapes(record), published.shapes(other)
    family = FAMILIES[record["model_type"]]
    plain = decoder_spec(record, shapes)
    given = {**dict.fromkeys(family.harmless.split(), 3), **{key: values[0] for key, values in family.neutral.items()}}
    assert given
    assert decoder_spec({**record, **given}, shapes) == plain
    for key, value in given.items():
        with pytest.raises(JaxmoeError, match=f"does not know what {key} "):
            decoder_spec({**other, key: value}, others)
    for key in family.neutral:
        with pytest.raises(JaxmoeError, match=f"does not know what {key} "):
            decoder_spec({**record, key: 0.5}, shapes)


def test_unknown_keys_are_refused_until_they_are_ignored():
    record = {**published.config("qwen3-30b-a3b"), "new_trick": 3, "other_trick": "yes"}
    shapes = published.shapes(record)
    with pytest.raises(JaxmoeError, match="--ignore-config-keys new_trick,other_trick"):
        decoder_spec(record, shapes)
    with pytest.raises(JaxmoeError, match=r"new_trick \(3\)"):
        decoder_spec(record, shapes, ["other_trick"])
    assert decoder_spec(record, shapes, ["new_trick", "other_trick"]) == decoder_spec(
        published.config("qwen3-30b-a3b"), shapes
    )
    with pytest.raises(JaxmoeError, match="--ignore-config-keys rope_theta: jaxmoe knows what this means"):
        decoder_spec(record, shapes, ["new_trick", "other_trick", "rope_theta"])


def test_what_was_ignored_is_told(tmp_path):
    folder = plain_checkpoint.write(tmp_path / "x", new_trick=3)
    with pytest.raises(JaxmoeError, match="--ignore-config-keys new_trick"):
        StoredModel(folder)
    model = StoredModel(folder, ignore_config_keys=["new_trick", "not_there"])
    assert model.ignored == ("new_trick",)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) % 32
    texts = [Windows(name="text", fingerprint="x", ids=ids, counted=np.ones(ids.shape, bool), left_out=0)]
    assert evaluate_windows(model, texts).as_json()["ignored_config_keys"] == ["new_trick"]
    checkpoint = Checkpoint.open(folder, ignore_config_keys=["new_trick"])
    assert "new_trick" in checkpoint.notes[0]
    method = methods.get("nystrom")
    assert prune_plan(checkpoint, method, method.settings(multiple=1), ratio=0.4).keep
    with pytest.raises(JaxmoeError, match="--ignore-config-keys new_trick"):
        prune_plan(Checkpoint.open(folder), method, method.settings(multiple=1), ratio=0.4)
    svd = methods.get("svd")
    assert make_plan(Checkpoint.open(folder), svd, svd.settings(), ratio=0.4), "the weights alone need no key"
    plain = json.loads((folder / "config.json").read_text())
    del plain["new_trick"]
    (folder / "config.json").write_text(json.dumps(plain))
    assert "ignored_config_keys" not in evaluate_windows(StoredModel(folder), texts).as_json()


def test_every_command_that_builds_a_model_takes_the_option():
    commands = {command.name: inspect.signature(command.callback).parameters for command in app.registered_commands}
    with_option = {name for name, parameters in commands.items() if "ignore_config_keys" in parameters}
    assert with_option == {"calibrate", "evaluate", "compare", "compress", "plan", "recover"}
