"""The records of an evaluation."""

import math

from jaxmoe.evaluation import Evaluation, TextEvaluation


def _text(name, nats):
    return TextEvaluation(name=name, tokens=100, left_out=0, nats_per_token=nats)


def test_geometric_mean_counts_every_text_alike():
    short = TextEvaluation(name="short", tokens=10, left_out=0, nats_per_token=math.log(2))
    long = TextEvaluation(name="long", tokens=10_000, left_out=0, nats_per_token=math.log(8))
    result = Evaluation(texts=(short, long), length=11, tokens_per_second=1.0)
    assert math.isclose(result.geometric_mean_perplexity, 4.0)
    assert result.worst is long


def test_a_destroyed_model_is_infinitely_bad_not_an_error():
    result = Evaluation(texts=(_text("bad", 1e4), _text("good", 1.0)), length=11, tokens_per_second=1.0)
    assert result.as_json()["worst"] == {"name": "bad", "perplexity": math.inf}
