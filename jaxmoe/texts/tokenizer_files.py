"""The files of a checkpoint's tokenizer, made into one that the tokenizers library runs.

`tokenizer.json` is complete. `vocab.json` with `merges.txt`, the older form, lacks how text is split before merging:
that lies in the class, of which those of GPT-2 and Qwen are known here. Any other form is named, with what can be done.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jaxmoe.checkpoint.records import read_bytes, read_record
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.tokenizer_config import TOKENIZER_CONFIG, read_tokenizer_config

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe")
_CLASSES = {"dbrx": "GPT2Tokenizer", **dict.fromkeys(_QWEN, "Qwen2Tokenizer")}
"""The classes of model types whose `tokenizer_config.json` names none."""


class Backend(NamedTuple):
    """A tokenizer of the tokenizers library.

    Args:
        tokenizer: runs.
        path: the file to name in messages.
        fingerprint: SHA-256 of the files.
    """

    tokenizer: Any
    path: Path
    fingerprint: str


@contextmanager
def guarded(what: str, mend: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into one message."""
    try:
        yield
    except BaseException as error:
        # The library raises Exception itself, and its panics are not even that.
        known = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, JaxmoeError) or not known:
            raise
        raise JaxmoeError(f"{what} ({str(error)[:300]}): {mend}") from None


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Return the SHA-256 of a checkpoint's tokenizer, None if it has none that can be read."""
    there = {name for name in (TOKENIZER, VOCABULARY, MERGES, TOKENIZER_CONFIG) if os.path.lexists(folder / name)}
    if TOKENIZER in there:
        names = [TOKENIZER]
    elif {VOCABULARY, MERGES} <= there:
        # The class in the config decides too.
        names = sorted(there)
    else:
        return None
    return sha256(b"".join(read_bytes(folder / name) for name in names)).hexdigest()


def read_backend(folder: Path, model_type: str) -> Backend:
    """Read the tokenizer of a checkpoint.

    Raises:
        JaxmoeError: the files are missing, damaged, or of a kind that cannot be read.
    """
    # Imported here: jaxmoe is to be imported in no time.
    import tokenizers

    fingerprint = tokenizer_fingerprint(folder)
    if fingerprint is None:
        raise JaxmoeError(_other_form(folder))
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        return Backend(_from_merges(folder, model_type), folder / VOCABULARY, fingerprint)
    content = read_bytes(path)
    _check_prefix(path, content)
    with guarded(f"{path} cannot be read", "fetch it again"):
        return Backend(tokenizers.Tokenizer.from_buffer(content), path, fingerprint)


class _Pieces(msgspec.Struct):
    continuing_subword_prefix: str | None = None
    merges: list[str | tuple[str, str]] = []


class _Model(msgspec.Struct):
    model: _Pieces


def _check_prefix(path: Path, content: bytes) -> None:
    """Refuse merges whose right part lacks the prefix that it needs: the library cuts it off unseen, and aborts."""
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content):
        return
    model = read_record(path, _Model, "fetch it again").model
    prefix = model.continuing_subword_prefix or ""
    for merge in model.merges:
        right = merge.rpartition(" ")[2] if isinstance(merge, str) else merge[1]
        if not right.startswith(prefix):
            raise JaxmoeError(f"{path}: the merge {merge!r} does not go on with {prefix!r}: fetch it again")


def _from_merges(folder: Path, model_type: str) -> Any:
    """Build the tokenizer that transformers builds from `vocab.json` and `merges.txt`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    config, path = read_tokenizer_config(folder), folder / VOCABULARY
    kind = config.kind or _CLASSES.get(model_type)
    if kind not in _CLASSES.values():
        given = f"gives the class {kind}" if kind else "gives no class"
        raise JaxmoeError(
            f"{folder} has {VOCABULARY} and {MERGES}, and {TOKENIZER_CONFIG} {given}: only those of"
            f" {' and '.join(sorted(set(_CLASSES.values())))} say how text is split; copy {TOKENIZER} from the model's"
            " source"
        )
    vocabulary = read_record(path, dict[str, int], "fetch it again")
    try:
        lines = read_bytes(folder / MERGES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise JaxmoeError(f"{folder / MERGES} is not UTF-8 at byte {error.start}: fetch it again") from None
    merges = []
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.rstrip("\r").partition(" ")
            merges.append((left, right))
    prefix = bool(config.add_prefix_space)
    with guarded(f"{path} and {MERGES} cannot be read", "fetch them again"):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        if kind == "Qwen2Tokenizer":
            tokenizer.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
            level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        for token in config.added_tokens(kind):
            given = {name: value for name, value in msgspec.structs.asdict(token).items() if value is not None}
            tokenizer.add_tokens([AddedToken(**given)])
    return tokenizer


def _other_form(folder: Path) -> str:
    """Say what stands in place of a tokenizer that can be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    copied = f"copy {TOKENIZER} from the model's source, or from a repository that converted and checked it"
    ranks = [name for name in names if name.endswith((".tiktoken", "tiktoken.model"))]
    own = read_tokenizer_config(folder).auto_map
    if ranks or own:
        what = f"{ranks[0]}, the ranks of tiktoken; how text is split before" if ranks else "a class of its own; it"
        return (
            f"{folder} has no {TOKENIZER} but {what} stands in the repository's own code, which is not run, and which"
            f" transformers does not convert faithfully: {copied}"
        )
    written = "write it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    for name, what in (
        ("tokenizer.model", "sentencepiece"),
        ("tekken.json", "Mistral"),
        ("spiece.model", "sentencepiece"),
    ):
        if name in names:
            return f"{folder} has no {TOKENIZER} but {name}, the form of {what}: {written}"
    return f"{folder} has no {TOKENIZER}: copy it from the model's source, or {written}"
