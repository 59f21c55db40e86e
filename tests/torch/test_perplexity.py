"""Perplexity through PyTorch against a window-by-window loop, and on really trained checkpoints."""

import math

import pytest
import torch
import transformers

from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.torch.perplexity import perplexity

LENGTH = 96


@pytest.fixture(scope="module")
def reference():
    """Losses of every window of the first bundled text, one at a time, with transformers' own loss; and its tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_checkpoint())
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval()
    ids = tokenizer(demo_texts()[0].read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    return losses, len(ids)


def test_mean_over_all_windows_equals_the_loop(reference):
    losses, count = reference
    result = perplexity(demo_checkpoint(), demo_texts()[:1], length=LENGTH, batch=5)
    (text,) = result.texts
    assert text.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (text.tokens, text.left_out) == (len(losses) * (LENGTH - 1), count - len(losses) * LENGTH)
    assert text.left_out > 0, "the text should have a tail, or the test says nothing about it"


def test_chosen_windows_are_spread_evenly(reference):
    losses, _ = reference
    result = perplexity(demo_checkpoint(), demo_texts()[:1], length=LENGTH, windows=2)
    quarter = len(losses) // 4, 3 * len(losses) // 4
    assert result.texts[0].nats_per_token == pytest.approx(sum(losses[i] for i in quarter) / 2, rel=1e-5)


def test_bundled_checkpoint_is_trained():
    result = perplexity(demo_checkpoint(), demo_texts(), windows=4)
    assert [text.name for text in result.texts] == ["code", "literature", "reference", "speeches", "techdocs"]
    # An untrained model of this vocabulary stands at 4096; its README gives 25.60 on a larger sample of these domains.
    assert 15 < result.geometric_mean_perplexity < 50
    assert result.tokens_per_second > 0


def test_numbers_belong_together():
    result = perplexity(demo_checkpoint(), demo_texts()[:2], windows=2)
    said = result.as_json()
    assert said["geometric_mean_perplexity"] == pytest.approx(
        math.sqrt(said["texts"][0]["perplexity"] * said["texts"][1]["perplexity"])
    )
    assert said["worst"]["perplexity"] == max(text["perplexity"] for text in said["texts"])
    assert said["worst"]["name"] in {text["name"] for text in said["texts"]}


def test_all_missing_texts_are_named(tmp_path):
    with pytest.raises(JaxmoeError, match=r"one\.txt.*two\.txt"):
        perplexity(demo_checkpoint(), [tmp_path / "one.txt", tmp_path / "two.txt"])


def test_short_texts_are_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words", encoding="utf-8")
    with pytest.raises(JaxmoeError, match=r"fewer than 256 tokens.*short\.txt"):
        perplexity(demo_checkpoint(), [path])
