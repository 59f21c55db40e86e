"""`calibrate`, `evaluate` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

import jaxmoe
from jaxmoe.cli.app import command, emit, out
from jaxmoe.cli.arguments import (
    CalibrationOption,
    CheckpointArgument,
    GradientsOption,
    IgnoreOption,
    JsonOption,
    LengthOption,
    Moments,
    OfOption,
    RevisionOption,
    Scope,
    Settings,
    TargetsOption,
    TextOption,
    Unit,
    UnitOption,
    fractions,
    names,
    numbers,
    settings,
)


@command
def calibrate(
    checkpoint: CheckpointArgument,
    statistics: Annotated[Path, typer.Argument(metavar="STATISTICS", help="the folder to create")],
    text: TextOption,
    sequences: CalibrationOption = 128,
    length: LengthOption = None,
    gradients: GradientsOption = None,
    moments: Annotated[Moments, typer.Option("--moments", help="which second moments to keep")] = Moments.weighted,
    targets: TargetsOption = "experts",
    layers: Annotated[str | None, typer.Option("--layers", metavar="A:B", help="keep layers A to B-1 only")] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="resume an unfinished run")] = True,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gather from texts what every expert sees and does, for methods that use it."""
    from jaxmoe.calibration.summary import summary
    from jaxmoe.compression.recipe_file import layer_span
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import calibration_table

    with progress(0, as_json=as_json, doing="calibrating") as on_event:
        found = jaxmoe.calibrate(
            checkpoint,
            statistics,
            text=text,
            sequences=sequences,
            length=length,
            gradients=None if gradients is None else gradients.value,
            moments=moments.value,
            targets=names(targets),
            layers=None if layers is None else layer_span(layers),
            resume=resume,
            revision=revision,
            ignore_config_keys=names(ignore_config_keys),
            on_event=on_event,
        )
    ignored = names(ignore_config_keys)
    record = {**summary(found), **({"ignored_config_keys": list(ignored)} if ignored else {})}
    emit(record, as_json, calibration_table(record), f"written: {statistics}")


@command
def evaluate(
    checkpoint: CheckpointArgument,
    text: TextOption,
    against: Annotated[
        str | None, typer.Option("--against", metavar="CHECKPOINT", help="the original: KL divergence, agreement")
    ] = None,
    length: LengthOption = None,
    sequences: Annotated[int | None, typer.Option("--sequences", help="windows of each text; by default all")] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            "--generate", help="tokens by which to continue each text; by default 32 for models up to 2 GB, else 0"
        ),
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="FOLDER", help="where hidden states lie, for want of space in /tmp")
    ] = None,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on texts, distance from the original, and speed."""
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import evaluation_tables

    with progress(0, as_json=as_json, doing="layers") as on_event:
        result = jaxmoe.evaluate(
            checkpoint,
            text=text,
            against=against,
            length=length,
            sequences=sequences,
            generate=generate,
            work=work,
            revision=revision,
            ignore_config_keys=names(ignore_config_keys),
            on_event=on_event,
        )
    emit(result, as_json, *evaluation_tables(result))


@command
def compare(
    checkpoint: CheckpointArgument,
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="folder of the report; may hold an earlier one")],
    methods: Annotated[
        str,
        typer.Option(
            "--methods", help="methods, such as svd,reap+mobe, or recipe files; baselines join them", metavar="NAME,..."
        ),
    ],
    ratios: Annotated[str, typer.Option("--ratios", help="removed fractions, such as .2,.4,.6")],
    text: TextOption,
    of: OfOption = Scope.experts,
    unit: UnitOption = Unit.bytes,
    targets: TargetsOption = "experts",
    calibration_text: Annotated[
        list[Path] | None,
        typer.Option("--calibration-text", metavar="PATH", help="texts to calibrate on, once for all methods"),
    ] = None,
    setting: Annotated[Settings, typer.Option("--setting", help="as for `compress`, or both")] = Settings.improved,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD[:SETTING]:NAME=VALUE", help="a setting of a method; may be repeated"),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            "--baselines",
            metavar="NAME,...",
            help="some of svd,frequency,reap,rtn,gptq, or none; by default all that can be carried out",
        ),
    ] = None,
    main_experts: Annotated[
        str | None,
        typer.Option(
            "--main-experts", help="with compressed_experts: how many experts of a token run, such as 2,1; default half"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="runs of every method and ratio, for mean and deviation")] = 1,
    sequences: Annotated[int, typer.Option("--sequences", help="windows of each text to calibrate on")] = 128,
    windows: Annotated[
        int | None, typer.Option("--windows", help="windows of each text to evaluate on; by default all")
    ] = None,
    length: LengthOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the compressed checkpoints in REPORT/checkpoints")] = False,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure methods at several sizes on one checkpoint: tables, and a report to read in a browser.

    The same command resumes where it stopped; with further methods, ratios or seeds it adds to what is in REPORT.
    """
    from jaxmoe.report.comparison import NOTHING, comparison_table, reasons
    from jaxmoe.report.progress import progress

    with progress(0, as_json=as_json, doing="layers") as on_event:
        result = jaxmoe.compare(
            checkpoint,
            report,
            methods,
            ratios=fractions(ratios),
            of=of.value,
            unit=unit.value,
            targets=names(targets),
            text=text,
            calibration_text=calibration_text,
            setting=setting.value,
            set=settings(set_),
            baselines=baselines,
            sequences=sequences,
            windows=windows,
            length=length,
            main_experts=None if main_experts is None else numbers(main_experts),
            seeds=seeds,
            keep=keep,
            revision=revision,
            ignore_config_keys=names(ignore_config_keys),
            on_event=on_event,
        )
    where = f"written: {report}/index.html, table.md, table.csv, comparison.json"
    if result.no_page is not None:
        where = f"{result.no_page}\nwritten: {report}/table.md, table.csv, comparison.json"
    missing = (f"{NOTHING} {reason}" for reason in reasons(result))
    emit(result, as_json, comparison_table(result, out.width), *missing, where)
