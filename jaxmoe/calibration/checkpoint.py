"""Calibrate a checkpoint on text files: what `jaxmoe calibrate` does."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.calibration.collect import calibrate
from jaxmoe.calibration.folder import Statistics
from jaxmoe.calibration.sequential import Sequential
from jaxmoe.checkpoint.output import PARTIAL, output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import JOURNAL
from jaxmoe.texts import Tokenizer, text_windows, window_length

SEQUENCES = 128
"""Windows of each text by default."""


def calibrate_checkpoint(
    source: str | Path,
    texts: Sequence[str | Path],
    folder: str | Path,
    *,
    sequences: int | None = SEQUENCES,
    length: int | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    **options: Any,
) -> Statistics:
    """Gather a checkpoint's statistics on text files.

    Args:
        source: a folder or a hub id.
        texts: as `jaxmoe.texts.read_texts` takes them.
        folder: the statistics folder to create.
        sequences: so many windows of each text, evenly spread over it; all if None.
        length: tokens in a window; None for what `texts.window_length` says.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.
        options: further ones of `calibrate`.

    Raises:
        JaxmoeError: the checkpoint or a text cannot be used, or the folder holds something else.
    """
    model = StoredModel(source, revision, ignore_config_keys=ignore_config_keys)
    folder = output_folder(folder, [model.folder, *texts])
    tokenizer = Tokenizer.open(model.folder)
    cut = text_windows(texts, tokenizer, length=window_length(model.longest, length), count=sequences)
    return calibrate(model, cut, folder, tokenizer=tokenizer.fingerprint, **options)


def sequential_statistics(
    source: str | Path,
    texts: Sequence[str | Path],
    output: Path,
    *,
    sequences: int | None = SEQUENCES,
    length: int | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Sequential:
    """Return statistics that follow the compression of a checkpoint into a folder; the arguments are as above."""
    model = StoredModel(source, ignore_config_keys=ignore_config_keys)
    tokenizer = Tokenizer.open(model.folder)
    cut = text_windows(texts, tokenizer, length=window_length(model.longest, length), count=sequences)
    # In the journal of the unfinished output, which goes when that is published.
    output = output_folder(output, [model.folder, *texts])
    folder = output.with_name(output.name + PARTIAL) / JOURNAL / "states"
    return Sequential(model, cut, folder, tokenizer=tokenizer.fingerprint)
