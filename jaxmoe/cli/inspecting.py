"""`inspect`, `convert` and `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from jaxmoe.cli.app import command, emit
from jaxmoe.cli.arguments import (
    CheckpointArgument,
    Form,
    JsonOption,
    OutputArgument,
    RevisionOption,
)


@command
def inspect(checkpoint: CheckpointArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show architecture, layers, experts, parameters, dtypes, and what is supported."""
    from jaxmoe.checkpoint.inspection import inspect as look
    from jaxmoe.report.tables import inspection_tables

    record = look(checkpoint, revision=revision)
    emit(record, as_json, *inspection_tables(record))


@command
def convert(
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="dense: the original architecture with materialised experts; orbax: Orbax checkpoints, bit for bit;"
            " safetensors: back from Orbax",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another form."""
    from jaxmoe.export.dense import densify
    from jaxmoe.export.orbax import to_orbax, to_safetensors

    write = {Form.dense: densify, Form.orbax: to_orbax, Form.safetensors: to_safetensors}[to]
    record = write(checkpoint, output)
    emit(record, as_json, f"written: {output}", *(f"note: {note}" for note in record.get("notes", ())))


@command
def demo(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="folder for the results")] = Path("jaxmoe-demo"),
    as_json: JsonOption = False,
) -> None:
    """Compress the bundled checkpoint with SVD and MoBE at two ratios and compare them."""
    from jaxmoe.demo import run
    from jaxmoe.report.progress import progress

    with progress(0, as_json=as_json) as on_event:
        record, *tables = run(output, on_event)
    emit(record, as_json, *tables)
