"""What linear maps read: as PyTorch's own modules see it, whatever the layer, and in the folder as the record says."""

import json

import numpy as np
import pytest
from random_windows import random_windows
from tiny_models import load_tiny, save_tiny

from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.calibration.merging import merge
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError

torch = pytest.importorskip("torch")

OFFERED = {
    "qwen3_moe": ("attention",),
    "mixtral": ("attention",),
    "deepseek_v3": ("attention", "shared", "dense"),
    "qwen2_moe": ("attention", "shared", "dense"),
    "granitemoeshared": ("attention", "shared"),
    "hy_v3": ("attention", "shared", "dense"),
    "afmoe": ("attention", "shared", "dense"),
    "cohere2_moe": ("attention", "shared"),
}


def seen_by_torch(folder, windows, modules):
    """Return the sums of x xᵀ over the counted tokens of what some modules read, in float64."""
    model = load_tiny(folder, dtype="float32")
    read, counted = {}, torch.from_numpy(windows.counted.reshape(-1))

    def hook(name):
        def keep(module, args):
            rows = args[0].reshape(-1, args[0].shape[-1])[counted].double()
            read[name] = (rows.T @ rows).numpy()

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    with torch.no_grad():
        model(torch.from_numpy(windows.ids).long())
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("family", OFFERED)
def test_moments_are_those_of_what_the_modules_in_torch_read(family, tmp_path):
    save_tiny(family, tmp_path / "model")
    model, text = StoredModel(tmp_path / "model"), random_windows()
    assert model.linear_targets == OFFERED[family]
    found = calibrate_windows(model, [text], tmp_path / "statistics", targets=["experts", *OFFERED[family]], tokens=32)
    found.check(Checkpoint.open(tmp_path / "model"))
    maps = [own for index in range(len(model.spec.layers)) for own in model.linear_maps(index)]
    expected = seen_by_torch(tmp_path / "model", text, [own.module for own in maps])
    for own in maps:
        moment = found.inputs(own.index, own.reads)
        assert moment is not None
        assert moment.tokens == text.counted.sum()
        error = np.linalg.norm(moment.sums - expected[own.module]) / np.linalg.norm(expected[own.module])
        assert error <= 1e-5, own.module


def test_every_activation_is_kept_once(tmp_path):
    save_tiny("deepseek_v3", tmp_path / "model")
    model = StoredModel(tmp_path / "model")
    found = calibrate_windows(
        model, [random_windows()], tmp_path / "statistics", targets=["experts", "shared", "dense"]
    )
    # What the router sees is the experts' own moment already.
    kept = {0: {"block.input": 64, "feed_forward.intermediate": 56}}
    assert found.record.inputs == kept | {index: {"shared.intermediate": 48} for index in (1, 2)}
    assert found.inputs(1, "attention.input") is None
    assert np.array_equal(found.inputs(1, "block.input").sums, found.read(1, "input_moment"))


def test_folders_of_experts_alone_are_as_they_were(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    model = StoredModel(tmp_path / "model")
    for name, targets in ("experts", ["experts"]), ("both", ["experts", "attention"]):
        calibrate_windows(model, [random_windows()], tmp_path / name, targets=targets)
    experts, both = (json.loads((tmp_path / name / "statistics.json").read_text()) for name in ("experts", "both"))
    assert (experts["schema"], both["schema"]) == (1, 2)
    assert both["targets"] == ["attention"]
    assert both.keys() - experts.keys() == {"targets", "inputs"}
    first, second = Statistics.open(tmp_path / "experts").layer(0), Statistics.open(tmp_path / "both").layer(0)
    assert all(np.array_equal(array, second.arrays()[name]) for name, array in first.arrays().items())


def test_gradients_and_resumed_runs_keep_the_same_moments(tmp_path, monkeypatch):
    save_tiny("deepseek_v3", tmp_path / "model")
    model, text, targets = StoredModel(tmp_path / "model"), random_windows(), ["experts", "attention", "dense"]
    whole = calibrate_windows(model, [text], tmp_path / "whole", targets=targets)

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_windows(model, [text], tmp_path / "resumed", targets=targets, on_event=stop)
    resumed = calibrate_windows(model, [text], tmp_path / "resumed", targets=targets)
    back = calibrate_windows(model, [text], tmp_path / "back", targets=targets, gradients="sequence")
    for index, own in whole.record.inputs.items():
        for name in own:
            expected = whole.inputs(index, name).sums
            assert np.array_equal(resumed.inputs(index, name).sums, expected)
            assert np.allclose(back.inputs(index, name).sums, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_merged_moments_are_those_of_all_texts(tmp_path):
    save_tiny("deepseek_v3", tmp_path / "model")
    model = StoredModel(tmp_path / "model")
    texts = [random_windows("one"), random_windows("two", seed=1)]
    targets = ["experts", "attention", "dense"]
    for text in texts:
        calibrate_windows(model, [text], tmp_path / text.name, targets=targets)
    merged = merge([tmp_path / text.name for text in texts], tmp_path / "merged")
    both = calibrate_windows(model, texts, tmp_path / "both", targets=targets)
    for index, name in (0, "block.input"), (1, "attention.mixed"):
        one, other = merged.inputs(index, name), both.inputs(index, name)
        assert one.tokens == other.tokens
        assert np.array_equal(one.sums, other.sums)
    calibrate_windows(model, [texts[0]], tmp_path / "experts")
    with pytest.raises(JaxmoeError, match="differ in targets"):
        merge([tmp_path / "experts", tmp_path / "two"], tmp_path / "never")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["attention", "mlp"]}, "targets 'mlp': give one or more of experts, attention, shared, dense"),
        ({"targets": []}, "targets none"),
        ({"targets": ["shared", "dense"]}, "targets shared, dense: this model has experts, attention"),
        ({"targets": ["attention"], "moments": "none"}, "attention ask for second moments, and moments is none"),
    ],
)
def test_targets_that_cannot_be_are_refused(options, message, tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    with pytest.raises(JaxmoeError, match=message):
        calibrate_windows(StoredModel(tmp_path / "model"), [random_windows()], tmp_path / "statistics", **options)


def test_damaged_moments_are_named(tmp_path):
    from jaxmoe.checkpoint import Planned, read_header, write_tensors

    save_tiny("mixtral", tmp_path / "model")
    found = calibrate_windows(
        StoredModel(tmp_path / "model"), [random_windows()], tmp_path / "statistics", targets=["attention"]
    )
    path = tmp_path / "statistics" / "text" / "layer00001.safetensors"
    arrays = {name: entry.read() for name, entry in read_header(path).items()}
    arrays["attention.mixed"] = np.full_like(arrays["attention.mixed"], np.nan)
    write_tensors(path, [Planned(n, a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()])
    with pytest.raises(JaxmoeError, match=r"attention.mixed of layer 1 is not finite"):
        found.inputs(1, "attention.mixed")
    del arrays["attention.mixed"]
    write_tensors(path, [Planned(n, a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()])
    with pytest.raises(JaxmoeError, match=r"does not hold attention.mixed"):
        found.check()
