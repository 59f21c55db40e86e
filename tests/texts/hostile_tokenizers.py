"""Open damaged tokenizers and print what became of them: `python hostile_tokenizers.py FOLDER SEED COUNT`.

A program of its own, since what damages the tokenizers library enough ends the process.
"""

import copy
import json
import random
import sys
from collections import Counter
from pathlib import Path

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Tokenizer

VALUES = [None, -1, 0, 1, 2**31, 2**32 - 1, 2**64, 1e308, "", "a" * 1000, "\0", [], {}, [1], {"a": 1}, True, "(", "\\"]
VALUES += [{"Regex": "("}, {"Regex": "(a*)*b"}, {"Regex": ""}, {"String": ""}, "Isolated", "<|endoftext|>"]
PARTS = {
    "normalizer": [
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQ=="},
        {"type": "Prepend", "prepend": ""},
        {"type": "StripAccents"},
    ],
    "pre_tokenizer": [
        {"type": "FixedLength", "length": 0},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": True},
        {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "first", "split": True},
        {"type": "UnicodeScripts"},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
    ],
    "model": [
        {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]], "byte_fallback": False},
        {"type": "Unigram", "unk_id": None, "vocab": [["", 0.0], ["a", -1]], "byte_fallback": True},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "z", "continuing_subword_prefix": "##"},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2**32 - 1}, "merges": ["a b"], "byte_fallback": True},
        {"type": "BPE", "vocab": {"\u00e9": 0, "b": 1}, "merges": ["\u00e9 b"], "continuing_subword_prefix": "\u00e9"},
    ],
}
FLAGS = {"single_word": True, "lstrip": True, "rstrip": True, "normalized": True, "special": True}
ADDED = [{"id": number, "content": text, **FLAGS} for number, text in ((5, ""), (2**32 - 1, "zz"), (9, "\0"))]
TEXTS = ["", "hello <|endoftext|> zz \0 \u00e9\u4f60\U0001f600 ab", "a" * 200, " \n\t x", "e\u0301 \u0130"]


def small() -> dict:
    """Return the demo's tokenizer with few tokens."""
    content = json.loads((demo_checkpoint() / "tokenizer.json").read_bytes())
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if number < 300}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    kept = [merge for merge in merges if {*merge.split(), merge.replace(" ", "")} <= vocabulary.keys()]
    content["model"] |= {"vocab": vocabulary, "merges": kept}
    return content


def places(value, path=()):
    """Yield the paths to everything in a JSON value, to a few of many."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children)[:40]:
        yield (*path, key)
        yield from places(child, (*path, key))


def damage(content: dict, draw: random.Random) -> None:
    """Change one thing."""
    kind = draw.choice([*PARTS, "added", "value", "value", "value"])
    if kind in PARTS:
        content[kind] = copy.deepcopy(draw.choice(PARTS[kind]))
    elif kind == "added" and isinstance(content.get("added_tokens"), list):
        content["added_tokens"].append(copy.deepcopy(draw.choice(ADDED)))
    elif found := list(places(content)):
        *path, last = draw.choice(found)
        for key in path:
            content = content[key]
        content[last] = draw.choice(VALUES)


def main(folder: Path, seed: int, count: int) -> None:
    draw, base, outcomes = random.Random(seed), small(), Counter()
    (folder / "config.json").write_bytes((demo_checkpoint() / "config.json").read_bytes())
    for _ in range(count):
        content = copy.deepcopy(base)
        for _ in range(draw.randint(1, 3)):
            damage(content, draw)
        raw = bytearray(json.dumps(content).encode())
        if draw.random() < 0.1:
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        (folder / "tokenizer.json").write_bytes(raw)
        try:
            tokenizer = Tokenizer.open(folder)
            for text in TEXTS:
                tokenizer.decode(tokenizer.encode(text))
                tokenizer.document(text, [(0, 3)])
            outcomes["used"] += 1
        except JaxmoeError as error:
            outcomes["refused" if str(folder) in str(error) else "refused without a name"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
