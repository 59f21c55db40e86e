"""Windows of tokens against a plain loop."""

import json

import numpy as np
import pytest

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Tokenizer, Tokens, text_windows, windows
from jaxmoe.texts.tokenizer_files import read_backend


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(demo_checkpoint())


def tokens(count, starts=(0,)):
    return Tokens(np.arange(count, dtype=np.int32), np.isin(np.arange(count), starts))


@pytest.mark.parametrize("total", [8, 50, 55])
@pytest.mark.parametrize("length", [2, 5, 8])
def test_all_windows(total, length):
    cut = windows(tokens(total), length)
    expected = [list(range(start, start + length)) for start in range(0, total - length + 1, length)]
    assert cut.ids.tolist() == expected
    assert cut.left_out == total - length * len(expected)
    assert cut.counted.sum() == len(expected) * (length - 1)


@pytest.mark.parametrize(("count", "chosen"), [(1, [5]), (2, [2, 7]), (3, [1, 5, 8]), (10, range(10)), (99, range(10))])
def test_chosen_windows_are_spread(count, chosen):
    assert (windows(tokens(103), 10, count).ids[:, 0] // 10).tolist() == list(chosen)


def test_first_tokens_do_not_count():
    cut = windows(tokens(12, starts=(0, 5, 8)), 4)
    assert (~cut.counted).nonzero()[0].tolist() == [0, 1, 1, 2]
    assert cut.ids[~cut.counted].tolist() == [0, 4, 5, 8]


def test_documents_are_joined_by_the_end_token(tmp_path, tokenizer):
    documents = ["first document.", "", "another one", "a third"]
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    parts = [tokenizer.encode(document).tolist() for document in documents if document]
    joined = [*parts[0], 0, *parts[1], 0, *parts[2]]
    (cut,) = text_windows([path], tokenizer, length=len(joined))
    assert cut.ids.tolist() == [joined]
    starts = [0, len(parts[0]) + 1, len(parts[0]) + len(parts[1]) + 2]
    assert np.flatnonzero(~cut.counted[0]).tolist() == starts


def test_without_an_end_token_documents_touch(tmp_path, tokenizer):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}')
    parts = [tokenizer.encode(document).tolist() for document in ("one", "two")]
    endless = Tokenizer(read_backend(demo_checkpoint(), "qwen3_moe"), vocabulary=tokenizer.vocabulary)
    (cut,) = text_windows([path], endless, length=2)
    assert cut.ids.ravel().tolist() == (parts[0] + parts[1])[: cut.ids.size]


def test_all_short_texts_are_listed(tmp_path, tokenizer):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("a few words")
    with pytest.raises(JaxmoeError, match=r"fewer than 256 tokens in .*one\.txt \(\d+\).*two\.txt"):
        text_windows([tmp_path], tokenizer, length=256)


@pytest.mark.parametrize(("length", "count", "said"), [(1, None, "length of at least 2"), (4, 0, "at least 1")])
def test_wrong_sizes(length, count, said):
    with pytest.raises(JaxmoeError, match=said):
        windows(tokens(20), length, count)
