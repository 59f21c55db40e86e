"""What a training says of itself, as typed records."""

from typing import Any

from jaxmoe.report.records import Record, Stored


class Trained(Record, frozen=True, kw_only=True):
    """What was trained.

    Args:
        sets: by name.
        arrays: how many.
        parameters: in all.
    """

    sets: list[str]
    arrays: int
    parameters: int


class Rows(Record, frozen=True, kw_only=True):
    """What it was trained on.

    Args:
        rows: how many.
        length: tokens in a row.
        tokens: in all.
        learned: tokens that count in the losses.
        passes: over all rows.
    """

    rows: int
    length: int
    tokens: int
    learned: int
    passes: float


class Loss(Record, frozen=True, kw_only=True):
    """The mean of a loss over the first and the last tenth of the steps."""

    first_tenth: float
    last_tenth: float


class Note(Record, frozen=True, kw_only=True):
    """Something that a user should know of a training: in one word, and in one sentence."""

    kind: str
    detail: str


class RecoveryReport(Record, frozen=True, kw_only=True):
    """What a training did.

    Args:
        jaxmoe: the version that ran.
        source: folder of the checkpoint.
        teacher: that of the original; None without.
        output: folder of the result.
        trained: what was trained.
        training: the settings.
        data: on what.
        losses: by name, "loss" for their weighted sum.
        outcomes: what a user should know.
        stored: what the files hold.
        seed: of the order of the data.
        command: the command line; empty for a call from Python.
        seconds: that it took.
        compression: the report of the source, where that was compressed.
        ignored_config_keys: keys of the source's config that were left out of account.
        run: everything that decides the bytes of the result; None where the run is not complete.
        seal: a checksum of the report as it was written.
    """

    jaxmoe: str
    source: str
    teacher: str | None
    output: str
    trained: Trained
    training: dict[str, Any]
    data: Rows
    losses: dict[str, Loss]
    outcomes: list[Note]
    stored: Stored
    seed: int
    command: str
    seconds: float
    compression: dict[str, Any] | None = None
    ignored_config_keys: list[str] | None = None
    run: dict[str, Any] | None = None
    seal: str | None = None
