"""The frequencies that configs ask for, against transformers' own."""

import copy

import numpy as np
import published
import pytest

from jaxmoe.checkpoint.families import decoder_spec
from jaxmoe.checkpoint.families.parts.rotary import rotary
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.rotary import angles


def theirs(config, length: int | None = None):
    """Return transformers' frequencies and scale."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)
    kind = config.rope_parameters["rope_type"]
    if getattr(config, "qk_rope_head_dim", None):
        config.head_dim = config.qk_rope_head_dim
    elif getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if kind == "default":
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        size = int(config.head_dim * share)
        return config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return frequencies.double().numpy(), scale


@pytest.mark.parametrize("name", published.NAMES)
def test_frequencies_of_published_models(name):
    pytest.importorskip("torch")
    config = published.transformers_reading(name)
    if config is None or name == "hunyuan-a13b":
        pytest.skip("transformers computes these elsewhere, or has no such class")
    record = published.config(name)
    found = decoder_spec(record, published.shapes(record)).layers[0].attention.rotary
    frequencies, scale = theirs(config)
    np.testing.assert_allclose(found.frequencies, frequencies, rtol=2e-6)
    # LongRoPE's own factors of cosine and sine are the model's, see below.
    assert name == "phi-3.5-moe" or found.scale == pytest.approx(scale, rel=1e-7)


def test_hunyuans_alpha():
    pytest.importorskip("torch")
    from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1RotaryEmbedding

    record = published.config("hunyuan-a13b")
    config = published.transformers_reading("hunyuan-a13b")
    config.head_dim = 128
    module = HunYuanMoEV1RotaryEmbedding(config)
    found = decoder_spec(record, published.shapes(record)).layers[0].attention.rotary
    np.testing.assert_allclose(found.frequencies, module.inv_freq.numpy(), rtol=2e-6)
    assert found.longest is None


def test_longrope_short_and_long():
    pytest.importorskip("torch")
    record = published.config("phi-3.5-moe")
    config = published.transformers_reading("phi-3.5-moe")
    found = decoder_spec(record, published.shapes(record)).layers[0].attention.rotary
    for length, frequencies in ((4096, found.frequencies), (4097, found.long_frequencies)):
        expected, _ = theirs(config, length)
        np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
        cosine, _ = angles(found, length)
        np.testing.assert_allclose(cosine[0], 1.243163121016122, rtol=1e-6)
        np.testing.assert_allclose(
            cosine[-1], np.cos(np.float32(length - 1) * np.float32(frequencies)) * 1.243163121016122, atol=1e-5
        )


def test_longrope_without_its_own_scale():
    """The scale follows from how far the context was stretched."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 4096,
    }
    found = rotary(parameters, 8, positions=131072)
    assert found.scale == found.long_scale == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn without a length": {"rope_type": "yarn", "factor": 8.0},
    "yarn with its own factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16},
    "yarn untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_slow": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_scaled_frequencies(kind, form):
    """Both the older and the newer way to say it in a config."""
    pytest.importorskip("torch")
    from transformers import MixtralConfig

    record = published.config("mixtral-8x7b")
    scaling = SCALINGS[kind]
    own = {"rope_scaling": scaling} if form == "rope_scaling" else {}
    if form == "rope_parameters":
        kinds = {"rope_type": scaling.get("rope_type", scaling.get("type")), "rope_theta": record.pop("rope_theta")}
        own = {"rope_parameters": {**scaling, **kinds}}
    found = decoder_spec({**record, **own}, published.shapes(record)).layers[0].attention.rotary
    frequencies, scale = theirs(MixtralConfig(**copy.deepcopy({**record, **own})))
    np.testing.assert_allclose(found.frequencies, frequencies, rtol=2e-6)
    assert found.scale == pytest.approx(scale)


def test_dynamic_scaling_holds_up_to_the_trained_length():
    found = rotary({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 8, positions=16)
    assert angles(found, 16)[0].shape == (16, 4)
    with pytest.raises(JaxmoeError, match="17 tokens"):
        angles(found, 17)
