"""The tokenizer against transformers', and against models that it does not belong to."""

import json
import shutil

import pytest

from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Tokenizer, tokenizer_fingerprint

SAMPLES = [
    "",
    " leading and trailing  ",
    "tabs\tand\n\nlines\r\n",
    "abc\u00e9 na\u00efve \u4f60\u597d \U0001f600 \u200d",
    "an <|endoftext|> inside<|endoftext|>",
    "x" * 3000,
]


@pytest.fixture
def copy(tmp_path):
    """A checkpoint without weights, to be spoiled."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint() / name, tmp_path / name)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("text", [*SAMPLES, *(path.read_text(encoding="utf-8") for path in demo_texts())])
def test_ids_are_those_of_transformers(text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(demo_checkpoint())
    assert (
        Tokenizer.open(demo_checkpoint()).encode(text).tolist()
        == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
    )


def test_truncation_and_padding_in_the_file_are_ignored(copy):
    path = copy / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    text = "many words that are more than four tokens"
    plain = Tokenizer.open(copy).encode(text)
    edit(path, truncation=truncation, padding=padding)
    assert Tokenizer.open(copy).encode(text).tolist() == plain.tolist()


def test_end_comes_from_the_config(copy):
    assert Tokenizer.open(copy).end == 0
    edit(copy / "config.json", eos_token_id=[3, 0])
    assert Tokenizer.open(copy).end == 3
    edit(copy / "config.json", eos_token_id=None)
    assert Tokenizer.open(copy).end is None


def test_fingerprint_is_that_of_the_file(copy):
    before = Tokenizer.open(copy).fingerprint
    assert before == tokenizer_fingerprint(copy)
    edit(copy / "tokenizer.json", version="1.0")
    assert Tokenizer.open(copy).fingerprint == tokenizer_fingerprint(copy) != before
    (copy / "tokenizer.json").unlink()
    assert tokenizer_fingerprint(copy) is None


def test_missing_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(JaxmoeError, match=r"has no tokenizer\.json: .*save_pretrained"):
        Tokenizer.open(copy)


def test_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(JaxmoeError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.open(copy)


def test_tokenizer_of_another_model(copy):
    edit(copy / "config.json", vocab_size=4000)
    with pytest.raises(JaxmoeError, match=r"does not match the model: .*token id 4095.*is 4000"):
        Tokenizer.open(copy)


def test_end_beyond_the_vocabulary(copy):
    edit(copy / "config.json", eos_token_id=99999)
    with pytest.raises(JaxmoeError, match="eos_token_id 99999"):
        Tokenizer.open(copy)
