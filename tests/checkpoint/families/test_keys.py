"""Values of config.json of the wrong kind, sign or size: one message that lists them, never another exception."""

import math
import random
import time

import published
import pytest

from jaxmoe.checkpoint.families import FAMILIES, decoder_spec, runs
from jaxmoe.checkpoint.families.parts import rotary
from jaxmoe.checkpoint.families.parts.keys import KINDS, check_kinds
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.spec import DecoderSpec

HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 999, 1000, 4096, 2**31, 2**63, 2**200, -(2**63), 10**5000),
    *(0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf, "", "2", "full_attention", "x" * 10_000),
    *([], [1], [1, 2], [2] * 3, [True], ["sparse"] * 3, ["full_attention"] * 3, [None], [[1]]),
    *({}, {"a": 1}, {"type": "yarn"}, {"rope_type": ["yarn"]}, {"rope_type": None, "rope_theta": "1"}),
    *({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, {"full_attention": None, "sliding_attention": []}),
    *({"full_attention": {"rope_theta": 1e4}}, {"rope_type": "longrope", "long_factor": [1], "short_factor": [2]}),
    *({"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "alpha": 1e300}, {"partial_rotary_factor": 0.01}),
)
SHAPE = LayerShape(experts=8, hidden=64, intermediate=24)
SHAPES = {1: SHAPE, 2: SHAPE}
SMALL = {
    "prefix_dense_intermediate_size": 56,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
}
QWEN = {key: value for key, value in SMALL.items() if key != "prefix_dense_intermediate_size"}


@pytest.mark.parametrize("draws", [150, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if runs(name)])
def test_hostile_values_are_refused_or_understood(family, draws):
    chance = random.Random(family)
    settings = FAMILIES[family].settings({"model_type": family, **SMALL})
    FAMILIES[family].decoder(settings, SHAPES)
    small = {"model_type": family, **{key: value for key, value in SMALL.items() if key in settings.read}}
    assert isinstance(decoder_spec(small, SHAPES), DecoderSpec)
    begin = time.monotonic()
    for _ in range(draws):
        changes = {key: chance.choice(HOSTILE) for key in chance.sample(sorted(settings.read), chance.randint(1, 2))}
        message = ""
        try:
            made = decoder_spec({**small, **changes}, SHAPES)
            assert all(map(math.isfinite, (made.norm.epsilon, made.logit_scale, made.embedding_scale)))
        except JaxmoeError as error:
            message = str(error)
        assert len(message) < 1000, changes
    assert time.monotonic() - begin < 20


def test_all_offenders_are_named_with_what_is_expected():
    wrong = {
        "num_experts_per_tok": -1,
        "rms_norm_eps": [1e-6],
        "rope_theta": math.inf,
        "vocab_size": 2**63,
        "tie_word_embeddings": "yes",
        "rope_scaling": [],
        "hidden_size": True,
    }
    with pytest.raises(JaxmoeError) as error:
        decoder_spec({**published.config("qwen3-30b-a3b"), **wrong}, {})
    for text in (
        "num_experts_per_tok = -1 is not a whole number of 1 to 1,048,576",
        "rms_norm_eps = [1e-06] is not a number of 0 to 1",
        "rope_theta = inf is not a finite number above 0",
        "vocab_size = 9223372036854775808 is not a whole number of 1 to 16,777,216",
        "tie_word_embeddings = 'yes' is not true or false",
        "rope_scaling = [] is not a JSON object",
        "hidden_size = True is not a whole number",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "a token chooses 9 of 8 experts"),
        ({"num_experts": 4}, "4 experts, by config.json or by the default of its model_type, and the tensors hold 8"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"head_dim": 7}, "7 of a head's 7 numbers cannot be rotated in pairs"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 1 << 20}, "no model has such"),
        ({"num_experts_per_tok": [2, 2]}, "has 2 entries, and there are 3 layers"),
        ({"sliding_window": 0, "use_sliding_window": True}, "no token would see any"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor = '4' is not a finite number above 0"),
    ],
)
def test_numbers_that_contradict_one_another(changes, message):
    with pytest.raises(JaxmoeError, match=r"config\.json") as error:
        decoder_spec({"model_type": "qwen3_moe", **QWEN, **changes}, SHAPES)
    assert message in str(error.value)


def test_experts_that_cannot_be_chosen():
    def refused(**changes):
        with pytest.raises(JaxmoeError) as error:
            decoder_spec({"model_type": "deepseek_v3", **QWEN, **changes}, SHAPES)
        return str(error.value)

    assert "8 experts in 3 groups" in refused(n_group=3)
    assert "8 experts in 2 groups, of which 4 are chosen from" in refused(n_group=2, topk_group=4)
    assert "a token chooses 6 experts, and 1 of 2 groups have fewer" in refused(n_group=2, num_experts_per_tok=6)
    with pytest.raises(JaxmoeError, match="a sparse mixer has two picks"):
        decoder_spec({"model_type": "phimoe", **QWEN, "num_experts_per_tok": 3, "n_group": None}, SHAPES)
    assert "have one each" in refused(n_group=8, topk_group=8)


def test_sizes_for_each_layer():
    config = {"model_type": "hunyuan_v1_moe", **QWEN, "num_key_value_heads": 2, "num_experts_per_tok": None}
    shapes = {index: SHAPE._replace(experts=4 + index, intermediate=8 * (index + 1)) for index in range(3)}
    lists = {"num_experts": [4, 5, 6], "moe_topk": [1, 2, 3], "num_shared_expert": [1, 2, 1]}
    spec = decoder_spec({**config, **lists, "moe_intermediate_size": [8, 16, 24]}, shapes)
    blocks = [layer.feed_forward for layer in spec.layers]
    assert [(block.router.experts, block.router.top_k) for block in blocks] == [(4, 1), (5, 2), (6, 3)]
    assert [block.shared.intermediate for block in blocks] == [8, 32, 24]


def test_what_is_null_is_never_of_the_wrong_kind():
    check_kinds(dict.fromkeys(KINDS))
    check_kinds(dict.fromkeys(rotary.KINDS), rotary.KINDS)
