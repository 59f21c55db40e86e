"""What stands in a factored checkpoint's configuration, written and read."""

import json

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint.factored_format import (
    ExpertsModule,
    LinearLayout,
    LinearModule,
    factored_config,
    is_factored,
    read_record,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LinearShape, LowRank, SharedBasis

SIZES = LayerShape(experts=4, hidden=6, intermediate=5)
MODULE = "model.layers.3.mlp.experts"
ORIGINAL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 6,
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "num_experts": 4,
    "eos_token_id": [1, 2],
}


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def layer(*, abstract=False) -> CompressedLayer:
    kinds = {"bases": 2, "rank": 3, "activation": "tanh", "transposed": True, "mean": True}
    down = SharedBasis.abstract(SIZES.of("down"), "float32", **kinds)
    terms = {
        "gate": (LowRank.abstract(SIZES.of("gate"), "float32", rank=2), Dense.abstract(SIZES.of("gate"), "float32")),
        "up": (Dense.abstract(SIZES.of("up"), "float32"),),
        "down": (down,),
    }
    made = CompressedLayer(terms=terms, sizes=SIZES)
    if abstract:
        return made
    tensors = {name: draw(*x.shape) for name, x in made.tensors().items()}
    return CompressedLayer.from_tensors(tensors, made.spec(), SIZES)


def described(made: CompressedLayer) -> ExpertsModule:
    return ExpertsModule(made.sizes, made.spec())


def test_original_configuration_is_edited_in_place():
    config = factored_config(ORIGINAL, {MODULE: described(layer())})
    assert json.loads(json.dumps(config)) == config
    untouched = {
        key: value for key, value in config.items() if key in ORIGINAL and key not in ("architectures", "model_type")
    }
    assert untouched == {key: ORIGINAL[key] for key in ("hidden_size", "rope_scaling", "num_experts", "eos_token_id")}
    assert list(config)[: len(ORIGINAL)] == list(ORIGINAL)
    assert config["model_type"] == "jaxmoe_qwen3_moe"
    assert config["architectures"] == ["FactoredQwen3MoeForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_jaxmoe.FactoredQwen3MoeConfig",
        "AutoModel": "modeling_jaxmoe.FactoredQwen3MoeModel",
        "AutoModelForCausalLM": "modeling_jaxmoe.FactoredQwen3MoeForCausalLM",
    }
    record = config["jaxmoe"]
    assert {key: record[key] for key in ("format_version", "version", "minimum_transformers", "model_type")} == {
        "format_version": 2,
        "version": jaxmoe.__version__,
        "minimum_transformers": "5.16",
        "model_type": "qwen3_moe",
    }
    shared = {"kind": "shared_basis", "bases": 2, "rank": 3, "activation": "tanh", "transposed": True, "mean": True}
    assert record["modules"] == {
        MODULE: {
            "kind": "experts",
            "shape": {"experts": 4, "hidden": 6, "intermediate": 5, "gated": True},
            "terms": {
                "gate": [{"kind": "low_rank", "rank": 2}, {"kind": "dense"}],
                "up": [{"kind": "dense"}],
                "down": [shared],
            },
        }
    }


def test_abstract_layers_are_described_alike():
    assert factored_config(ORIGINAL, {MODULE: described(layer(abstract=True))}) == factored_config(
        ORIGINAL, {MODULE: described(layer())}
    )


@pytest.mark.parametrize(
    "original",
    [
        ORIGINAL,
        {"model_type": "mixtral", "hidden_size": 6},
        {**ORIGINAL, "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}},
    ],
)
def test_reading_gives_back_the_original_and_the_layers(original):
    made = layer()
    config = json.loads(json.dumps(factored_config(original, {MODULE: described(made)})))
    assert is_factored(config)
    assert not is_factored(original)
    back, layers = read_record(config)
    assert back == original
    found = layers[MODULE]
    assert found.shape == SIZES
    rebuilt = CompressedLayer.from_tensors(made.tensors(), found.terms, found.shape)
    for projection in SIZES.projections:
        np.testing.assert_array_equal(rebuilt.materialize(projection), made.materialize(projection))


STACKS = [{"name": "a.gate_up", "target": "gate_up"}, {"name": "a.down", "target": "down"}]


def entry(change):
    """Return a change of the record of the module."""
    return lambda config: change(config["jaxmoe"]["modules"][MODULE])


def renamed(name, keep=False):
    """Return a change that gives the module another path."""

    def change(config):
        experts = config["jaxmoe"]["modules"]
        experts[name] = experts[MODULE]
        if not keep:
            del experts[MODULE]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["jaxmoe"].update(format_version=4, version="9.1"),
            "format 4, written by jaxmoe 9.1.*up to 3.*upgrade",
        ),
        (lambda c: c["jaxmoe"].pop("format_version"), "format None"),
        (lambda c: c.pop("jaxmoe"), "no jaxmoe record"),
        (lambda c: c.update(model_type="qwen3_moe"), "'qwen3_moe' is not a factored checkpoint"),
        (lambda c: c["jaxmoe"].update(format_version=True), "format True"),
        (lambda c: c["jaxmoe"].pop("modules"), "does not hold.*modules"),
        (lambda c: c["jaxmoe"].update(modules=[]), "does not hold.*Expected `object`"),
        (lambda c: c["jaxmoe"].update(modules={}), "does not hold.*length >= 1"),
        (lambda c: c["jaxmoe"].update(surprise=1), "unknown field `surprise`"),
        (lambda c: c["jaxmoe"].update(model_type="olmoe"), "'jaxmoe_qwen3_moe'.*'olmoe'"),
        (renamed("mlp.experts"), "does not hold.*key"),
        (renamed("model.layers.0.mlp\0.experts"), "does not hold.*key"),
        (renamed("other.layers.3.mlp.experts", keep=True), "several experts of layer 3"),
        (entry(lambda e: e.pop("shape")), "does not hold.*shape"),
        (entry(lambda e: e["shape"].update(depth=3)), "does not hold.*depth"),
        (entry(lambda e: e["shape"].update(experts=-4)), "does not hold.*>= 1"),
        (entry(lambda e: e["shape"].update(hidden=2**63)), "does not hold.*<= 2147483647"),
        (entry(lambda e: e["shape"].update(gated=1)), "does not hold.*bool"),
        (entry(lambda e: e.update(terms=[])), "does not hold.*terms"),
        (entry(lambda e: e["terms"].update(down=None)), "does not hold.*terms"),
        (entry(lambda e: e["terms"].update(down=["dense"])), "does not hold.*terms"),
        (entry(lambda e: e.update(main_experts=0)), "does not hold.*main_experts"),
        (entry(lambda e: e.update(main_experts=1, renorm="all")), "does not hold.*renorm"),
        (entry(lambda e: e.update(layout={"dtype": "float32"})), "does not hold.*stacks"),
        (entry(lambda e: e.update(layout={"dtype": "int8", "stacks": []})), "does not hold.*dtype"),
        (entry(lambda e: e.update(layout={"dtype": "float32", "stacks": []})), "layout of .*hold nothing"),
        (entry(lambda e: e.update(layout={"dtype": "float32", "stacks": [*STACKS, STACKS[0]]})), "layout.*once"),
        (entry(lambda e: e.update(layout={"dtype": "float32", "stacks": [{"name": "a"}]})), "does not hold.*target"),
        (
            entry(lambda e: e.update(layout={"dtype": "float32", "stacks": [{**STACKS[0], "name": "a\0"}, STACKS[1]]})),
            "cannot be the name",
        ),
    ],
)
def test_reading_refuses(change, message):
    config = json.loads(json.dumps(factored_config(ORIGINAL, {MODULE: described(layer())})))
    change(config)
    with pytest.raises(JaxmoeError, match=message):
        read_record(config)


def test_an_architecture_without_factored_form_is_refused():
    with pytest.raises(JaxmoeError, match=r"'llama4'.*router scales.*export it dense"):
        factored_config({"model_type": "llama4"}, {MODULE: described(layer())})


def test_a_layer_that_lacks_a_projection_is_refused():
    half = CompressedLayer(terms={"down": layer().terms["down"]}, sizes=SIZES)
    with pytest.raises(JaxmoeError, match="no term for gate, up"):
        half.check()


LINEAR = "model.layers.3.self_attn.q_proj"


def linear(**changes) -> LinearModule:
    layout = LinearLayout("bfloat16", f"{LINEAR}.weight")
    terms = [LowRank.abstract((1, 8, 6), "float32", rank=2).spec()]
    return LinearModule(**{"shape": LinearShape(8, 6), "terms": terms, "layout": layout, "bias": True, **changes})


def test_a_linear_map_stands_beside_the_experts():
    modules = {MODULE: described(layer()), LINEAR: linear()}
    config = json.loads(json.dumps(factored_config(ORIGINAL, modules)))
    assert config["jaxmoe"]["modules"][LINEAR] == {
        "kind": "linear",
        "shape": {"out": 8, "in": 6},
        "terms": [{"kind": "low_rank", "rank": 2}],
        "bias": True,
        "layout": {"dtype": "bfloat16", "name": "model.layers.3.self_attn.q_proj.weight"},
    }
    assert read_record(config) == (ORIGINAL, modules)
    alone = json.loads(json.dumps(factored_config(ORIGINAL, {LINEAR: linear()})))
    assert read_record(alone)[1] == {LINEAR: linear()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("kind"), "does not hold.*kind"),
        (lambda e: e.update(kind="embedding"), "does not hold.*embedding"),
        (lambda e: e.update(kind="experts"), "does not hold"),
        (lambda e: e["shape"].update(out=0), "does not hold.*>= 1"),
        (lambda e: e["shape"].update(experts=4), "does not hold.*experts"),
        (lambda e: e.update(terms={}), "does not hold.*terms"),
        (lambda e: e.pop("bias"), "does not hold.*bias"),
        (lambda e: e.pop("layout"), "does not hold.*layout"),
        (lambda e: e["layout"].update(dtype="int4"), "does not hold.*dtype"),
        (lambda e: e["layout"].update(name="a\0"), r"layout of model.layers.3.self_attn.q_proj.*cannot be the name"),
        (lambda e: e.update(main_experts=1), "does not hold.*main_experts"),
    ],
)
def test_reading_refuses_a_linear_map_that_is_none(change, message):
    config = json.loads(json.dumps(factored_config(ORIGINAL, {MODULE: described(layer()), LINEAR: linear()})))
    change(config["jaxmoe"]["modules"][LINEAR])
    with pytest.raises(JaxmoeError, match=message):
        read_record(config)


def test_format_1_has_experts_alone():
    config = json.loads(json.dumps(factored_config(ORIGINAL, {MODULE: described(layer())})))
    record = config["jaxmoe"]
    entry = record["modules"][MODULE]
    del entry["kind"]
    experts = record.pop("modules")
    old = {**config, "jaxmoe": {**record, "format_version": 1, "experts": experts}}
    assert read_record(old) == (ORIGINAL, {MODULE: described(layer())})
    for wrong in ([], None, {}, {MODULE: 3}):
        with pytest.raises(JaxmoeError, match="does not hold"):
            read_record({**old, "jaxmoe": {**old["jaxmoe"], "experts": wrong}})
    with pytest.raises(JaxmoeError, match="does not hold"):
        read_record({**old, "jaxmoe": {**old["jaxmoe"], "modules": {}}})
