"""Evaluation streamed in JAX against PyTorch on really trained checkpoints, original, factored and dense."""

import json
from pathlib import Path

import numpy as np
import plain_checkpoint
import pytest
from msgspec.structs import replace
from program import call
from two_layers import short_demo, two_layers

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation import evaluate
from jaxmoe.evaluation.evaluate import evaluate_windows
from jaxmoe.texts import Tokenizer, text_windows

SHARED = Path(__file__).parents[3] / "shared" / "checkpoints"
OTHERS = [SHARED / name for name in ("qwen3moe", "mixtral")]


def cut(length=96, count=2, texts=3):
    return text_windows(demo_texts()[:texts], Tokenizer.open(short_demo()), length=length, count=count)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Factored checkpoints of both kinds of factors, and a dense one."""
    folder = tmp_path_factory.mktemp("compressed")
    arguments = ("--method", "mobe", "--ratio", "0.5", "--set", "steps=2")
    for step in (
        ("compress", short_demo(), folder / "factored", *arguments),
        ("convert", folder / "factored", folder / "dense", "--to", "dense"),
        ("compress", short_demo(), folder / "svd", "--method", "svd", "--ratio", "0.5"),
    ):
        done = call(*step)
        assert done.returncode == 0, done.stderr
    return folder


def agree_with_torch(folder):
    perplexity = pytest.importorskip("jaxmoe.torch.perplexity").perplexity
    ours = evaluate(folder, text=demo_texts()[:3], length=96, sequences=2, generate=0)
    theirs = perplexity(folder, demo_texts()[:3], length=96, windows=2)
    assert [replace(text, nats_per_token=0.0) for text in ours.texts] == [
        replace(text, nats_per_token=0.0) for text in theirs.texts
    ]
    for own, other in zip(ours.texts, theirs.texts, strict=True):
        assert own.nats_per_token == pytest.approx(other.nats_per_token, rel=2e-6)
    assert ours.geometric_mean_perplexity == pytest.approx(theirs.geometric_mean_perplexity, rel=1e-5)


def test_the_original_as_in_torch():
    agree_with_torch(short_demo())


@pytest.mark.parametrize("folder", OTHERS, ids=lambda path: path.name)
def test_other_originals_as_in_torch(folder):
    if not folder.exists():
        pytest.skip(f"{folder.name} is not here")
    agree_with_torch(folder)


@pytest.mark.parametrize("name", ["factored", "svd", "dense"])
def test_compressed_as_in_torch(compressed, name):
    agree_with_torch(compressed / name)


def test_factors_run_as_they_are(compressed, monkeypatch):
    from jaxmoe.factors import CompressedLayer

    def refuse(*_):
        raise AssertionError("the experts were made dense")

    monkeypatch.setattr(CompressedLayer, "materialize", refuse)
    evaluate_windows(StoredModel(compressed / "factored"), cut())


def test_a_model_against_itself():
    model = StoredModel(short_demo())
    result = evaluate_windows(model, cut(), against=model)
    assert result.kl == pytest.approx(0, abs=1e-8)
    assert result.top1_agreement == 1
    assert result.against is not None
    for own, other in zip(result.texts, result.against.texts, strict=True):
        assert own.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-6)


def test_divergence_as_from_the_logits_of_torch(compressed):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import jaxmoe.torch  # noqa: F401

    texts = cut()
    found = evaluate_windows(StoredModel(compressed / "factored"), texts, against=StoredModel(short_demo()))
    logs = []
    for folder in (compressed / "factored", short_demo()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = [model(input_ids=torch.from_numpy(text.ids.astype("int64"))).logits[:, :-1] for text in texts]
        logs.append([torch.log_softmax(part.double(), -1).numpy() for part in logits])
    divergences = [(np.exp(p) * (p - q)).sum(-1) for q, p in zip(*logs, strict=True)]
    for text, divergence in zip((*found.texts, found), (*divergences, np.concatenate(divergences)), strict=True):
        spread = text.kl_percentiles
        expected = np.percentile(divergence, (50, 99, 99.9))
        assert (spread.median, spread.p99, spread.p999) == pytest.approx(tuple(expected), rel=1e-3)
    for text, q, p, divergence in zip(found.texts, *logs, divergences, strict=True):
        assert text.kl == pytest.approx(divergence.mean(), rel=1e-4)
        assert text.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.005)
    assert found.kl == pytest.approx(np.mean([text.kl for text in found.texts]))
    assert found.kl > 0.01, "a divergence that is nothing tests nothing"
    assert found.as_json()["kl"] == found.kl
    assert type(found).read(json.loads(json.dumps(found.as_json()))) == found


def test_batches_do_not_matter(monkeypatch):
    """Windows go through layers and head in groups; a tail of either changes nothing."""
    import jaxmoe.evaluation.windows as windows

    whole = evaluate_windows(StoredModel(short_demo()), cut(length=100, count=5))
    monkeypatch.setattr(windows, "ROWS", 333)
    parts = evaluate_windows(StoredModel(short_demo()), cut(length=100, count=5))
    for own, other in zip(parts.texts, whole.texts, strict=True):
        assert own.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-6)


def test_vocabularies_must_agree(tmp_path):
    small = StoredModel(plain_checkpoint.write(tmp_path / "small"))
    with pytest.raises(JaxmoeError, match="4096 token ids"):
        evaluate_windows(StoredModel(short_demo()), [text._replace(ids=text.ids % 32) for text in cut()], against=small)


def test_greedy_continuation_as_in_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxmoe.evaluation.generation import continuations

    model = transformers.AutoModelForCausalLM.from_pretrained(short_demo(), dtype=torch.float32).eval()
    texts = cut(length=64, count=1, texts=3)
    prompts = [text.ids[0, : 10 + 7 * n] for n, text in enumerate(texts)]
    ours = np.stack(list(continuations(StoredModel(short_demo()), prompts, 12)), axis=1)
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.from_numpy(prompt.astype("int64"))[None]
        theirs = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        np.testing.assert_array_equal(row, theirs[0, len(prompt) :].numpy())


def test_a_destroyed_model_is_flagged(tmp_path):
    """A model whose head knows three tokens only repeats itself, and the report says so."""
    from safetensors.numpy import load_file, save_file

    two_layers(tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    head = tensors["lm_head.weight"]
    head = head.copy()
    head[300:] = 0
    tensors["lm_head.weight"] = head
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    result = evaluate(tmp_path / "broken", text=demo_texts(), length=64, sequences=1, generate=24)
    generation = [text.generation for text in result.texts if text.generation is not None]
    assert len(generation) == 5
    assert sum(own.degenerate for own in generation) >= 3
    said = json.loads(json.dumps(result.as_json()))["texts"][0]["generation"]
    assert set(said) == {"prompt", "continuation", "repetition", "repetition_of_text", "period", "degenerate"}
    assert said["prompt"] in demo_texts()[0].read_text(encoding="utf-8")
