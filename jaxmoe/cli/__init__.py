"""The command line: thin commands over the library, one JSON object on standard output where asked.

Exit codes: 0, 1 with a message that one can act on, 2 for wrong usage.
"""

import functools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import jaxmoe
from jaxmoe.cli.arguments import (
    AllocationOption,
    CalibrationOption,
    CheckpointArgument,
    Compute,
    Export,
    ExportOption,
    Form,
    Gradients,
    GradientsOption,
    JsonOption,
    LengthOption,
    MainExpertsOption,
    MethodOption,
    Moments,
    OfOption,
    OutputArgument,
    RatioOption,
    RevisionOption,
    Schedule,
    Scope,
    SetOption,
    Setting,
    SettingOption,
    Settings,
    StatisticsOption,
    TextOption,
    chain_settings,
    fractions,
    import_module,
    layer_span,
    loss_weights,
    mesh_sizes,
    method_settings,
    named_contenders,
    numbers,
)
from jaxmoe.errors import JaxmoeError

# XLA's decompositions on CPU call OpenBLAS for one small matrix after another: its threads cost up to thirty times what
# they gain, most on a busy machine. It reads this when numpy or JAX loads it, so this stands before both.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

app = typer.Typer(
    help="Compress the experts of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True, highlight=False)


def _version(value: bool) -> None:
    if value:
        print(f"jaxmoe {jaxmoe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="module or Python file that registers further methods; may be repeated"
        ),
    ] = None,
) -> None:
    """Compress the experts of Mixture-of-Experts language models."""
    for name in modules or []:
        try:
            import_module(name)
        except JaxmoeError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


def command(function):
    """Register a command whose known errors end in one message and exit code 1."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (JaxmoeError, PermissionError) as error:
            if kwargs.get("as_json"):
                print(json.dumps({"error": str(error)}))
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            resumes = "; the same command goes on where it stopped" if {"resume", "report"} & kwargs.keys() else ""
            print(f"stopped{resumes}", file=sys.stderr)
            raise typer.Exit(130) from None

    return app.command(name=function.__name__.rstrip("_"))(guarded)


def _emit(record: dict[str, Any], as_json: bool, *tables) -> None:
    if as_json:
        print(json.dumps(record))
        return
    for entry in tables:
        out.print(entry)
        out.print()


def _open(source: str, revision: str | None = None):
    from jaxmoe.checkpoint import Checkpoint

    return Checkpoint.open(source, revision=revision)


@command
def inspect(checkpoint: CheckpointArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show architecture, layers, experts, parameters, dtypes, and what is supported."""
    from jaxmoe.checkpoint.inspection import inspect as look
    from jaxmoe.report.tables import inspection_tables

    record = look(checkpoint, revision=revision)
    _emit(record, as_json, *inspection_tables(record))


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
    as_json: JsonOption = False,
) -> None:
    """Print sizes, ranks and memory of a compression before anything runs."""
    if method == "compressed_experts":
        from jaxmoe.cli import main_experts as fewer

        other = {"--ratio": ratio, "--allocation": allocation, "--statistics": statistics, "--weighted": weighted}
        record, tables = fewer.plan(checkpoint, main_experts, setting, set_, revision, other)
        _emit(record, as_json, *tables)
        return
    from jaxmoe.chain import Chain, find, plan_chain
    from jaxmoe.compression import plan_compression
    from jaxmoe.report.tables import plan_tables, size, steps_table

    ratio = _ratio(ratio, main_experts)
    recipe = find(method)
    opened = _open(checkpoint, revision)
    if isinstance(recipe, Chain):
        chosen = chain_settings(recipe, setting, set_)
        _refuse(recipe.name, {"--allocation": allocation, "--statistics": statistics}, "plan it by its sizes alone")
        summary = plan_chain(opened, recipe, chosen, ratio=ratio, of=of.value, weighted=weighted)
        _emit(summary, as_json, *plan_tables(summary), steps_table(summary))
        return
    chosen = method_settings(recipe, setting, set_)
    sums = None if statistics is None else _opened_statistics(statistics, opened)
    options = {"weighted": weighted, "allocation": allocation, "statistics": sums}
    planned = plan_compression(opened, recipe, chosen, ratio=ratio, of=of.value, **options)
    summary = planned.summary()
    peak = f"predicted peak memory beyond the idle program: {size(summary['peak_bytes'], 'B')}"
    _emit(summary, as_json, *plan_tables(summary), peak)


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
    seed: Annotated[int, typer.Option("--seed", help="of everything random")] = 0,
    layers: Annotated[str | None, typer.Option("--layers", metavar="A:B", help="work on layers A to B-1 only")] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with an unfinished run")] = True,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller checkpoint that PyTorch loads."""
    if method == "compressed_experts":
        from jaxmoe.cli import main_experts as fewer

        other = {"--ratio": ratio, "--allocation": allocation, "--statistics": statistics, "--gradients": gradients}
        other |= {"--sequential": sequential, "--layers": layers, "--export dense": export is Export.dense}
        other["--of"] = of is not Scope.experts
        record, tables = fewer.compress(
            *(checkpoint, main_experts, setting, set_, revision, other),
            output=output,
            text=text,
            sequences=sequences,
            length=length,
            seed=seed,
            resume=resume,
            as_json=as_json,
        )
        _emit(record, as_json, *tables)
        return
    from jaxmoe.chain import Chain, find
    from jaxmoe.compression import carry_out, plan_compression
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import error_table, size_tables, steps_table

    ratio = _ratio(ratio, main_experts)
    recipe = find(method)
    span = layer_span(layers)
    opened = _open(checkpoint, revision)
    if isinstance(recipe, Chain):
        other = {"--statistics": statistics, "--sequential": sequential, "--layers": span}
        _refuse(recipe.name, other, "it calibrates every step on what that finds: give --text")
        if not text:
            raise JaxmoeError(f"{recipe.name}: every step is calibrated on what it finds; give --text")
        report = _chain(
            opened,
            output,
            recipe,
            chain_settings(recipe, setting, set_),
            {"ratio": ratio, "of": of.value, "allocation": allocation, "seed": seed, "resume": resume},
            (text, sequences, length),
            gradients,
            export,
            as_json,
        )
        _emit(report, as_json, steps_table(report), error_table(report["layers"]), *size_tables(report))
        return
    chosen = method_settings(recipe, setting, set_)
    if text:
        # An impossible size is refused before hours of calibration, not after.
        plan_compression(opened, recipe, chosen, ratio=ratio, of=of.value, weighted=True, allocation="uniform")
        fisher = any(name.startswith("fisher") for name in recipe.requires(chosen))
        gradients = gradients or (Gradients.sequence if fisher else None)
    with progress(len(opened.layers), as_json=as_json) as on_event:
        sums = _statistics(opened, output, statistics, text, sequences, length, gradients, sequential, span, on_event)
        budget = {"ratio": ratio, "of": of.value, "allocation": allocation}
        planned = plan_compression(opened, recipe, chosen, **budget, statistics=sums)
        report = carry_out(
            opened,
            output,
            planned,
            export=None if export is None else export.value,
            seed=seed,
            layers=span,
            resume=resume,
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            statistics=sums,
            on_event=on_event,
        )
    _emit(report, as_json, error_table(report["layers"]), *size_tables(report))


def _refuse(name: str, given: dict[str, Any], instead: str) -> None:
    """Raise if an option was given that a method does not take."""
    if wrong := [option for option, value in given.items() if value not in (None, False)]:
        raise JaxmoeError(f"{', '.join(wrong)}: {name} does not take that; {instead}")


def _chain(opened, output, chain, settings, options, texts, gradients, export, as_json) -> dict[str, Any]:
    """Carry out a chain of methods on texts, `(paths, sequences, length)`."""
    from jaxmoe.chain import compress_chain
    from jaxmoe.checkpoint.stored_model import StoredModel
    from jaxmoe.report.progress import progress
    from jaxmoe.texts import Tokenizer, text_windows, window_length

    paths, sequences, length = texts
    tokenizer = Tokenizer.open(opened.folder)
    length = window_length(StoredModel(opened.folder).longest, length)
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
            export=None if export is None else export.value,
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
    from jaxmoe.calibration.checkpoint import calibrate_checkpoint, sequential_statistics

    if sequential:
        return sequential_statistics(opened.folder, text, output, sequences=sequences, length=length)
    folder = output.with_name(f"{output.name}.statistics")
    return calibrate_checkpoint(
        opened.folder,
        text,
        folder,
        sequences=sequences,
        length=length,
        gradients=None if gradients is None else gradients.value,
        on_event=on_event,
    ).check(opened)


@command
def calibrate(
    checkpoint: CheckpointArgument,
    statistics: Annotated[Path, typer.Argument(metavar="STATISTICS", help="the folder to create")],
    text: TextOption,
    sequences: CalibrationOption = 128,
    length: LengthOption = None,
    gradients: GradientsOption = None,
    moments: Annotated[Moments, typer.Option("--moments", help="which second moments to keep")] = Moments.weighted,
    layers: Annotated[str | None, typer.Option("--layers", metavar="A:B", help="keep layers A to B-1 only")] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with an unfinished run")] = True,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gather from texts what every expert sees and does, for methods that use it."""
    from jaxmoe.calibration.checkpoint import calibrate_checkpoint
    from jaxmoe.calibration.summary import summary
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import calibration_table

    with progress(0, as_json=as_json, doing="calibrating") as on_event:
        found = calibrate_checkpoint(
            checkpoint,
            text,
            statistics,
            sequences=sequences,
            length=length,
            gradients=None if gradients is None else gradients.value,
            moments=moments.value,
            layers=layer_span(layers),
            resume=resume,
            revision=revision,
            on_event=on_event,
        )
    record = summary(found)
    _emit(record, as_json, calibration_table(record), f"written: {statistics}")


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
    _emit(write(checkpoint, output), as_json, f"written: {output}")


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
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on texts, distance from the original, and speed."""
    from jaxmoe.evaluation import evaluate_checkpoint
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import evaluation_tables

    with progress(0, as_json=as_json, doing="layers") as on_event:
        result = evaluate_checkpoint(
            checkpoint,
            text,
            against=against,
            length=length,
            sequences=sequences,
            generate=generate,
            work=work,
            revision=revision,
            on_event=on_event,
        )
    _emit(result.as_json(), as_json, *evaluation_tables(result.as_json()))


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
            help="JSON lines of dialogues with `messages`: learn their answers",
        ),
    ] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="learn the prompts of instructions too")] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="CHECKPOINT", help="the original: learn to be like it")
    ] = None,
    train: Annotated[
        str, typer.Option("--train", metavar="SET,...", help="what is trained: router, factors, norms, theta or all")
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
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="the highest")] = 1e-3,
    schedule: Annotated[Schedule, typer.Option("--schedule", help="of the rate, after its warm-up")] = Schedule.cosine,
    warmup: Annotated[float, typer.Option("--warmup", help="fraction of the steps in which the rate rises")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="of matrices")] = 0.0,
    clip: Annotated[float, typer.Option("--clip", help="bound of the gradient's norm")] = 1.0,
    temperature: Annotated[float, typer.Option("--temperature", help="of the distributions of distillation")] = 1.0,
    dtype: Annotated[Compute, typer.Option("--dtype", help="of the computation")] = Compute.float32,
    rematerialize: Annotated[
        bool, typer.Option("--rematerialize", help="compute layers again in the backward pass, to save memory")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="of the order of the data")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", help="steps between saved states")] = 50,
    keep: Annotated[int, typer.Option("--keep", help="saved states that remain")] = 2,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="DATAxEXPERT", help="devices over rows and experts, such as 4x2"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with an unfinished run")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train a compressed checkpoint on text, towards its original or on the text alone."""
    from jaxmoe.recovery import Training
    from jaxmoe.recovery import recover as run
    from jaxmoe.report.progress import progress
    from jaxmoe.report.tables import recovery_tables

    training = Training(
        weights=loss_weights(loss or ("distillation" if teacher else "next_token")),
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
    )
    with progress(steps, as_json=as_json, doing="training", unit="steps") as on_event:
        report = run(
            checkpoint,
            output,
            text or (),
            instructions=instructions or (),
            prompts=prompts,
            teacher=teacher,
            sets=train.split(","),
            training=training,
            length=length,
            seed=seed,
            save_every=save_every,
            keep=keep,
            mesh=None if mesh is None else mesh_sizes(mesh),
            resume=resume,
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            on_event=on_event,
        )
    _emit(report, as_json, *recovery_tables(report), f"written: {output}")


@command
def compare(
    checkpoint: CheckpointArgument,
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="folder of the report; may hold an earlier one")],
    methods: Annotated[str, typer.Option("--methods", help="names of methods, such as svd,mobe; svd is always there")],
    ratios: Annotated[str, typer.Option("--ratios", help="removed fractions, such as .2,.4,.6")],
    text: TextOption,
    of: OfOption = Scope.experts,
    calibration_text: Annotated[
        list[Path] | None,
        typer.Option("--calibration-text", metavar="PATH", help="texts to calibrate on, once for all methods"),
    ] = None,
    setting: Annotated[Settings, typer.Option("--setting", help="as for `compress`, or both")] = Settings.improved,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD[:SETTING]:NAME=VALUE", help="a setting of a method; may be repeated"),
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
    as_json: JsonOption = False,
) -> None:
    """Measure methods at several sizes on one checkpoint: tables, and a report to read in a browser.

    The same command goes on where it stopped; with further methods, ratios or seeds it adds to what is in REPORT.
    """
    from jaxmoe.comparison import compare as run
    from jaxmoe.report.comparison import NOTHING, comparison_table, reasons
    from jaxmoe.report.progress import progress

    contenders = named_contenders(methods, setting, set_)
    with progress(0, as_json=as_json, doing="layers") as on_event:
        result = run(
            checkpoint,
            report,
            contenders,
            ratios=fractions(ratios),
            of=of.value,
            texts=text,
            calibration_texts=calibration_text,
            sequences=sequences,
            windows=windows,
            length=length,
            main_experts=None if main_experts is None else numbers(main_experts),
            seeds=seeds,
            keep=keep,
            revision=revision,
            on_event=on_event,
        )
    where = f"written: {report}/index.html, table.md, table.csv, comparison.json"
    if "no_page" in result:
        where = f"{result['no_page']}\nwritten: {report}/table.md, table.csv, comparison.json"
    _emit(result, as_json, comparison_table(result), *(f"{NOTHING} {reason}" for reason in reasons(result)), where)


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
    _emit(record, as_json, *tables)


def main() -> None:
    """Run the command line."""
    app()
