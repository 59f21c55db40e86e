"""Whole runs that end in packed checkpoints, as other programs load them."""

import json

import numpy as np
import pytest
from tiny_models import load_tiny, save_tiny

import jaxmoe
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.export.checking import check_written


def logits(folder):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return load_tiny(folder)(torch.arange(3, 35)[None]).logits


def weights(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mixtral", "rtn4"),
        pytest.param("qwen3_moe", "rtn8", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "rtn4", marks=pytest.mark.slow),
        pytest.param("nemotron_h", "rtn4", marks=pytest.mark.slow),
    ],
)
def test_transformers_computes_with_the_very_same_numbers(family, method, tmp_path):
    pytest.importorskip("compressed_tensors")
    save_tiny(family, tmp_path / "source", dtype="bfloat16")
    for export in ("packed", "dense"):
        own = {"zero": "none"} if export == "dense" else {}
        report = jaxmoe.compress(tmp_path / "source", tmp_path / export, method, export=export, set={"group": 0, **own})
        assert any(outcome.kind == "loads_in" for outcome in report.outcomes)
        assert report.stored.bytes == sum(entry.bytes for entry in Checkpoint.open(tmp_path / export).tensors.values())
    assert report.export == "dense"
    assert weights(tmp_path / "packed") < weights(tmp_path / "dense")
    assert (logits(tmp_path / "packed") == logits(tmp_path / "dense")).all()


@pytest.mark.slow
def test_a_slim_checkpoint_is_packed(tmp_path):
    """Fewer channels, in groups, then 4 bits: a stock architecture still."""
    pytest.importorskip("compressed_tensors")
    options = {"ratio": 0.8, "unit": "bytes", "text": demo_texts()[:1], "sequences": 4, "length": 64}
    names = {"nystrom.multiple": 32, "gptq4.group": 32}
    report = jaxmoe.compress(
        demo_checkpoint(), tmp_path / "packed", "nystrom+gptq4", export="packed", set=names, **options
    )
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["moe_intermediate_size"] == 32
    assert report.achieved["experts"] >= 0.8
    opened = Checkpoint.open(tmp_path / "packed")
    assert {layer.shape.intermediate for layer in opened.layers} == {32}
    assert np.isfinite(logits(tmp_path / "packed").float().numpy()).all()


def test_other_numbers_than_were_fitted_are_found(tmp_path):
    source = demo_checkpoint()
    jaxmoe.compress(source, tmp_path / "packed", "rtn4", export="packed", set={"search": False})
    opened = Checkpoint.open(tmp_path / "packed")
    exact = {0: {"up": "0" * 64}}
    with pytest.raises(StorageError, match="layer 0, up: the experts do not hold the numbers that were fitted"):
        check_written(tmp_path / "packed", opened, {}, exact)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "pack-quantized" in card
    assert "loads_in: vLLM" in card


@pytest.mark.parametrize(
    ("method", "export", "options", "message"),
    [
        ("rtn3", "packed", {}, "give 4 or 8 bits, such as gptq4 or gptq8.* layer 0, gate: 3 bits"),
        ("rtn4", "packed", {"set": {"zero": "integer"}}, "--set zero=none.* integer zeros"),
        ("rtn4", "packed", {"set": {"scale": "quantised"}}, "--set scale=bfloat16.* scales of quantised"),
        ("rtn4", "packed", {"set": {"group": 128}}, "--set group=64.* down 4 bits in groups of 64"),
        ("svd+rtn4", "packed", {"ratio": 0.8, "unit": "bytes"}, "factor nothing.* layer 0, gate_up: grouped"),
        ("svd", "packed", {"ratio": 0.4}, "packed are whole matrices alone"),
        ("rtn4+recover", "packed", {}, "recover trains what is stored in the factored form"),
        ("hqq4", "packed", {}, "take rtn"),
    ],
)
def test_refused_before_anything_runs(method, export, options, message):
    with pytest.raises(JaxmoeError, match=message):
        jaxmoe.plan(demo_checkpoint(), method, export=export, **options)


def test_the_plan_says_who_loads_it():
    plan = jaxmoe.plan(demo_checkpoint(), "rtn", ratio=0.6, unit="bytes", export="packed-vllm", set={"search": False})
    assert len({layer.projections["up"].terms[0]["stores"]["dense"]["bits"] for layer in plan.layers}) == 2
    vllm, others = plan.loads_in
    assert vllm.startswith("vLLM")
    assert others.startswith("not transformers")
    assert "packed" in plan.exports


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt_oss", "experts.gate_up_proj holds gate_up"), ("kimi_linear", "renames its experts")],
)
def test_architectures_that_are_not_packed(family, message, tmp_path):
    save_tiny(family, tmp_path / family)
    with pytest.raises(JaxmoeError, match=message):
        jaxmoe.plan(tmp_path / family, "rtn4", export="packed")
