"""`plan` and `compress`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxmoe.cli.app import command, emit
from jaxmoe.cli.arguments import (
    AllocationOption,
    CalibrationOption,
    CheckpointArgument,
    ExportOption,
    GradientsOption,
    IgnoreOption,
    JsonOption,
    LengthOption,
    MainExpertsOption,
    MethodOption,
    OfOption,
    OutputArgument,
    RatioOption,
    RevisionOption,
    Scope,
    SeedOption,
    SetOption,
    Setting,
    SettingOption,
    StatisticsOption,
    given_settings,
    layer_span,
    names,
)


@command
def plan(
    checkpoint: CheckpointArgument,
    method: MethodOption,
    ratio: RatioOption = None,
    main_experts: MainExpertsOption = None,
    of: OfOption = Scope.experts,
    setting: SettingOption = Setting.improved,
    set_: SetOption = None,
    allocation: AllocationOption = None,
    statistics: StatisticsOption = None,
    weighted: Annotated[bool, typer.Option("--weighted", help="as with --statistics or --text")] = False,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print sizes, ranks and memory of a compression before anything runs."""
    from jaxmoe.compression import api
    from jaxmoe.report.tables import plan_tables, size, steps_table

    found = api.plan(
        checkpoint,
        method,
        **_sizes(method, ratio, main_experts, of),
        setting=setting.value,
        settings=given_settings(set_),
        allocation=allocation,
        statistics=statistics,
        weighted=weighted,
        revision=revision,
        ignore_config_keys=names(ignore_config_keys),
    )
    record = found.as_json()
    told: list[Any] = [steps_table(record)] if found.steps else []
    if found.peak_bytes is not None:
        told.append(f"predicted peak memory beyond the idle program: {size(found.peak_bytes, 'B')}")
    if found.exports == ["dense"]:
        told.append("the architecture has no factored form: only dense can be written, with --export dense")
    emit(record, as_json, *plan_tables(record), *told)


@command
def compress(
    checkpoint: CheckpointArgument,
    output: OutputArgument,
    method: MethodOption,
    ratio: RatioOption = None,
    main_experts: MainExpertsOption = None,
    of: OfOption = Scope.experts,
    setting: SettingOption = Setting.improved,
    set_: SetOption = None,
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
    layers: Annotated[str | None, typer.Option("--layers", metavar="A:B", help="work on layers A to B-1 only")] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with an unfinished run")] = True,
    revision: RevisionOption = None,
    ignore_config_keys: IgnoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller checkpoint that PyTorch loads."""
    from jaxmoe.compression import api
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import report_tables

    sizes = _sizes(method, ratio, main_experts, of)
    # How many layers there are is told by the first event.
    with progress(0, as_json=as_json) as on_event:
        report = api.compress(
            checkpoint,
            output,
            method,
            **sizes,
            setting=setting.value,
            settings=given_settings(set_),
            allocation=allocation,
            statistics=statistics,
            text=text,
            sequences=sequences,
            length=length,
            gradients=None if gradients is None else gradients.value,
            sequential=sequential,
            export=None if export is None else export.value,
            seed=seed,
            layers=layer_span(layers),
            resume=resume,
            revision=revision,
            ignore_config_keys=names(ignore_config_keys),
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            on_event=on_event,
        )
    emit(report.as_json(), as_json, *report_tables(report.as_json()))


def _sizes(method: str, ratio: float | None, main_experts: int | None, of: Scope) -> dict[str, Any]:
    """Return the sizes as the library takes them."""
    from jaxmoe.compression.recipe import find

    if ratio is None and main_experts is None and "ratio" in find(method).sizes:
        raise typer.BadParameter("give the fraction to remove, such as 0.4", param_hint="--ratio")
    return {"ratio": ratio, "of": of.value, "main_experts": main_experts}
