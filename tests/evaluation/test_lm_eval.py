"""The adapter for lm-evaluation-harness on local task files, against likelihoods and answers from PyTorch."""

import json

import numpy as np
import pytest
from two_layers import short_demo

from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError

lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxmoe.evaluation.lm_eval import JaxmoeLM  # noqa: E402

PAIRS = [
    ("The king said to the", " queen"),
    ("The king said to the ", "people of the city"),
    ("", "In the beginning"),
    ("def main():\n    return", " 0\n"),
    ("We, the people of the United States, " * 12, "in order to form"),
]


@pytest.fixture(scope="module")
def reference():
    tokenizer = transformers.AutoTokenizer.from_pretrained(short_demo())
    model = transformers.AutoModelForCausalLM.from_pretrained(short_demo(), dtype=torch.float32).eval()

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def likelihood(context, continuation):
        """Score token ids one request at a time."""
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
        logs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        own = torch.tensor(continuation)
        return float(logs[torch.arange(len(own)), own].sum()), bool((logs.argmax(-1) == own).all())

    return model, tokenizer, encode, likelihood


def instances(kind, arguments):
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def test_likelihoods(reference):
    _, tokenizer, encode, likelihood = reference
    found = JaxmoeLM(short_demo()).loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        # A space at the end of the context belongs to what follows.
        stripped = context.rstrip()
        before = encode(stripped) or [tokenizer.eos_token_id]
        whole = encode(context + continuation)
        expected = likelihood(before, whole[len(encode(stripped)) :])
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_rolling_likelihood_of_a_text_longer_than_the_context(reference):
    _, tokenizer, encode, likelihood = reference
    text = demo_texts()[1].read_text(encoding="utf-8")[:700]
    ids = encode(text)
    length = 50
    assert len(ids) > 3 * length
    assert len(ids) % length, "a last window that is not full"
    found = JaxmoeLM(short_demo(), length=length).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,), (text[:40],)])
    )
    expected, done = 0.0, 0
    while done < len(ids):
        own = ids[done : done + length]
        # Every window sees `length` tokens before its last prediction; the first begins with the end token.
        before = [tokenizer.eos_token_id] if not done else ids[max(0, done + len(own) - 1 - length) : done]
        expected += likelihood(before, own)[0]
        done += len(own)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(likelihood([tokenizer.eos_token_id], encode(text[:40]))[0], rel=1e-5)


def test_answers(reference):
    model, tokenizer, encode, _ = reference
    prompts = ["The king said to the", "def main():\n", "We, the people of the United States, in order to"]
    options = {"until": ["\n\n", "the"], "max_gen_toks": 20, "do_sample": False}
    found = JaxmoeLM(short_demo()).generate_until(instances("generate_until", [(p, options) for p in prompts]))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([encode(prompt)])
        theirs = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        text = tokenizer.decode(theirs, skip_special_tokens=True)
        assert answer == text[: min([text.index(stop) for stop in options["until"] if stop in text] or [len(text)])]


def test_local_tasks(tmp_path, reference):
    """Three kinds of tasks run through the harness itself, and its numbers are those of the likelihoods."""
    _, _, encode, likelihood = reference
    questions = [
        {"question": "The king said to the", "choices": [" queen", " zebra", " of of"], "answer": 0},
        {"question": "for i in range(", "choices": ["10):", " Lord"], "answer": 0},
        {"question": "In the beginning", "choices": [" of the", "xyzzy"], "answer": 1},
    ]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    text = demo_texts()[1].read_text(encoding="utf-8")[:300]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    metric = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "local_choice": {
            "data": "choice",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **metric}],
        },
        "local_rolling": {
            "data": "text",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
        "local_answer": {
            "data": "choice",
            "output_type": "generate_until",
            "doc_to_text": "question",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **metric}],
        },
    }
    for name, task in tasks.items():
        files = {"test": str(tmp_path / f"{task.pop('data')}.jsonl")}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    results = lm_eval.simple_evaluate(
        model=JaxmoeLM(short_demo()),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    best = [
        int(np.argmax([likelihood(encode(q["question"]), encode(choice))[0] for choice in q["choices"]]))
        for q in questions
    ]
    assert results["local_choice"]["acc,none"] == pytest.approx(
        np.mean([own == q["answer"] for own, q in zip(best, questions, strict=True)])
    )
    total = likelihood([0], encode(text))[0]
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        -total / len(text.encode()) / np.log(2), rel=1e-5
    )
    assert 0 <= results["local_answer"]["exact_match,none"] <= 1


def test_sampling_is_refused():
    asked = instances("generate_until", [("The", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(JaxmoeError, match="sampling"):
        JaxmoeLM(short_demo()).generate_until(asked)


def test_too_long_is_refused():
    model = JaxmoeLM(short_demo(), length=4)
    with pytest.raises(JaxmoeError, match="the model takes 4"):
        model.loglikelihood(instances("loglikelihood", [("a", " continuation that is longer than that")]))
