"""Damaged and unsuitable checkpoints: one message each, with the offender, the reason and the mend."""

import json

import numpy as np
import plain_checkpoint
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.errors import JaxmoeError

INDEX = "model.safetensors.index.json"
MOE = "model.layers.1.mlp."
EXPERT = f"{MOE}experts.2.up_proj.weight"


def tensors(change):
    def apply(folder):
        made = load_file(folder / "model.safetensors")
        change(made)
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changes):
    def apply(folder):
        record = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))

    return apply


def content(name, text):
    return lambda folder: (folder / name).write_text(text)


def sharded(change):
    """Split the checkpoint in two files with an index, and change the index."""

    def apply(folder):
        made = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for number in range(2):
            own = sorted(made)[number::2]
            save_file({name: made[name] for name in own}, folder / f"part{number}.safetensors")
            weight_map.update(dict.fromkeys(own, f"part{number}.safetensors"))
        record = {"metadata": {}, "weight_map": weight_map}
        change(record, folder)
        (folder / INDEX).write_text(json.dumps(record))

    return apply


def renamed(new):
    return lambda folder: (folder / "model.safetensors").rename(folder / new)


def rename_all(old, new):
    def change(made):
        for name in [name for name in made if old in name]:
            made[name.replace(old, new)] = made.pop(name)

    return tensors(change)


def fuse(drop):
    """Add the fused form of one layer's gate and up, and drop some of the others."""

    def change(made):
        both = [
            np.concatenate([made[f"{MOE}experts.{e}.{name}_proj.weight"] for name in ("gate", "up")]) for e in range(4)
        ]
        made[f"{MOE}experts.gate_up_proj"] = np.stack(both)
        for name in [name for name in made if ".layers.1." in name and name.endswith(drop)]:
            del made[name]

    return tensors(change)


def linked_outside(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def cast(name, dtype):
    return tensors(lambda made: made.update({name: made[name].astype(dtype)}))


def add(name, shape=(2, 2)):
    return tensors(lambda made: made.update({name: np.ones(shape, "float32")}))


def drop(*names):
    return tensors(lambda made: [made.pop(name) for name in names])


def experts_of_two_sizes(folder):
    """As ERNIE 4.5 VL has them: experts for text, and counted on, smaller ones for pictures; the sizes are lists."""

    def change(made):
        for name in [name for name in made if ".experts." in name]:
            head, number, tail = name.split(".experts.")[0], *name.split(".experts.")[1].split(".", 1)
            small = made[name][:, :4] if "down" in tail else made[name][:4]
            made[f"{head}.experts.{int(number) + 4}.{tail}"] = small.copy()

    tensors(change)(folder)
    config(num_experts=[4, 4], moe_intermediate_size=[8, 4])(folder)


def mlx_layout(made):
    for layer in range(2):
        for name in ("gate", "up", "down"):
            own = [made.pop(f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight") for e in range(4)]
            made[f"model.layers.{layer}.mlp.switch_mlp.{name}_proj.weight"] = np.stack(own)


CASES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config no JSON": (content("config.json", "{"), "config.json is not JSON"),
    "config a list": (content("config.json", "[]"), "config.json does not hold what it should"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
    "no model_type": (config(model_type=None), "names no model_type"),
    "model_type a number": (config(model_type=7), "names no model_type"),
    "compressed already": (config(jaxmoe={"format_version": 1}), "was compressed by jaxmoe already"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the weights are missing"),
    "pickled weights": (renamed("pytorch_model.bin"), "only safetensors are read"),
    "gguf weights": (renamed("model-q4.gguf"), "llama.cpp's format: only safetensors are read"),
    "another name": (renamed("weights.safetensors"), "neither model.safetensors nor"),
    "shards without index": (renamed("model-00001-of-00001.safetensors"), "fetch the index too"),
    "an adapter": (
        lambda f: (renamed("adapter_model.safetensors")(f), content("adapter_config.json", "{}")(f)),
        "holds an adapter",
    ),
    "link out of the folder": (linked_outside, "is a link out of the checkpoint's folder"),
    "index no JSON": (lambda f: (renamed("a.safetensors")(f), content(INDEX, "nope")(f)), f"{INDEX} is not JSON"),
    "index without map": (
        lambda f: (renamed("a.safetensors")(f), content(INDEX, "{}")(f)),
        "required field `weight_map`",
    ),
    "index of numbers": (
        lambda f: (renamed("a.safetensors")(f), content(INDEX, '{"weight_map": {"a": 1}}')(f)),
        "`$.weight_map[...]`",
    ),
    "index names a missing file": (
        sharded(lambda r, f: r["weight_map"].update({EXPERT: "part7.safetensors"})),
        "part7.safetensors is missing",
    ),
    "index leads up": (
        sharded(lambda r, f: r["weight_map"].update({EXPERT: "../part0.safetensors"})),
        "'../part0.safetensors' lies outside",
    ),
    "index leads up after going down": (
        sharded(lambda r, f: r["weight_map"].update({EXPERT: "a/../../part0.safetensors"})),
        "lies outside",
    ),
    "index is absolute": (
        sharded(lambda r, f: r["weight_map"].update({EXPERT: "/etc/passwd"})),
        "'/etc/passwd' lies outside",
    ),
    "index has backslashes": (
        sharded(lambda r, f: r["weight_map"].update({EXPERT: "..\\part0.safetensors"})),
        "lies outside",
    ),
    "index names a folder": (
        sharded(lambda r, f: ((f / "sub").mkdir(), r["weight_map"].update({EXPERT: "sub"}))),
        "sub is not a regular file but a folder",
    ),
    "a truncated shard": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
        "model.safetensors is corrupt",
    ),
    "an expert without up": (drop(EXPERT), f"{MOE}experts.{{expert}}.up_proj.weight: no expert 2 of 4"),
    "an expert missing": (
        drop(*(f"{MOE}experts.1.{name}_proj.weight" for name in ("gate", "up", "down"))),
        "no expert 1 of 4",
    ),
    "the last expert missing": (
        drop(*(f"{MOE}experts.3.{name}_proj.weight" for name in ("gate", "up", "down"))),
        "routed experts 3, and config.json says 4",
    ),
    "no down projection": (
        drop(*(f"{MOE}experts.{e}.down_proj.weight" for e in range(4))),
        "there is no down projection",
    ),
    "no gate projection": (
        drop(*(f"{MOE}experts.{e}.gate_proj.weight" for e in range(4))),
        "there is no gate projection",
    ),
    "a layer without experts": (
        drop(*(f"{MOE}experts.{e}.{name}_proj.weight" for e in range(4) for name in ("gate", "up", "down"))),
        "layer 1: no routed experts, and config.json says it has some",
    ),
    "experts where config has none": (
        config(mlp_only_layers=[0]),
        "layer 0: routed experts, and config.json says it has none",
    ),
    "fused and per expert": (fuse("nothing"), "gate is described twice"),
    "fused and one per expert": (fuse("gate_proj.weight"), "up is described twice"),
    "another shape": (
        tensors(lambda made: made.update({EXPERT: made[EXPERT][:-1].copy()})),
        f"{EXPERT}: shape [7, 16], others",
    ),
    "all of another shape": (
        tensors(
            lambda made: made.update({n: x[:-1].copy() for n, x in made.items() if ".1.mlp" in n and "up_proj" in n})
        ),
        "the shapes do not fit 4 experts and one another",
    ),
    "of two sizes": (experts_of_two_sizes, "several sizes (model.layers.0.mlp.experts.{expert}.down_proj.weight: 4 of"),
    "MLX's layout": (tensors(mlx_layout), "the experts are in MLX's layout (model.layers.0.mlp.switch_mlp."),
    "names of nobody": (
        rename_all(".experts.", ".units."),
        "no routed experts found, though config.json names 4: none of the",
    ),
    "transposed": (
        tensors(lambda made: made.update({n: x.T.copy() for n, x in made.items() if ".experts." in n})),
        "config.json says 16",
    ),
    "a vector": (
        tensors(lambda made: made.update({n: x[0].copy() for n, x in made.items() if ".experts." in n})),
        "the shapes do not fit",
    ),
    "another dtype": (cast(EXPERT, "float32"), f"{EXPERT}: F32, other experts are BF16"),
    "integers": (
        tensors(lambda made: made.update({n: x.astype("int8") for n, x in made.items() if ".experts." in n})),
        "experts in I8; jaxmoe compresses F32, BF16, F16",
    ),
    "doubles": (
        tensors(lambda made: made.update({n: x.astype("float64") for n, x in made.items() if ".experts." in n})),
        "experts in F64",
    ),
    "expert count": (config(num_experts=5), "routed experts 4, and config.json says 5"),
    "hidden size": (config(hidden_size=17), "hidden size 16, and config.json says 17"),
    "intermediate size": (config(moe_intermediate_size=9), "expert intermediate size 8, and config.json says 9"),
    "an expert of an absurd number": (
        rename_all(".experts.3.", ".experts.999999."),
        "no expert 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 999986 more of 1000000",
    ),
    "an expert of no number": (rename_all(".experts.3.", f".experts.{'9' * 5000}."), "unknown names near experts"),
    "biases alone": (
        tensors(lambda m: [m.update({n.replace("weight", "bias"): m.pop(n)}) for n in [*m] if "1.mlp.experts" in n]),
        "there is no gate projection among its tensors",
    ),
    "absurdly many layers": (config(num_hidden_layers=10**15), "is not a number of layers from 1 to 1,000"),
    "layers no number": (config(num_hidden_layers="two"), "num_hidden_layers = 'two' is not a number of layers"),
    "sparse step zero": (config(decoder_sparse_step=0), "decoder_sparse_step = 0 is not a whole number"),
    "end of text an object": (config(eos_token_id={"a": 1}), "eos_token_id = {'a': 1} is not a token's number"),
    "remote code a list": (config(auto_map=["modeling_x"]), "auto_map = ['modeling_x'] is not a JSON object"),
    "chosen experts negative": (config(num_experts_per_tok=-1), "num_experts_per_tok = -1 is not a whole number"),
    "several at once": (
        config(num_experts_per_tok=2**31, hidden_size="16", moe_intermediate_size=True),
        "hidden_size = '16' is not a whole number of 1 to 1,048,576; moe_intermediate_size = True is not",
    ),
    "unknown leaf": (add(f"{MOE}experts.0.up_proj.lora_A"), f"{MOE}experts.0.up_proj.lora_A"),
    "unknown projection": (add(f"{MOE}experts.0.side_proj.weight"), "unknown names near experts"),
    "unknown module": (add(f"{MOE}expert_adapter.weight"), f"{MOE}expert_adapter.weight"),
    "awq": (add(f"{MOE}experts.0.up_proj.qweight"), f"{MOE}experts.0.up_proj.qweight"),
    "unread quantisation": (
        lambda f: (config(quantization_config={"quant_method": "awq"})(f), add("model.layers.0.mlp.gate.qweight")(f)),
        "quantised as AWQ in a way",
    ),
    "two decoders": (rename_all("model.layers.1.", "talker.model.layers.1."), "routed experts stand under several"),
    "names of experts shifted": (rename_all(".experts.0.", ".experts.4."), "no expert 0 of 5"),
}


NOTHING_TO_FETCH = {CASES[name][1] for name in ("of two sizes", "MLX's layout", "names of nobody", "awq")}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_malformed_checkpoint(change, message, tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    assert len(Checkpoint.open(folder).layers) == 2
    change(folder)
    with pytest.raises(JaxmoeError) as caught:
        Checkpoint.open(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    if message in NOTHING_TO_FETCH:
        assert "fetch" not in str(caught.value)


@pytest.mark.parametrize("counts", [[4, 4], [4, 5], [4], 4])
def test_counts_may_be_listed_for_each_layer(counts, tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    config(num_experts=counts)(folder)
    if counts != [4, 5]:
        assert [layer.shape.experts for layer in Checkpoint.open(folder).layers] == [4, 4]
        return
    with pytest.raises(JaxmoeError, match=r"model\.layers\.1\.: routed experts 4, and config\.json says 5"):
        Checkpoint.open(folder)


def test_dense_model_says_so(tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    tensors(lambda made: [made.pop(name) for name in list(made) if ".experts." in name])(folder)
    config(num_experts=None)(folder)
    with pytest.raises(JaxmoeError, match=r"no routed experts: .*'qwen3_moe'.*Mixture-of-Experts models only"):
        Checkpoint.open(folder)


def test_all_offenders_are_listed_at_once(tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint", num_experts=4)
    first, second = f"{MOE}experts.1.up_proj.weight", "model.layers.0.mlp.experts.3.down_proj.weight"
    drop(first)(folder)
    tensors(lambda made: made.update({second: made[second][1:].copy()}))(folder)
    config(moe_intermediate_size=9)(folder)
    with pytest.raises(JaxmoeError) as caught:
        Checkpoint.open(folder)
    assert "model.layers.1.mlp.experts.{expert}.up_proj.weight: no expert 1" in str(caught.value)
    assert f"{second}: shape" in str(caught.value)


def test_sharded_checkpoints_are_read(tmp_path):
    whole = Checkpoint.open(plain_checkpoint.write(tmp_path / "whole"))
    parts = Checkpoint.open(plain_checkpoint.write(tmp_path / "parts", shards=3))
    assert parts.tensors.keys() == whole.tensors.keys()
    assert len({entry.file for entry in parts.tensors.values()}) == 3
    for ours, theirs in zip(parts.layers, whole.layers, strict=True):
        for name in theirs.shape.projections:
            np.testing.assert_array_equal(parts.projection(ours, name), whole.projection(theirs, name))


def test_projection_that_is_not_there(tmp_path):
    checkpoint = Checkpoint.open(plain_checkpoint.write(tmp_path / "checkpoint"))
    with pytest.raises(JaxmoeError, match="layer 0 has no side: its projections are gate, up, down"):
        checkpoint.projection(checkpoint.layers[0], "side")


def test_reading_changes_nothing_and_views_are_read_only(tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors[EXPERT].read()[0] = 1
    checkpoint.projection(checkpoint.layers[1], "up")[:] = 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def fingerprint(folder):
    return Checkpoint.open(folder).fingerprint()


def test_fingerprint_is_of_the_content(tmp_path):
    first = fingerprint(plain_checkpoint.write(tmp_path / "a"))
    assert fingerprint(plain_checkpoint.write(tmp_path / "b")) == first
    assert fingerprint(plain_checkpoint.write(tmp_path / "other-config", rope_theta=2)) != first
    assert fingerprint(plain_checkpoint.write(tmp_path / "sharded", shards=2)) != first
    assert fingerprint(plain_checkpoint.write(tmp_path / "retrained", seed=1)) != first
    assert fingerprint(plain_checkpoint.write(tmp_path / "wider", dtype="float32")) != first


@pytest.mark.parametrize("count", [None, "eight", 0, 3])
def test_flat_layout_needs_the_number_of_experts(count, tmp_path):
    settings = {"ffn_hidden_size": 8} | ({} if count is None else {"moe_num_experts": count})
    record = {"model_type": "dbrx", "n_layers": 1, "d_model": 16, "ffn_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(record))
    names = [f"transformer.blocks.0.ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")]
    save_file({name: np.ones((32, 16), "float32") for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(JaxmoeError, match=r"the shapes do not fit \d experts"):
        Checkpoint.open(tmp_path)
