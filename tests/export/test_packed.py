"""Packed checkpoints: what may be packed, what is written, and that it is read again to the bit."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import plain_checkpoint
import pytest

from jaxmoe.checkpoint import Checkpoint, write_tensors
from jaxmoe.checkpoint.layout import Stack
from jaxmoe.checkpoint.quantization import assemble
from jaxmoe.checkpoint.quantization.settings import group_of, ignored
from jaxmoe.checkpoint.tensor_file import read_header
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import digest
from jaxmoe.export.loading import loads_in
from jaxmoe.export.packed import Scheme, digests, most_devices, packed_config, packed_tensors, schemes
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank
from jaxmoe.factors.quantised import QuantisedArray
from jaxmoe.factors.store import Rounded, Store

SIZES = LayerShape(experts=3, hidden=128, intermediate=64)
STORE = Store(bits=4, group=64, zero="none")


def abstract(stores=STORE, **others):
    """Return a layer whose projections are held in some way, abstract; `others` name other ways of some."""
    terms = {
        name: (Dense(weight=QuantisedArray.abstract(SIZES.of(name), others.get(name, stores))),)
        for name in SIZES.projections
    }
    return CompressedLayer(terms=terms, sizes=SIZES)


def rounded(shape, store, seed=0):
    """Return a random array of codes and scales, packed."""
    random = np.random.default_rng(seed)
    experts, out, in_ = shape
    codes = random.integers(0, 2**store.bits, shape).astype(np.uint8)
    scale = jnp.asarray(random.lognormal(-4, 1, (experts, out, store.groups(in_))), store.scale).astype(jnp.float32)
    return QuantisedArray.pack(Rounded(codes, scale), store)


@pytest.mark.parametrize(
    ("store", "scheme"),
    [
        (STORE, (4, 64)),
        (replace(STORE, bits=8, group=32), (8, 32)),
        (replace(STORE, group=0), (4, 0)),
        (replace(STORE, scale="float32"), (4, 64)),
    ],
)
def test_one_scheme(store, scheme):
    assert schemes({0: abstract(store), 3: abstract(store)}) == {0: scheme, 3: scheme}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (abstract(replace(STORE, zero="integer")), r"--set zero=none.* layer 5, gate: integer zeros"),
        (abstract(replace(STORE, bits=3)), "such as gptq4 or gptq8.* layer 5, gate: 3 bits"),
        (abstract(replace(STORE, group=16)), r"--set group=64.* groups of 16"),
        (abstract(replace(STORE, table="matrix")), "gptq4 or rtn4.* codebook"),
        (abstract(down=replace(STORE, group=0)), r"--set group=64.* down 4 bits in whole rows"),
        (abstract(down=replace(STORE, bits=8)), "layer 5: gate 4 bits in groups of 64"),
        (
            CompressedLayer(
                sizes=SIZES,
                terms={**abstract().terms, "down": (LowRank.abstract(SIZES.of("down"), "float32", rank=2),)},
            ),
            "factor nothing.* layer 5, down: low_rank",
        ),
        (
            CompressedLayer(
                sizes=SIZES, terms={**abstract().terms, "down": (Dense.abstract(SIZES.of("down"), "bfloat16"),)}
            ),
            "layer 5, down: not quantised",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_with_what_can(layer, message):
    for form in ("packed", "packed-vllm"):
        with pytest.raises(JaxmoeError, match=f"--export {form} takes .*{message}"):
            schemes({2: abstract(), 5: layer}, form)


def test_layers_of_several_widths_are_for_vllm_alone():
    layers = {0: abstract(), 1: abstract(replace(STORE, bits=8))}
    with pytest.raises(JaxmoeError, match=r"bits_per=model.* packed-vllm.* layer 0: 4 bits .* layer 1: 8 bits"):
        schemes(layers)
    assert schemes(layers, "packed-vllm") == {0: (4, 64), 1: (8, 64)}


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint.open(plain_checkpoint.write(tmp_path / "source"))


@pytest.mark.parametrize("store", [STORE, replace(STORE, bits=8, group=0), replace(STORE, scale="float32", group=32)])
@pytest.mark.parametrize("target", ["gate_up", None])
def test_the_reader_finds_what_was_packed(store, target, checkpoint, tmp_path):
    """To the bit, also where gate and up were held one above the other."""
    dtype = np.dtype("float32") if store.scale == "float32" else checkpoint.layers[0].dtype
    names = {target: "gate_up", "down": "down"} if target else dict.fromkeys(SIZES.projections)
    terms = {name: (Dense(weight=rounded(SIZES.of(name), store, seed)),) for seed, name in enumerate(names)}
    experts = CompressedLayer(terms=terms, sizes=SIZES)
    names = {name: f"model.layers.0.mlp.experts.{{expert}}.{name}_proj.weight" for name in SIZES.projections}
    written = tuple(Stack(name=names[name], target=name) for name in SIZES.projections)
    layer = replace(checkpoint.layers[0], written=written, shape=SIZES, dtype=dtype)
    planned = packed_tensors(layer, experts)
    write_tensors(tmp_path / "t.safetensors", planned)
    entries = read_header(tmp_path / "t.safetensors")
    found = assemble(entries, packed_config(checkpoint, {}, {0: Scheme(store.bits, store.group)}))
    told = digests(experts, found[names["up"].format(expert=0)].read().dtype)
    for name in SIZES.projections:
        own = np.stack([found[names[name].format(expert=e)].read() for e in range(SIZES.experts)])
        np.testing.assert_array_equal(own, np.asarray(experts.materialize(name)).astype(own.dtype))
        assert digest(own) == told[name]
    assert entries[names["up"].format(expert=2) + "_scale"].dtype == ("F32" if store.scale == "float32" else "BF16")


def test_the_config_names_layers_where_they_differ(checkpoint):
    found = {index: Scheme(4 if index < 2 else 8, 64) for index in range(4)}
    config = packed_config(checkpoint, {"model_type": "mixtral"}, found)
    assert config["model_type"] == "mixtral"
    settings = config["quantization_config"]
    for index, scheme in found.items():
        group = group_of(f"model.layers.{index}.block_sparse_moe.experts.11.w2", settings)
        assert group is not None
        assert group.weights == scheme.weights
    # Of eleven, one is not the first.
    assert group_of("model.layers.11.mlp.experts.0.up_proj", settings) is None


def test_multi_token_prediction_stays_as_it_is(checkpoint):
    names = ("model.layers.4.mlp.experts.0.up_proj.weight", "model.layers.4.eh_proj.weight")
    config = packed_config(replace(checkpoint, mtp=names), {}, {0: Scheme(4, 64)})
    settings = config["quantization_config"]
    assert ignored("model.layers.4.mlp.experts.7.down_proj", settings)
    assert not ignored("model.layers.3.mlp.experts.7.down_proj", settings)


def test_the_most_devices():
    """Group sizes that fit Qwen3-30B's experts of 768 channels, as quantized checkpoints of it are served."""
    shape = LayerShape(128, 2048, 768)
    assert [most_devices(shape, group) for group in (128, 64, 32)] == [2, 4, 8]
    assert "on up to 2 devices" in " ".join(loads_in("packed", "qwen3_moe", {(shape, Scheme(4, 128))}))
    assert "not transformers" in " ".join(loads_in("packed-vllm", "qwen3_moe", {(shape, Scheme(4, 128))}))
