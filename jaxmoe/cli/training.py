"""`recover`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import jaxmoe
from jaxmoe.cli.app import command, emit
from jaxmoe.cli.arguments import (
    CheckpointArgument,
    Compute,
    IgnoreOption,
    JsonOption,
    LengthOption,
    OutputArgument,
    Schedule,
    SeedOption,
    mesh_sizes,
    names,
)


@command
def recover(
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="PATH", help="text file, folder of *.txt or JSON lines with a `text`"),
    ] = None,
    instructions: Annotated[
        list[Path] | None,
        typer.Option(
            "--instructions",
            metavar="PATH",
            help="JSON lines of dialogues with `messages`, and `tools` where they have some: learn their answers",
        ),
    ] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="learn the prompts of instructions too")] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="CHECKPOINT", help="the original: learn to be like it")
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            "--train", metavar="SET,...", help="what is trained: router, factors, scales, norms, expert_vectors or all"
        ),
    ] = "router,norms,factors",
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME[=WEIGHT],...",
            help="next_token, distillation, outputs, balance; by default distillation with a teacher, else next_token",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="updates")] = 200,
    rows: Annotated[int, typer.Option("--rows", help="rows of text for an update")] = 16,
    accumulate: Annotated[int, typer.Option("--accumulate", help="parts into which these are cut, to save memory")] = 1,
    length: LengthOption = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="peak learning rate")] = 1e-3,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="of the learning rate, after its warm-up")
    ] = Schedule.cosine,
    warmup: Annotated[float, typer.Option("--warmup", help="fraction of the steps in which the rate rises")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="of matrices")] = 0.0,
    clip: Annotated[float, typer.Option("--clip", help="bound of the gradient's norm")] = 1.0,
    temperature: Annotated[float, typer.Option("--temperature", help="of the distributions of distillation")] = 1.0,
    dtype: Annotated[Compute, typer.Option("--dtype", help="of the computation")] = Compute.float32,
    rematerialize: Annotated[
        bool, typer.Option("--rematerialize", help="compute layers again in the backward pass, to save memory")
    ] = False,
    seed: SeedOption = 0,
    save_every: Annotated[int, typer.Option("--save-every", help="steps between saved states")] = 50,
    keep: Annotated[int, typer.Option("--keep", help="saved states that remain")] = 2,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="DATAxEXPERT", help="devices over rows and experts, such as 4x2"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="resume an unfinished run")] = True,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a compressed checkpoint on text, towards its original or on the text alone."""
    from jaxmoe.recovery.losses import loss_weights
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import recovery_tables

    with progress(steps, as_json=as_json, doing="training", unit="steps") as on_event:
        report = jaxmoe.recover(
            checkpoint,
            output,
            text=text,
            instructions=instructions,
            prompts=prompts,
            teacher=teacher,
            train=train.split(","),
            loss=loss_weights(loss) if loss else None,
            steps=steps,
            rows=rows,
            accumulate=accumulate,
            learning_rate=learning_rate,
            schedule=schedule.value,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            temperature=temperature,
            dtype=dtype.value,
            rematerialize=rematerialize,
            length=length,
            seed=seed,
            save_every=save_every,
            keep=keep,
            mesh=None if mesh is None else mesh_sizes(mesh),
            resume=resume,
            ignore_config_keys=names(ignore_config_keys),
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            on_event=on_event,
        )
    emit(report, as_json, *recovery_tables(report), f"written: {output}")
