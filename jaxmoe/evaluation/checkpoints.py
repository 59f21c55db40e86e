"""Evaluate a checkpoint on text files: what `jaxmoe evaluate` does."""

import os
from collections.abc import Collection
from pathlib import Path

from msgspec.structs import replace

from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError, StorageError, called_as
from jaxmoe.evaluation.evaluate import evaluate_windows
from jaxmoe.evaluation.generation import IN_MEMORY
from jaxmoe.evaluation.probe import probe
from jaxmoe.report.evaluation_records import Evaluation
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.texts import Paths, Tokenizer, check_same, paths, text_windows, window_length

GENERATED = 32


@called_as("jaxmoe.evaluate(checkpoint, text=[...])")
def evaluate(
    checkpoint: str | Path,
    *,
    text: Paths,
    against: str | Path | None = None,
    length: int | None = None,
    sequences: int | None = None,
    generate: int | None = None,
    work: Path | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure a checkpoint's perplexity on texts, and how far it is from its original.

    Args:
        checkpoint: a folder or a hub id, original or written by jaxmoe.
        text: text files, folders of `*.txt`, or files of JSON lines with a `text`.
        against: the original to compare with, a folder or a hub id: KL divergence and agreement on the top token.
        length: tokens in a window; None for what `texts.window_length` says.
        sequences: so many windows of each text, evenly spread over it; all if None.
        generate: tokens by which to continue each text; None for 32 where the checkpoint is at most 2 GB, else 0.
        work: folder on whose disk the hidden states lie; that for temporary files if None.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of both configs to leave out of account, where jaxmoe does not know what they mean.
        on_event: called with an event after every layer.

    Returns:
        The loss on every text, and what follows from it; `as_json()` is what `jaxmoe evaluate --json` prints.

    Raises:
        JaxmoeError: a checkpoint or a text cannot be used, the tokenizers differ, or the model is broken.

    Example:
        >>> import jaxmoe
        >>> from jaxmoe.data import demo_checkpoint, demo_texts
        >>> options = {"text": demo_texts()[:2], "sequences": 1, "length": 64, "generate": 0}
        >>> [text.name for text in jaxmoe.evaluate(demo_checkpoint(), **options).texts]
        ['code', 'literature']
    """
    given = paths(text)
    model = StoredModel(checkpoint, revision, ignore_config_keys=ignore_config_keys)
    tokenizer = Tokenizer.open(checkpoint, revision)
    original = None if against is None else StoredModel(against, ignore_config_keys=ignore_config_keys)
    if original is not None:
        check_same(tokenizer, Tokenizer.open(original.folder))
    if work is not None and not os.path.isdir(work):
        try:
            work = output_folder(work, [model.folder, against, *given], beside=())
        except StorageError as error:
            raise StorageError(f"the working folder: {error}") from None
    length = window_length(model.longest, length)
    if original is not None:
        window_length(original.longest, length)
    new = _generated(model) if generate is None else generate
    if not 0 <= new < 2**31:
        raise JaxmoeError(f"{new} tokens to generate: give a number of tokens, or 0 for none")
    cut = text_windows(given, tokenizer, length=length, count=sequences)
    result = evaluate_windows(model, cut, against=original, work=work, on_event=on_event)
    if not new:
        return result
    result = _with_generation(result, probe(model, cut, tokenizer, new))
    if original is None or result.against is None:
        return result
    return replace(result, against=_with_generation(result.against, probe(original, cut, tokenizer, new)))


def _generated(model: StoredModel) -> int:
    return GENERATED if model.checkpoint.bytes <= IN_MEMORY else 0


def _with_generation(result: Evaluation, generation) -> Evaluation:
    texts = (replace(text, generation=own) for text, own in zip(result.texts, generation, strict=True))
    return replace(result, texts=tuple(texts))
