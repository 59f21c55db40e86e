"""Statistics through PyTorch against a plain float64 loop over tokens and experts in numpy."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers

import jaxmoe.torch
from jaxmoe.calibration.statistics import FIELDS
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.texts import Tokenizer, text_windows

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "nemotron_h"]
TINY = Path(__file__).parents[3] / "shared" / "checkpoints" / "qwen3moe-tiny"


def batch(sequences=3, length=20, seed=0):
    """Random ids and a mask with holes."""
    rng = np.random.default_rng(seed)
    counted = rng.random((sequences, length)) < 0.8
    counted[:, 0] = False
    return rng.integers(3, tiny_models.VOCABULARY, (sequences, length)), counted


def float64(tensor):
    return tensor.detach().double().numpy()


def matrices(module, family):
    """Gate, up and down as `[expert, out, in]`, and the biases of gate, up and down."""
    down = float64(module.down_proj)
    if family == "nemotron_h":
        return None, float64(module.up_proj), down, None
    both = float64(module.gate_up_proj)
    if family == "gpt_oss":
        bias = float64(module.gate_up_proj_bias)
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
        biases = bias[:, ::2], bias[:, 1::2], float64(module.down_proj_bias)
        return both[:, ::2], both[:, 1::2], down, biases
    half = both.shape[1] // 2
    return both[:, :half], both[:, half:], down, None


def one_expert(x, expert, weights, family):
    """h and f(x) of one token, by the family's formula."""
    gate, up, down, biases = weights
    u = up[expert] @ x
    if family == "nemotron_h":
        h = np.maximum(u, 0) ** 2
        return h, down[expert] @ h
    g = gate[expert] @ x
    if family == "gpt_oss":
        g, u = np.minimum(g + biases[0][expert], 7.0), np.clip(u + biases[1][expert], -7.0, 7.0)
        h = (u + 1) * g / (1 + np.exp(-1.702 * g))
        return h, down[expert] @ h + biases[2][expert]
    h = g / (1 + np.exp(-g)) * u
    return h, down[expert] @ h


def oracle(model, family, batches):
    """The sums of every experts module, token by token."""
    calls = {}
    handles = []
    modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    for name, module in modules.items():

        def keep(module, args, kwargs, name=name):
            calls.setdefault(name, []).append([*args, *kwargs.values()])

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for ids, _ in batches:
            model(torch.as_tensor(ids))
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in modules.items():
        weights = matrices(module, family)
        experts, hidden, intermediate = weights[2].shape
        shape = LayerShape(experts, hidden, intermediate, family != "nemotron_h")
        sums = {n: np.zeros(f.shape(shape)) for n, f in FIELDS.items() if f.group != "fisher"}
        for (rows, index, scores), (_, counted) in zip(calls[name], batches, strict=True):
            rows, index, scores = float64(rows).reshape(-1, hidden), index.numpy(), float64(scores)
            for token in np.flatnonzero(counted):
                x, chosen = rows[token], index.reshape(len(rows), -1)[token]
                sums["input_moment"] += np.outer(x, x)
                for slot, e in enumerate(chosen):
                    w = scores.reshape(len(rows), -1)[token, slot]
                    h, out = one_expert(x, e, weights, family)
                    sums["counts"][e] += 1
                    sums["weight_sums"][e] += w
                    sums["input_sums"][e] += x
                    sums["output_sums"][e] += out
                    sums["output_norms"][e] += np.linalg.norm(out)
                    sums["weighted_output_norms"][e] += w * np.linalg.norm(out)
                    sums["channel_energies"][e] += (w * h) ** 2
                    sums["channel_peaks"][e] = np.maximum(sums["channel_peaks"][e], (w * h) ** 2)
                    sums["input_moments"][e] += np.outer(x, x)
                    sums["intermediate_moments"][e] += np.outer(h, h)
                    sums["weighted_input_moments"][e] += w * w * np.outer(x, x)
                    sums["weighted_intermediate_moments"][e] += w * w * np.outer(h, h)
                    for other in chosen:
                        sums["coactivation"][e, other] += 1
        found[int(name.split(".")[2])] = shape, sums
    return found


def agree(found, expected, rtol=2e-5):
    for name, array in expected.items():
        values = found.arrays()[name]
        assert np.linalg.norm(values - array) <= rtol * np.linalg.norm(array), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_equals_the_loop(family):
    model = tiny_models.build(family)
    batches = [batch(seed=0), batch(2, 11, seed=1)]
    found = jaxmoe.torch.statistics(model, batches)
    expected = oracle(model, family, batches)
    assert list(found) == sorted(expected)
    for index, (shape, sums) in expected.items():
        assert found[index].shape == shape
        assert found[index].tokens == sum(int(counted.sum()) for _, counted in batches)
        assert found[index].sequences == 5
        assert np.array_equal(found[index].counts, np.diag(found[index].coactivation))
        assert np.array_equal(found[index].coactivation, sums["coactivation"])
        agree(found[index], sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_the_sum_of_squared_gradients(family):
    model = tiny_models.build(family)
    ids, counted = batch()
    found = jaxmoe.torch.statistics(model, [(ids, counted)], gradients=True, moments="none")
    modules = {int(n.split(".")[2]): m for n, m in model.named_modules() if n.endswith(".experts")}
    expected = {index: {} for index in modules}
    for row, mask in zip(torch.as_tensor(ids), torch.as_tensor(counted)):
        model.zero_grad()
        model(input_ids=row[None], labels=row.masked_fill(~mask, -100)[None]).loss.backward()
        for index, module in modules.items():
            gradients = {"fisher_down": module.down_proj.grad}
            if family == "nemotron_h":
                gradients["fisher_up"] = module.up_proj.grad
            elif family == "gpt_oss":
                gradients = {"fisher_down": module.down_proj.grad.transpose(1, 2)}
                gradients["fisher_gate"] = module.gate_up_proj.grad[:, :, 0::2].transpose(1, 2)
                gradients["fisher_up"] = module.gate_up_proj.grad[:, :, 1::2].transpose(1, 2)
            else:
                both = module.gate_up_proj.grad
                gradients["fisher_gate"], gradients["fisher_up"] = (
                    both[:, : both.shape[1] // 2],
                    both[:, both.shape[1] // 2 :],
                )
            for name, gradient in gradients.items():
                expected[index][name] = expected[index].get(name, 0) + float64(gradient) ** 2
    for index, sums in expected.items():
        agree(found[index], sums, rtol=1e-4)
        assert (found[index].fisher_gate is None) == (family == "nemotron_h")
    # The sums that need no gradients are those of a run without.
    plain = jaxmoe.torch.statistics(model, [(ids, counted)], moments="none")
    for index, record in plain.items():
        agree(found[index], record.arrays())


def test_two_halves_equal_one_run():
    model = tiny_models.build("qwen3_moe")
    ids, counted = batch(6)
    whole = jaxmoe.torch.statistics(model, [(ids, counted)], gradients=True)
    halves = [jaxmoe.torch.statistics(model, [(ids[s], counted[s])], gradients=True) for s in (slice(3), slice(3, 6))]
    for index, record in whole.items():
        merged = halves[0][index] + halves[1][index]
        assert (merged.tokens, merged.sequences) == (record.tokens, record.sequences)
        assert np.array_equal(merged.coactivation, record.coactivation)
        agree(merged, record.arrays(), rtol=1e-6)


@pytest.mark.skipif(not TINY.is_dir(), reason="the small trained checkpoint is not here")
def test_a_trained_checkpoint():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    (text,) = text_windows(demo_texts()[:1], Tokenizer.open(TINY), length=64, count=4)
    batches = [(text.ids[:2], text.counted[:2]), (text.ids[2:], text.counted[2:])]
    found = jaxmoe.torch.statistics(model, batches)
    for index, (_, sums) in oracle(model, "qwen3_moe", batches).items():
        agree(found[index], sums)
        assert found[index].tokens == 4 * 63


def test_bfloat16_is_summed_in_float32():
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.bfloat16)
    ids, counted = batch()
    found = jaxmoe.torch.statistics(model, [(ids, counted)], layers=[1])
    assert list(found) == [1]
    _, sums = oracle(model, "qwen3_moe", [(ids, counted)])[1]
    agree(found[1], sums)


def test_first_tokens_do_not_count_by_default():
    model = tiny_models.build("mixtral")
    ids, _ = batch()
    mask = np.ones(ids.shape, bool)
    mask[:, 0] = False
    plain, masked = (jaxmoe.torch.statistics(model, [b]) for b in (torch.as_tensor(ids), (ids, mask)))
    assert plain[0].tokens == mask.sum()
    agree(plain[0], masked[0].arrays(), rtol=0)


def test_padding_to_the_right_changes_nothing():
    model = tiny_models.build("qwen3_moe")
    ids, counted = batch()
    padded = np.pad(ids, ((0, 0), (0, 7)), constant_values=5), np.pad(counted, ((0, 0), (0, 7)))
    short, long = (jaxmoe.torch.statistics(model, [b], gradients=True) for b in ((ids, counted), padded))
    agree(long[1], short[1].arrays(), rtol=1e-5)


def test_model_is_left_as_it_was():
    model = tiny_models.build("gpt_oss").train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    kept = torch.ones_like(parameters[1])
    parameters[1].grad = kept
    jaxmoe.torch.statistics(model, [batch()], gradients=True)
    assert model.training
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert parameters[1].grad is kept
    assert all(parameter.grad is None for parameter in parameters[2:])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "dbrx"])
def test_other_contracts_are_refused(family):
    model = tiny_models.build(family)
    with pytest.raises(JaxmoeError, match=r"\.experts \(|no module called `experts`"):
        jaxmoe.torch.statistics(model, [batch()])


def test_factored_experts_are_refused():
    model = tiny_models.build("mixtral")
    shape = {"experts": 8, "hidden": 64, "intermediate": 24, "gated": True}
    terms = {"gate_up": [{"kind": "dense"}], "down": [{"kind": "dense"}]}
    entry = {"kind": "experts", "shape": shape, "terms": terms}
    jaxmoe.torch.swap_modules(model, {"model.layers.1.mlp.experts": entry})
    with pytest.raises(
        JaxmoeError, match=r"layers\.1\.mlp\.experts \(FactoredExperts\): it has no stacked gate_up_proj"
    ):
        jaxmoe.torch.statistics(model, [batch()])


def test_another_sum_of_the_experts_is_refused(monkeypatch):
    model = tiny_models.build("mixtral")
    module = model.model.layers[1].mlp.experts
    stock = module.forward

    def doubled(hidden_states, top_k_index, top_k_weights):
        return 2 * stock(hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(module, "forward", doubled)
    with pytest.raises(JaxmoeError, match=r"model\.layers\.1\.mlp\.experts .*does not return the weighted sum"):
        jaxmoe.torch.statistics(model, [batch()])


def test_overflow_names_the_layer():
    model = tiny_models.build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0] = torch.inf
    with pytest.raises(JaxmoeError, match=r"activations in layer 1, expert \d"):
        jaxmoe.torch.statistics(model, [batch()])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[:] = torch.nan
    with pytest.raises(JaxmoeError, match=r"layer 0, expert \d"):
        jaxmoe.torch.statistics(model, [batch()])


def test_what_does_not_fit():
    model = tiny_models.build("mixtral")
    ids, counted = batch()
    with pytest.raises(JaxmoeError, match=r"layers \[7\] have no routed experts: those that do are \[0, 1\]"):
        jaxmoe.torch.statistics(model, [ids], layers=[1, 7])
    with pytest.raises(JaxmoeError, match=r"token ids \(3, 20\) with a mask \(3, 19\)"):
        jaxmoe.torch.statistics(model, [(ids, counted[:, 1:])])
