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
    Export,
    ExportOption,
    Gradients,
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
    chain_settings,
    layer_span,
    method_settings,
    names,
)
from jaxmoe.errors import JaxmoeError


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
    if method == "compressed_experts":
        from jaxmoe.cli import main_experts as fewer

        other = {"--ratio": ratio, "--allocation": allocation, "--statistics": statistics, "--weighted": weighted}
        record, tables = fewer.plan(checkpoint, main_experts, setting, set_, revision, names(ignore_config_keys), other)
        emit(record, as_json, *tables)
        return
    from jaxmoe.compression.chain import Chain, find, plan_chain
    from jaxmoe.compression.recipe import plan_compression
    from jaxmoe.report.tables import plan_tables, size, steps_table

    ratio = _ratio(ratio, main_experts)
    recipe = find(method)
    opened = _open(checkpoint, revision, ignore_config_keys)
    if isinstance(recipe, Chain):
        chosen = chain_settings(recipe, setting, set_)
        _refuse(recipe.name, {"--allocation": allocation, "--statistics": statistics}, "plan it by its sizes alone")
        summary = plan_chain(opened, recipe, chosen, ratio=ratio, of=of.value, weighted=weighted)
        forms, told = _forms(opened, recipe.steps[-1])
        emit({**summary, "exports": forms}, as_json, *plan_tables(summary), steps_table(summary), *told)
        return
    chosen = method_settings(recipe, setting, set_)
    sums = None if statistics is None else _opened_statistics(statistics, opened)
    options = {"weighted": weighted, "allocation": allocation, "statistics": sums}
    planned = plan_compression(opened, recipe, chosen, ratio=ratio, of=of.value, **options)
    summary = planned.summary()
    peak = f"predicted peak memory beyond the idle program: {size(summary['peak_bytes'], 'B')}"
    forms, told = _forms(opened, recipe)
    emit({**summary, "exports": forms}, as_json, *plan_tables(summary), peak, *told)


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
    from jaxmoe.checkpoint.output import output_folder

    output = output_folder(output, [checkpoint, statistics, *(text or [])])
    if method == "compressed_experts":
        from jaxmoe.cli import main_experts as fewer

        other = {"--ratio": ratio, "--allocation": allocation, "--statistics": statistics, "--gradients": gradients}
        other |= {
            "--sequential": sequential,
            "--layers": layers,
            f"--export {export}": export not in (None, Export.factored),
        }
        other["--of"] = of is not Scope.experts
        record, tables = fewer.compress(
            *(checkpoint, main_experts, setting, set_, revision, names(ignore_config_keys), other),
            output=output,
            text=text,
            sequences=sequences,
            length=length,
            seed=seed,
            resume=resume,
            as_json=as_json,
        )
        emit(record, as_json, *tables)
        return
    from jaxmoe.compression.chain import Chain, find
    from jaxmoe.compression.recipe import carry_out, check_form, plan_compression
    from jaxmoe.methods.method import needs_gradients
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import error_table, size_tables, steps_table

    ratio = _ratio(ratio, main_experts)
    recipe = find(method)
    span = layer_span(layers)
    form = None if export is None else export.value
    opened = _open(checkpoint, revision, ignore_config_keys)
    if isinstance(recipe, Chain):
        other = {"--statistics": statistics, "--sequential": sequential, "--layers": span}
        _refuse(recipe.name, other, "it calibrates every step on what that finds: give --text")
        if not text:
            raise JaxmoeError(f"{recipe.name}: every step is calibrated on what it finds; give --text")
        check_form(opened, recipe.steps[-1], export=form)
        report = _chain(
            opened,
            output,
            recipe,
            chain_settings(recipe, setting, set_),
            {"ratio": ratio, "of": of.value, "allocation": allocation, "seed": seed, "resume": resume},
            (text, sequences, length),
            gradients,
            form,
            as_json,
        )
        emit(report, as_json, steps_table(report), error_table(report["layers"]), *size_tables(report))
        return
    chosen = method_settings(recipe, setting, set_)
    check_form(opened, recipe, export=form, layers=span, sequential=sequential)
    if text:
        # An impossible size is refused before hours of calibration, not after.
        plan_compression(opened, recipe, chosen, ratio=ratio, of=of.value, weighted=True, allocation="uniform")
        gradients = gradients or (Gradients.sequence if needs_gradients(recipe.requires(chosen)) else None)
    with progress(len(opened.layers), as_json=as_json) as on_event:
        sums = _statistics(opened, output, statistics, text, sequences, length, gradients, sequential, span, on_event)
        budget = {"ratio": ratio, "of": of.value, "allocation": allocation}
        planned = plan_compression(opened, recipe, chosen, **budget, statistics=sums)
        report = carry_out(
            opened,
            output,
            planned,
            export=form,
            seed=seed,
            layers=span,
            resume=resume,
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            statistics=sums,
            on_event=on_event,
        )
    emit(report, as_json, error_table(report["layers"]), *size_tables(report))


def _forms(checkpoint, method) -> tuple[list[str], list[str]]:
    """Return the forms in which a result can be written, and what a user must be told of them."""
    from jaxmoe.checkpoint.families import exports
    from jaxmoe.methods import PruningMethod

    forms = ["slim"] if isinstance(method, PruningMethod) else exports(checkpoint.model_type)
    if forms != ["dense"]:
        return forms, []
    kind = checkpoint.model_type
    return forms, [f"model_type {kind!r} has no factored form: only dense can be written, with --export dense"]


def _refuse(name: str, given: dict[str, Any], instead: str) -> None:
    """Raise if an option was given that a method does not take."""
    if wrong := [option for option, value in given.items() if value not in (None, False)]:
        raise JaxmoeError(f"{', '.join(wrong)}: {name} does not take that; {instead}")


def _chain(opened, output, chain, settings, options, texts, gradients, export, as_json) -> dict[str, Any]:
    """Carry out a chain of methods on texts, `(paths, sequences, length)`."""
    from jaxmoe.checkpoint.stored_model import StoredModel
    from jaxmoe.compression.chain import compress_chain
    from jaxmoe.report.progress import progress
    from jaxmoe.texts import Tokenizer, text_windows, window_length

    paths, sequences, length = texts
    tokenizer = Tokenizer.open(opened.folder)
    length = window_length(StoredModel(opened.folder, ignore_config_keys=opened.ignored).longest, length)
    cut = text_windows(paths, tokenizer, length=length, count=sequences)
    with progress(len(opened.layers), as_json=as_json) as on_event:
        return compress_chain(
            opened,
            output,
            chain,
            settings,
            texts=cut,
            tokenizer=tokenizer.fingerprint,
            gradients=None if gradients is None else gradients.value,
            export=export,
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            on_event=on_event,
            **options,
        )


def _ratio(ratio: float | None, main_experts: int | None) -> float:
    """Return the ratio that every method but one needs."""
    if main_experts is not None:
        raise JaxmoeError("--main-experts goes with --method compressed_experts: give other methods --ratio")
    if ratio is None:
        raise typer.BadParameter("give the fraction to remove, such as 0.4", param_hint="--ratio")
    return ratio


def _opened_statistics(folder: Path, checkpoint):
    from jaxmoe.calibration.folder import Statistics

    return Statistics.open(folder).check(checkpoint)


def _statistics(opened, output, statistics, text, sequences, length, gradients, sequential, span, on_event):
    """Return the statistics that `compress` is to use, None without any; texts are calibrated on first."""
    if statistics is not None and text:
        raise JaxmoeError("both --statistics and --text: give the statistics, or the texts to gather them from")
    if gradients is not None and (not text or sequential):
        raise JaxmoeError("--gradients goes with --text, and not with --sequential: a layer is asked before its loss")
    if sequential and (not text or span is not None):
        raise JaxmoeError("--sequential goes from the first layer to the last with --text: give that, and no --layers")
    if statistics is not None:
        return _opened_statistics(statistics, opened)
    if not text:
        return None
    from jaxmoe.calibration.checkpoint import calibrate, sequential_statistics

    if sequential:
        options = {"sequences": sequences, "length": length, "ignore_config_keys": opened.ignored}
        return sequential_statistics(opened.folder, text, output, **options)
    folder = output.with_name(f"{output.name}.statistics")
    return calibrate(
        opened.folder,
        folder,
        text=text,
        sequences=sequences,
        length=length,
        gradients=None if gradients is None else gradients.value,
        ignore_config_keys=opened.ignored,
        on_event=on_event,
    ).check(opened)


def _open(source: str, revision: str | None, ignored: str | None):
    from jaxmoe.checkpoint import Checkpoint

    return Checkpoint.open(source, revision=revision, ignore_config_keys=names(ignored))
