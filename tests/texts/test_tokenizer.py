"""The tokenizer against transformers', and against models that it does not belong to."""

import json
import shutil

import pytest

from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Tokenizer, check_same, text_windows, tokenizer_fingerprint

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


def without_json(copy, **files):
    """Put other files in the place of `tokenizer.json`; returns what it held."""
    content = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").unlink()
    for name, text in files.items():
        (copy / name.replace("__", ".")).write_text(text)
    return content["model"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"has no tokenizer\.json: copy it from the model's source, or .*save_pretrained"),
        (
            {"tiktoken__model": "IQ== 0"},
            r"but tiktoken\.model, .* repository's own code, .*: copy tokenizer\.json from",
        ),
        ({"qwen__tiktoken": "IQ== 0"}, r"but qwen\.tiktoken"),
        (
            {"tokenizer__model": "\n", "tokenizer_config__json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'},
            "its own",
        ),
        ({"tokenizer__model": "\n\x0e"}, r"but tokenizer\.model, the form of sentencepiece: .*save_pretrained"),
        ({"tekken__json": "{}"}, r"but tekken\.json, the form of Mistral: .*save_pretrained"),
        ({"vocab__json": "{}"}, r"has no tokenizer\.json: copy .*save_pretrained"),
    ],
)
def test_missing_tokenizer(copy, files, said):
    without_json(copy, **files)
    with pytest.raises(JaxmoeError, match=said) as caught:
        Tokenizer.open(copy)
    assert ("save_pretrained" in str(caught.value)) == ("save_pretrained" in said)


ADDED = {"0": {"content": "<|endoftext|>", "special": True}, "4096": {"content": "<think>", "lstrip": True}}


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, None),
        ({"tokenizer_class": "GPT2TokenizerFast", "bos_token": None, "add_prefix_space": True}, None),
        ({"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<a>", "<b>"]}, None),
        ({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": ADDED, "pad_token": "<|pad|>"}, None),
        ({}, "qwen3_moe"),
        (None, "qwen2_moe"),
        ({}, "dbrx"),
    ],
)
def test_vocabulary_and_merges_are_read_as_transformers_does(copy, config, model_type):
    transformers = pytest.importorskip("transformers")
    model = without_json(copy)
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    )
    (copy / "tokenizer_config.json").unlink()
    if config is not None:
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
    edit(copy / "config.json", vocab_size=5000, **({"model_type": model_type} if model_type else {}))
    ours, theirs = Tokenizer.open(copy), transformers.AutoTokenizer.from_pretrained(copy)
    for text in [*SAMPLES, "e\u0301 12345 don't <think> <a><|pad|>\n\n  x"]:
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert ours.fingerprint == tokenizer_fingerprint(copy)


def test_merges_of_a_class_that_is_not_known(copy):
    model = without_json(copy, merges__txt="")
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    with pytest.raises(JaxmoeError, match=r"gives the class TokenizersBackend: only those of GPT2Tokenizer and Qwen2"):
        Tokenizer.open(copy)


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [("[1]", "a b"), ('{"a": "b"}', ""), ('{"a": 0}', "a b"), ('{"a": -1}', ""), ("{}", "\ud7ff a")],
)
def test_damaged_vocabulary_and_merges(copy, vocabulary, merges):
    without_json(copy, tokenizer_config__json='{"tokenizer_class": "GPT2Tokenizer"}')
    (copy / "vocab.json").write_text(vocabulary)
    (copy / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(JaxmoeError, match=r"vocab\.json"):
        Tokenizer.open(copy)


def test_an_added_token_beyond_the_embeddings_counts_only_in_a_text(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][1], "id": 4096, "content": "[PAD]"})
    (copy / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.open(copy)
    plain = Tokenizer.open(demo_checkpoint())
    assert tokenizer.encode("some text").tolist() == plain.encode("some text").tolist()
    (copy / "a.txt").write_text("some [PAD] text")
    with pytest.raises(JaxmoeError, match=r"a\.txt: the text holds '\[PAD\]', token id 4096 .* 4096 only"):
        text_windows([copy / "a.txt"], tokenizer, length=2)


def test_text_that_cannot_be_encoded():
    with pytest.raises(JaxmoeError, match=r"half a surrogate pair \('\\ud800'\) at character 2"):
        Tokenizer.open(demo_checkpoint()).encode("ab\ud800")


def test_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(JaxmoeError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.open(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # The library panics at these, or aborts the process.
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on a text"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["", 0.0], ["a", -1]]}}, "fails on a text"),
        (
            {
                "model": {
                    "type": "BPE",
                    "vocab": {"a": 0, "b": 1},
                    "merges": ["a b"],
                    "continuing_subword_prefix": "bbb",
                }
            },
            "the merge 'a b' does not go on with 'bbb'",
        ),
        ({"model": {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "zz"}}, "fails on a text"),
        ({"model": 3}, "cannot be read"),
        ({"added_tokens": {}}, "cannot be read"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            "cannot",
        ),
    ],
)
def test_a_hostile_tokenizer_is_one_message(copy, changes, said):
    edit(copy / "tokenizer.json", **changes)
    with pytest.raises(JaxmoeError, match=said) as caught:
        Tokenizer.open(copy).encode("hello \u4f60 \0")
    assert str(copy / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("end", [{}, "</s>", 1.5, True, [[]], ["a"]])
def test_an_end_that_is_no_token(copy, end):
    edit(copy / "config.json", eos_token_id=end)
    with pytest.raises(JaxmoeError, match=r"config\.json: eos_token_id = .* is not a token's number"):
        Tokenizer.open(copy)


def test_tokenizers_that_differ_in_layout_only_are_the_same(copy):
    edit(copy / "tokenizer.json", padding=None)
    check_same(Tokenizer.open(copy), Tokenizer.open(demo_checkpoint()))
    edit(copy / "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(JaxmoeError, match="differ"):
        check_same(Tokenizer.open(copy), Tokenizer.open(demo_checkpoint()))


def test_tokenizer_of_another_model(copy):
    edit(copy / "config.json", vocab_size=4000)
    with pytest.raises(JaxmoeError, match=r"does not match the model: .*token id 4095.*is 4000"):
        Tokenizer.open(copy)


def test_end_beyond_the_vocabulary(copy):
    edit(copy / "config.json", eos_token_id=99999)
    with pytest.raises(JaxmoeError, match="eos_token_id 99999"):
        Tokenizer.open(copy)
