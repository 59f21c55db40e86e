"""What a config means where it says nothing, or several things: as transformers' configuration classes read it."""

import copy
import random
from functools import cache

import pytest
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, configure

from jaxmoe.checkpoint.families import FAMILIES as RECORDS
from jaxmoe.checkpoint.families import decoder_spec, runs
from jaxmoe.checkpoint.families.parts.keys import KINDS
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape

transformers = pytest.importorskip("transformers")

RUN = [name for name in RECORDS if runs(name)]
FAMILIES = sorted({*RUN} - {"bailing_moe", "deepseek"})
SHAPE = LayerShape(EXPERTS, HIDDEN, INTERMEDIATE)
# What the tensors say, so that a config that leaves it out cannot be compared without them.
OF_TENSORS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}


def reading(family: str, config: dict) -> dict:
    """Return what transformers' class makes of a config, with all its defaults."""
    name = {"kimi_k2": "deepseek_v3"}.get(family, family)
    settings = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    return {**transformers.CONFIG_MAPPING[name](**settings).to_dict(), "model_type": family}


def spec(config: dict, begin: int):
    """Return the decoder's spec, or the error; the layers before `begin` are dense."""
    try:
        return decoder_spec(config, dict.fromkeys(range(begin, 3), SHAPE))
    except JaxmoeError as error:
        return error


@cache
def complete(family: str) -> tuple[dict, int]:
    """Return the complete config of a tiny model, with values other than the defaults, and its first MoE layer."""
    others = {"rms_norm_eps": 3e-5, "max_position_embeddings": 96}
    if family != "mimo_v2_flash":
        others["rope_parameters"] = {"rope_type": "default", "rope_theta": 20000.0}
    config = {**configure(family, **others).to_dict(), "model_type": family}
    dense = (config.get("mlp_layer_types") or []).count("dense")
    return config, 0 if family == "solar_open" else dense or config.get("first_k_dense_replace", 0)


def check_alike(family: str, config: dict, begin: int) -> bool:
    """Compare our reading with transformers'; where either refuses, ours must refuse too."""
    ours = spec(config, begin)
    try:
        theirs = spec(reading(family, config), begin)
    except Exception as error:  # Whatever a config class of transformers raises is its refusal.
        theirs = error
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        assert isinstance(ours, JaxmoeError), f"transformers: {theirs}"
        return False
    assert ours == theirs
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_left_out(family):
    config, begin = complete(family)
    refused = set()
    for key in config.keys() - OF_TENSORS - {"model_type"}:
        if not check_alike(family, {k: v for k, v in config.items() if k != key}, begin):
            refused.add(key)
    # Those whose defaults contradict the other sizes of so small a model.
    sizes = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"}
    assert refused <= sizes | {"n_group", "topk_group"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_null(family):
    """Null means what transformers makes of it; where it refuses null for a number, ours is the default."""
    config, begin = complete(family)
    alike = 0
    for key in config.keys() - {"model_type"}:
        try:
            theirs = spec(reading(family, {**config, key: None}), begin)
        except Exception:  # As above; there is nothing to compare with.
            continue
        ours = spec({**config, key: None}, begin)
        assert (ours == theirs) or (isinstance(ours, JaxmoeError) and isinstance(theirs, JaxmoeError)), key
        alike += ours == theirs
    assert alike >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_left_out_at_random(family):
    config, begin = complete(family)
    chance = random.Random(family)
    kept = {"model_type", "num_experts_per_tok", "moe_topk", "num_hidden_layers", *OF_TENSORS}
    alike = 0
    for _ in range(12):
        some = {key: value for key, value in config.items() if key in kept or chance.random() < 0.6}
        alike += check_alike(family, some, begin)
    assert alike >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_config(family):
    full = reading(family, {})
    experts = next(full[key] for key in sorted(OF_TENSORS) if key in full)
    shapes = dict.fromkeys(range(full["num_hidden_layers"]), SHAPE._replace(experts=experts))
    if family in ("deepseek_v2", "dots1"):
        with pytest.raises(JaxmoeError, match="says nothing of num_experts"):
            decoder_spec({"model_type": family}, shapes)
    else:
        assert decoder_spec({"model_type": family}, shapes) == decoder_spec(full, shapes)


@pytest.mark.parametrize("family", RUN)
def test_every_key_that_is_read_is_checked(family):
    """A key without a kind could bring anything into the arithmetic."""
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "intermediate_size": 56}
    record = RECORDS[family]
    settings = record.settings({**sizes, "prefix_dense_intermediate_size": 56, "moe_intermediate_size": 24})
    record.decoder(settings, {1: SHAPE})
    assert settings.read <= KINDS.keys() | record.kinds.keys()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
POSITIONS = {
    "the older key alone": {"rope_scaling": YARN, "rope_theta": 5e4},
    "the newer key alone": {"rope_parameters": {**YARN, "rope_theta": 5e4}},
    "the older beside the newer": {
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "both with a base": {
        "rope_scaling": {**YARN, "rope_theta": 3e4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "a base beside both": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {**YARN, "rope_theta": 5e4},
        "rope_theta": 2e4,
    },
    "a base beside the newer": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_theta": 2e4},
    "a base beside a newer one without": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4},
    "an empty older key": {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "an older key of null": {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 5e4}},
    "a newer key of null": {"rope_scaling": YARN, "rope_parameters": None, "rope_theta": 2e4},
    "part of a head": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "partial_rotary_factor": 0.25},
    "part of a head, twice": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75},
        "partial_rotary_factor": 0.25,
    },
    "the original length beside": {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    "no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "no factor": {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
    "by kind of attention": {
        "rope_parameters": {
            "full_attention": {**YARN, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_theta": 2e4,
    },
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_said_twice_are_read_as_transformers_does(case):
    alike = []
    for family in FAMILIES:
        config, begin = complete(family)
        plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
        plain = {key: value for key, value in plain.items() if key not in ("rope_theta", "partial_rotary_factor")}
        positions = POSITIONS[case]
        if family == "cohere2_moe" and (positions.get("rope_scaling") or "partial_rotary_factor" in positions):
            assert "does not read" in str(spec({**plain, **positions}, begin))
        elif family == "mimo_v2_flash" and case != "by kind of attention":
            assert "for each kind" in str(spec({**plain, **positions}, begin))
        elif check_alike(family, {**plain, **positions}, begin):
            alike.append(family)
    assert len(alike) >= (3 if case == "by kind of attention" else len(FAMILIES) - 3), alike


ALIASES = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "mixtral": ("num_local_experts", "num_experts"),
    "deepseek_v3": ("n_routed_experts", "num_local_experts"),
    "ernie4_5_moe": ("moe_k", "num_experts_per_tok"),
    "hunyuan_v1_moe": ("moe_topk", "num_experts_per_tok"),
    "gpt_oss": ("num_experts_per_tok", "experts_per_token"),
    "glm4_moe_lite": ("qk_rope_head_dim", "head_dim"),
}


@pytest.mark.parametrize("family", ALIASES)
def test_two_names_of_one_thing(family):
    config, begin = complete(family)
    own, other = ALIASES[family]
    value = next(config[key] for key in (own, other) if config.get(key) is not None)
    plain = {key: value for key, value in config.items() if key not in (own, other)}
    for names in ({own: value}, {other: value}, {own: value, other: value}, {own: None, other: value}):
        assert spec({**plain, **names}, begin) == spec(config, begin)
    wrong = spec({**plain, own: value, other: value + 1}, begin)
    assert f"{own} = {value}" in str(wrong)
    assert f"{other} = {value + 1}" in str(wrong)
    assert "two names of one thing" in str(wrong)


def test_the_other_name_of_a_window():
    config, begin = complete("mimo_v2_flash")
    assert check_alike("mimo_v2_flash", {**config, "sliding_window_size": 5}, begin)
