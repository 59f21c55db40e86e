"""Experts and channels removed from every architecture: what PyTorch then has in memory is the original's, sliced."""

import json
import re

import numpy as np
import pytest
from planned import prune, prune_plan
from tiny_models import EXPERTS, FAMILIES, INTERMEDIATE, save_tiny

from jaxmoe import Checkpoint
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.pruning import ChannelSettings, Pruned, PruningMethod, PruningSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ONE_SIZE_FOR_ALL = {
    "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe", "hunyuan_v1_moe",
    "bailing_moe", "solar_open", "exaone_moe", "hy_v3", "afmoe", "cohere2_moe",
}  # fmt: skip
"""Whose config has one size for routed and shared experts, or for experts and dense layers."""
RUN_HERE = [
    "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "minimax_m2", "gpt_oss", "granitemoe",
    "granitemoeshared", "mimo_v2_flash",
]  # fmt: skip
"""Whose channels can be removed."""


def chosen(seed, groups, of, keep):
    """Return random ascending indices, as many of every group."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(of // groups)[: keep // groups] + group * (of // groups) for group in range(groups)]
    return np.sort(np.concatenate(parts))


def drop_experts(evidence, keep, settings, *, groups):
    seed = int(abs(evidence.weight("down")).sum() * 1000) % 1000
    return Pruned(chosen(seed, groups, EXPERTS, keep))


CHANNELS = np.stack([chosen(seed, 1, INTERMEDIATE, 16) for seed in range(EXPERTS)])


def drop_channels(evidence, keep, settings, *, groups):
    return Pruned(CHANNELS)


NOTHING = lambda settings: {}  # noqa: E731
RANDOM_EXPERTS = PruningMethod("random", "", PruningSettings, "experts", drop_experts, NOTHING)
RANDOM_CHANNELS = PruningMethod("random", "", ChannelSettings, "channels", drop_channels, NOTHING)


TWO_GROUPS = {"n_group": 2, "topk_group": 1}
CHANGES = {
    "deepseek_v2": TWO_GROUPS,
    "deepseek_v3": TWO_GROUPS,
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1},
}
"""Of four groups of two experts none could lose any."""


def slimmed(family, folder, method, ratio):
    save_tiny(family, folder / "original", **CHANGES.get(family, {}))
    checkpoint = Checkpoint.open(folder / "original")
    plan = prune_plan(checkpoint, method, method.settings(), ratio=ratio)
    report = prune(checkpoint, folder / "small", plan, statistics=None)
    stored = read_tensors(folder / "small").values()
    assert sum(entry.numbers for entry in stored) == report["parameters"]["after"] == plan.sizes.after.model.numbers
    assert sum(entry.bytes for entry in stored) == report["bytes"]["after"]
    return report


def in_memory(folder):
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not told["missing_keys"], told["missing_keys"]
    assert not told["mismatched_keys"], told["mismatched_keys"]
    return model.eval()


def check_runs(model):
    with torch.no_grad():
        logits = model(input_ids=torch.arange(24)[None] * 5 % 120 + 3, use_cache=False).logits
    assert torch.isfinite(logits).all()


def layer_of(name):
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    return None if found is None else int(found[1])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("jetmoe", "kimi_k2")])
def test_experts(family, tmp_path):
    """All but one that is refused, and Kimi-K2, which transformers does not know by that name."""
    report = slimmed(family, tmp_path, RANDOM_EXPERTS, 0.4)
    (kept,) = report["kept"].values()
    assert kept == 4
    assert report["achieved"]["experts"] == 0.5
    by_layer = {layer["layer"]: layer["kept"] for layer in report["layers"]}
    small, original = in_memory(tmp_path / "small"), in_memory(tmp_path / "original").state_dict()
    sliced = 0
    for name, tensor in small.state_dict().items():
        expected = original[name]
        if tensor.shape != expected.shape:
            (axis,) = (axis for axis, size in enumerate(tensor.shape) if size != expected.shape[axis])
            # The architectures that lay all experts' rows one below the other have the experts' sizes as a factor.
            rows = expected.shape[axis] // EXPERTS
            index = [rows * expert + row for expert in by_layer[layer_of(name)] for row in range(rows)]
            expected = expected.index_select(axis, torch.tensor(index))
            sliced += 1
        assert torch.equal(tensor, expected), name
    # At least the router and two stacks of experts, in every layer.
    assert sliced >= 3 * len(by_layer)
    check_runs(small)


@pytest.mark.parametrize("family", RUN_HERE)
def test_channels(family, tmp_path):
    report = slimmed(family, tmp_path, RANDOM_CHANNELS, 0.3)
    assert report["kept"] == {"channels": 16}
    assert report["achieved"]["experts"] == pytest.approx(1 / 3)
    small, original = in_memory(tmp_path / "small"), in_memory(tmp_path / "original").state_dict()
    index = torch.from_numpy(CHANNELS)
    sliced = 0
    for name, tensor in small.state_dict().items():
        expected = original[name]
        if tensor.shape != expected.shape:
            (axis,) = (axis for axis, size in enumerate(tensor.shape) if size != expected.shape[axis])
            parts = tensor.shape[axis] // 16
            if family == "gpt_oss" and parts == 2:
                channels = torch.stack([2 * index, 2 * index + 1], -1).reshape(EXPERTS, -1)
            else:
                channels = torch.cat([index + part * INTERMEDIATE for part in range(parts)], 1)
            expected = torch.stack([own.index_select(axis - 1, at) for own, at in zip(expected, channels)])
            sliced += 1
        assert torch.equal(tensor, expected), name
    assert sliced >= 2 * len(report["layers"])
    check_runs(small)


@pytest.mark.parametrize("family", sorted(ONE_SIZE_FOR_ALL & {*FAMILIES}))
def test_channels_that_the_config_cannot_tell_are_refused(family, tmp_path):
    with pytest.raises(JaxmoeError, match=f"{'deepseek_v3|' if family == 'kimi_k2' else ''}{family}.*remove experts"):
        slimmed(family, tmp_path, RANDOM_CHANNELS, 0.3)
    assert not (tmp_path / "small").exists()


def test_architectures_that_jaxmoe_does_not_run_keep_their_channels(tmp_path):
    with pytest.raises(JaxmoeError, match="what else has its size"):
        slimmed("jamba", tmp_path, RANDOM_CHANNELS, 0.3)


def test_another_mixture_of_as_many_experts_is_refused(tmp_path):
    with pytest.raises(JaxmoeError, match=r"self_attention\.experts.*has as many experts"):
        slimmed("jetmoe", tmp_path, RANDOM_EXPERTS, 0.4)


def test_groups_keep_equal_numbers(tmp_path):
    report = slimmed("deepseek_v3", tmp_path, RANDOM_EXPERTS, 0.4)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    groups = config.get("n_group", 1)
    assert groups > 1
    for layer in report["layers"]:
        counts = np.bincount(np.array(layer["kept"]) // (EXPERTS // groups), minlength=groups)
        assert set(counts) == {len(layer["kept"]) // groups}
