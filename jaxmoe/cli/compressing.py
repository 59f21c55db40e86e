"""`plan` and `compress`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import jaxmoe
from jaxmoe.cli.app import command, emit
from jaxmoe.cli.arguments import (
    AllocationOption,
    CalibrationOption,
    CheckpointArgument,
    ExportOption,
    GradientsOption,
    IgnoreOption,
    JsonOption,
    LayersOption,
    LengthOption,
    MainExpertsOption,
    MethodOption,
    OfOption,
    OutputArgument,
    RatioOption,
    RecipeOption,
    ResumeOption,
    RevisionOption,
    Scope,
    SeedOption,
    SetOption,
    Setting,
    SettingOption,
    StatisticsOption,
    TargetsOption,
    Unit,
    UnitOption,
    chosen,
)


@command
def plan(
    ctx: typer.Context,
    checkpoint: CheckpointArgument,
    method: MethodOption = None,
    ratio: RatioOption = None,
    main_experts: MainExpertsOption = None,
    of: OfOption = Scope.experts,
    unit: UnitOption = Unit.parameters,
    setting: SettingOption = Setting.improved,
    set_: SetOption = None,
    targets: TargetsOption = "experts",
    allocation: AllocationOption = None,
    statistics: StatisticsOption = None,
    weighted: Annotated[bool, typer.Option("--weighted", help="as with --statistics or --text")] = False,
    recipe: RecipeOption = None,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print sizes, ranks and memory of a compression before anything runs."""
    from jaxmoe.report.tables import plan_tables

    summary = jaxmoe.plan(checkpoint, **_recipe(ctx, recipe))
    emit(summary, as_json, *plan_tables(summary))


@command
def compress(
    ctx: typer.Context,
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    method: MethodOption = None,
    ratio: RatioOption = None,
    main_experts: MainExpertsOption = None,
    of: OfOption = Scope.experts,
    unit: UnitOption = Unit.parameters,
    setting: SettingOption = Setting.improved,
    set_: SetOption = None,
    targets: TargetsOption = "experts",
    allocation: AllocationOption = None,
    statistics: StatisticsOption = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="PATH", help="calibrate on these texts first, into OUTPUT.statistics"),
    ] = None,
    sequences: CalibrationOption = 128,
    length: LengthOption = None,
    gradients: GradientsOption = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="with --text: calibrate each layer behind the compressed ones")
    ] = False,
    export: ExportOption = None,
    seed: SeedOption = 0,
    layers: LayersOption = None,
    recipe: RecipeOption = None,
    resume: ResumeOption = True,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller checkpoint that PyTorch loads."""
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import report_tables

    options = _recipe(ctx, recipe)
    with progress(0, as_json=as_json) as on_event:
        command = shlex.join(["jaxmoe", *sys.argv[1:]])
        report = jaxmoe.compress(checkpoint, output, **options, command=command, on_event=on_event)
    emit(report, as_json, *report_tables(report))


def _recipe(ctx: typer.Context, recipe: Path | None) -> dict[str, Any]:
    """Return the options of the command line and the recipe file, which may not leave out the method and its ratio."""
    from jaxmoe.compression.recipe import find

    options = chosen(ctx, recipe)
    if "method" not in options:
        raise typer.BadParameter("give a method such as svd, or --recipe FILE", param_hint="--method")
    asked = find(options["method"], setting=options.get("setting", "improved"), options=options.get("set")).sizes
    if "ratio" in asked and not {"ratio", "main_experts"} & options.keys():
        raise typer.BadParameter("give the fraction to remove, such as 0.4", param_hint="--ratio")
    return options
