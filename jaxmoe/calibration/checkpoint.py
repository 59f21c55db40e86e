"""Calibrate a checkpoint on text files: what `jaxmoe calibrate` does."""

from collections.abc import Collection
from pathlib import Path

from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import called_as
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.texts import Paths, Tokenizer, paths, text_windows, window_length

SEQUENCES = 128
"""Windows of each text by default."""


@called_as("jaxmoe.calibrate(checkpoint, statistics, text=[...])")
def calibrate(
    checkpoint: str | Path,
    statistics: str | Path,
    *,
    text: Paths,
    sequences: int | None = SEQUENCES,
    length: int | None = None,
    gradients: str | None = None,
    moments: str = "weighted",
    targets: str | Collection[str] = "experts",
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    on_event: OnEvent = ignore,
) -> Statistics:
    """Gather from texts what every expert of a checkpoint sees and does.

    Args:
        checkpoint: a folder or a hub id, original or written by jaxmoe.
        statistics: the folder to create.
        text: text files, folders of `*.txt`, or files of JSON lines with a `text`; each is a domain of its own.
        sequences: windows of each text, evenly spread over it; all if None.
        length: tokens in a window; None for what `texts.window_length` says.
        gradients: keep the Fisher information too, of each "sequence" or "token"; None for none.
        moments: which second moments to keep: "none", "pooled", "expert" or "weighted".
        targets: what beside the "experts" is to have the second moments of its inputs kept, for methods that replace it
            too: "attention", "shared", "dense".
        layers: `(first, end)`: keep the decoder layers first <= index < end only; None for all.
        resume: whether to resume an unfinished run.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.
        on_event: called with an event after every layer.

    Returns:
        The statistics, opened.

    Raises:
        JaxmoeError: the checkpoint or a text cannot be used, or the folder holds something else.

    Example:
        >>> import tempfile, jaxmoe
        >>> from jaxmoe.data import demo_checkpoint, demo_texts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"text": demo_texts()[0], "sequences": 1, "length": 32, "layers": (0, 1)}
        ...     statistics = jaxmoe.calibrate(demo_checkpoint(), f"{folder}/statistics", **options)
        >>> statistics.domains
        ('code',)
    """
    model, given = StoredModel(checkpoint, revision, ignore_config_keys=ignore_config_keys), paths(text)
    folder = output_folder(statistics, [model.folder, *given])
    tokenizer = Tokenizer.open(model.folder)
    return calibrate_windows(
        model,
        text_windows(given, tokenizer, length=window_length(model.longest, length), count=sequences),
        folder,
        tokenizer=tokenizer.fingerprint,
        gradients=gradients,
        moments=moments,
        targets=targets,
        layers=layers,
        resume=resume,
        on_event=on_event,
    )
