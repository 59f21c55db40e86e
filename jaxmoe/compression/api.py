"""Plan and carry out a recipe on a checkpoint that is named by its folder or hub id, with plain options."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.calibration.checkpoint import SEQUENCES
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.compression import engine
from jaxmoe.compression.recipe import find
from jaxmoe.compression.step import Found, Options, Source, Texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.report.records import PlanSummary, Report
from jaxmoe.texts import Paths, Tokenizer, paths, text_windows, window_length


def plan(
    checkpoint: str | Path,
    recipe: str,
    *,
    ratio: float | None = None,
    of: str = "experts",
    unit: str = "parameters",
    main_experts: int | None = None,
    setting: str = "improved",
    settings: Mapping[str, Any] | None = None,
    allocation: str | None = None,
    statistics: str | Path | None = None,
    weighted: bool = False,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> PlanSummary:
    """Return what a recipe will store, before anything runs.

    Args:
        checkpoint: a folder or a hub id.
        recipe: a method's name, or several with `+` between them.
        ratio: removed fraction, by all steps together.
        of: what it is a fraction of: "touched" (the replaced matrices), "experts" or "model".
        unit: what is counted: "parameters" or "bytes".
        main_experts: how many of a token's experts run, for recipes that skip some.
        setting: "paper", or "improved" with what jaxmoe adds.
        settings: of the steps, by name, or by `STEP.NAME` where there are several.
        allocation: rule by which the budget is shared over layers and targets; None for the method's own.
        statistics: folder of calibrated statistics.
        weighted: whether there will be some.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.

    Raises:
        JaxmoeError: a name or a size is wrong, or out of reach.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> found = plan(demo_checkpoint(), "svd", ratio=0.4)
        >>> round(found.achieved["experts"], 3), found.parameters.before
        (0.4, 2752384)
    """
    chosen = find(recipe, setting=setting, options=settings)
    asked = chosen.asked(ratio=ratio, of=of, unit=unit, main_experts=main_experts)
    opened = chosen.open(checkpoint, revision, ignore_config_keys=ignore_config_keys)
    options = Options(allocation=allocation, statistics=statistics is not None)
    chosen.check_plan(options)
    sums = None if statistics is None else _statistics(statistics, opened)
    return engine.plan(opened, chosen, asked, options=options, statistics=sums, weighted=weighted)


def compress(
    checkpoint: str | Path,
    output: str | Path,
    recipe: str,
    *,
    ratio: float | None = None,
    of: str = "experts",
    unit: str = "parameters",
    main_experts: int | None = None,
    setting: str = "improved",
    settings: Mapping[str, Any] | None = None,
    allocation: str | None = None,
    statistics: str | Path | None = None,
    text: Paths | None = None,
    sequences: int | None = SEQUENCES,
    length: int | None = None,
    gradients: str | None = None,
    sequential: bool = False,
    export: str | None = None,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    command: str = "",
    on_event: OnEvent = ignore,
) -> Report:
    """Carry out a recipe and write the compressed checkpoint.

    Args:
        checkpoint: a folder or a hub id; never written to.
        output: the folder to create; work in progress lies beside it.
        recipe: a method's name, or several with `+` between them.
        ratio: removed fraction, by all steps together.
        of: what it is a fraction of: "touched" (the replaced matrices), "experts" or "model".
        unit: what is counted: "parameters" or "bytes".
        main_experts: how many of a token's experts run, for recipes that skip some.
        setting: "paper", or "improved" with what jaxmoe adds.
        settings: of the steps, by name, or by `STEP.NAME` where there are several.
        allocation: rule by which the budget is shared over layers and targets; None for the method's own.
        statistics: folder of calibrated statistics.
        text: text files, folders of `*.txt`, or files of JSON lines with a `text`, to calibrate on first.
        sequences: so many windows of each text; all if None.
        length: tokens in a window; None for what `texts.window_length` says.
        gradients: keep the Fisher information of each "sequence" or each "token" too; None for what is needed.
        sequential: whether each layer is calibrated behind the compressed ones.
        export: form of the result: "factored", "dense" or "slim"; None for the recipe's own.
        seed: the random seed.
        layers: `(first, end)`: work on the decoder layers first <= index < end only.
        resume: whether to resume an unfinished run; False starts over.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.
        command: the command line, for the report.
        on_event: called with an event after every layer.

    Returns:
        The report, also written to `report.json`; its `complete` is False while layers of other runs are missing.

    Raises:
        JaxmoeError: what is asked for cannot be, a checkpoint or text cannot be used, or the output exists.

    Example:
        >>> import tempfile
        >>> from jaxmoe.data import demo_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress(demo_checkpoint(), f"{folder}/small", "svd", ratio=0.5)
        >>> report.complete, report.achieved["experts"] >= 0.5
        (True, True)
    """
    texts = paths(text)
    output = output_folder(output, [checkpoint, statistics, *texts])
    chosen = find(recipe, setting=setting, options=settings)
    asked = chosen.asked(ratio=ratio, of=of, unit=unit, main_experts=main_experts)
    opened = chosen.open(checkpoint, revision, ignore_config_keys=ignore_config_keys)
    options = Options(
        export=export,
        layers=layers,
        sequential=sequential,
        allocation=allocation,
        gradients=gradients,
        texts=bool(texts),
        statistics=statistics is not None,
    )
    chosen.check(opened, options)
    _check_calibration(options)
    return engine.compress(
        opened,
        output,
        chosen,
        asked,
        options=options,
        texts=_cut(opened, texts, sequences, length) if texts else None,
        statistics=None if statistics is None else _statistics(statistics, opened),
        seed=seed,
        resume=resume,
        command=command,
        on_event=on_event,
    )


def _check_calibration(options: Options) -> None:
    """Raise if what is asked of the calibration excludes itself."""
    if options.statistics and options.texts:
        raise JaxmoeError("both --statistics and --text: give the statistics, or the texts to gather them from")
    if options.gradients is not None and (not options.texts or options.sequential):
        raise JaxmoeError("--gradients goes with --text, and not with --sequential: a layer is asked before its loss")
    if options.sequential and (not options.texts or options.layers is not None):
        raise JaxmoeError("--sequential goes from the first layer to the last with --text: give that, and no --layers")


def _statistics(folder: str | Path, checkpoint: Source) -> Statistics:
    return Statistics.open(Path(folder)).check(Found.of(checkpoint).original)


def _cut(checkpoint: Source, given: tuple[str | Path, ...], sequences: int | None, length: int | None) -> Texts:
    """Cut texts into windows for a checkpoint."""
    tokenizer = Tokenizer.open(checkpoint.folder)
    length = window_length(Found.of(checkpoint).model().longest, length)
    windows = text_windows(given, tokenizer, length=length, count=sequences)
    return Texts(given, sequences, length, windows, tokenizer.fingerprint)
