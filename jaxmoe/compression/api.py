"""Plan and compress from Python: by names of methods, paths or hub ids, and the options of the command line."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.calibration.checkpoint import SEQUENCES
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.compression import engine
from jaxmoe.compression.deprecated import Plan
from jaxmoe.compression.found import Found, Source
from jaxmoe.compression.recipe import find
from jaxmoe.compression.step import Options, Texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.roles import check_targets
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.report.records import PlanSummary, Report
from jaxmoe.texts import Paths, Tokenizer, paths, text_windows, window_length

GRADIENTS = ("sequence", "token")


def plan(
    checkpoint: str | Path,
    method: str,
    *,
    ratio: float | None = None,
    main_experts: int | None = None,
    of: str = "experts",
    unit: str = "parameters",
    setting: str = "improved",
    set: Mapping[str, Any] | None = None,
    targets: str | Collection[str] = "experts",
    allocation: str | None = None,
    statistics: str | Path | None = None,
    text: Paths | None = None,
    sequences: int | None = SEQUENCES,
    length: int | None = None,
    gradients: str | None = None,
    sequential: bool = False,
    weighted: bool = False,
    export: str | None = None,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> PlanSummary:
    """Return what a recipe will store, before anything runs.

    Everything that `compress` would refuse is refused here too. The arguments are those of `compress`, and:

    Args:
        checkpoint: as there.
        method: as there.
        ratio: as there.
        main_experts: as there.
        of: as there.
        unit: as there.
        setting: as there.
        set: as there.
        targets: as there.
        allocation: as there.
        statistics: as there.
        text: as there; read, and not yet calibrated on.
        sequences: as there.
        length: as there.
        gradients: as there.
        sequential: as there.
        weighted: plan as if there were statistics: equal size, other shapes of terms, more memory.
        export: as there.
        seed: as there.
        layers: as there.
        revision: as there.
        ignore_config_keys: as there.

    Returns:
        Sizes, and what every layer will store; `as_json()` is what `jaxmoe plan --json` prints.

    Raises:
        JaxmoeError: the ratio is out of reach (the message names the reachable range), or a step does not take an
            option.

    Example:
        >>> import jaxmoe
        >>> from jaxmoe.data import demo_checkpoint
        >>> jaxmoe.plan(demo_checkpoint(), "reap+svd", ratio=0.4).achieved["experts"] >= 0.4
        True
    """
    recipe = find(method, setting=setting, options=set, export=export)
    source = recipe.open(checkpoint, revision, ignore_config_keys=ignore_config_keys)
    asked = recipe.asked(ratio=ratio, of=of, unit=unit, main_experts=main_experts)
    _check(text, statistics, gradients, sequential, layers, seed)
    options = Options(
        # Whatever form can be written, where none is asked for.
        export=export or _usual(recipe.forms(source)),
        layers=layers,
        sequential=sequential,
        allocation=allocation,
        targets=check_targets(targets),
        gradients=gradients,
        # A plan of sizes needs no texts, also where the run will.
        texts=text is not None or recipe.calibration == "required",
        statistics=statistics is not None,
    )
    recipe.check_plan(source, options)
    recipe.check(source, options)
    if text is not None:
        _texts(source, text, sequences, length)
    known = None if statistics is None else _statistics(statistics, source)
    weighted = weighted or text is not None
    return engine.plan(source, recipe, asked, options=options, statistics=known, weighted=weighted)


def compress(
    checkpoint: str | Path,
    output: str | Path,
    method: str,
    *,
    ratio: float | None = None,
    main_experts: int | None = None,
    of: str = "experts",
    unit: str = "parameters",
    setting: str = "improved",
    set: Mapping[str, Any] | None = None,
    targets: str | Collection[str] = "experts",
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
    """Write a smaller checkpoint that PyTorch loads.

    Args:
        checkpoint: a folder or a hub id, never written to.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it, what the steps before the
            last write in `OUTPUT.steps`, and the statistics of `text` in `OUTPUT.statistics`.
        method: the recipe: a method's name, or several with `+` between them, such as "reap+mobe".
        ratio: removed fraction, between 0 and 1, by all steps together.
        main_experts: how many of a token's experts run, for methods that remove nothing.
        of: what the ratio is a fraction of: "touched" (the matrices that are replaced), "experts" or "model".
        unit: what is counted, "parameters" or "bytes".
        setting: "paper" (as published) or "improved".
        set: settings of the method, by name; `step.name` in a recipe of several, and `step.share` for how much of the
            removal falls to a step.
        targets: what is replaced, where the method takes that: "experts", "attention", "shared" (experts), "dense"
            (blocks without experts), or several of them.
        allocation: how the budget is shared over layers and projections: "uniform", "importance" or "spectral"; None
            for the method's own rule where the statistics allow it.
        statistics: folder of `jaxmoe.calibrate`, to weight errors by.
        text: calibrate on these texts first; as `jaxmoe.calibrate` takes them.
        sequences: windows of each text; all if None.
        length: tokens in a window; None for what `texts.window_length` says.
        gradients: keep the Fisher information of each "sequence" or "token"; None for what the recipe needs.
        sequential: calibrate each layer behind the compressed ones.
        export: "factored" (smaller files), "dense" (stock files of the old size), "slim" (smaller stock files),
            "packed" (stock files whose experts have 4 or 8 bits, for transformers and vLLM) or "packed-vllm" (for vLLM
            alone, with a width for each layer); None for the recipe's own.
        seed: the random seed.
        layers: `(first, end)`: work on the decoder layers first <= index < end only; the run that finishes the last
            layer publishes.
        resume: whether to resume an unfinished run; False starts over.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.
        command: the command line, for the report.
        on_event: called with an event after every layer.

    Returns:
        The report, also written to `report.json`.

    Raises:
        JaxmoeError: the ratio is out of reach, a step does not take an option, a file cannot be used, the output
            exists, or the disk is full.

    Example:
        >>> import tempfile, jaxmoe
        >>> from jaxmoe.data import demo_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = jaxmoe.compress(demo_checkpoint(), f"{folder}/small", "svd", ratio=0.4)
        >>> report.bytes.after < report.bytes.before
        True
    """
    if isinstance(method, Plan):
        how = {"seed": seed, "resume": resume, "command": command, "on_event": on_event}
        return method.compress(output, statistics, {"export": export, "layers": layers}, **how)
    output = output_folder(output, [checkpoint, statistics, *paths(text)])
    recipe = find(method, setting=setting, options=set, export=export)
    source = recipe.open(checkpoint, revision, ignore_config_keys=ignore_config_keys)
    asked = recipe.asked(ratio=ratio, of=of, unit=unit, main_experts=main_experts)
    _check(text, statistics, gradients, sequential, layers, seed)
    options = Options(
        export=export,
        layers=layers,
        sequential=sequential,
        allocation=allocation,
        targets=check_targets(targets),
        gradients=gradients,
        texts=text is not None,
        statistics=statistics is not None,
    )
    recipe.check(source, options)
    return engine.compress(
        source,
        output,
        recipe,
        asked,
        options=options,
        texts=None if text is None else _texts(source, text, sequences, length),
        statistics=None if statistics is None else _statistics(statistics, source),
        seed=seed,
        resume=resume,
        command=command,
        on_event=on_event,
    )


def _usual(forms: Collection[str]) -> str:
    """Return the form that `compress` writes where none is asked for, or else one that can be written."""
    return "factored" if "factored" in forms else next(iter(forms))


def _check(
    text: Paths | None,
    statistics: str | Path | None,
    gradients: str | None,
    sequential: bool,
    layers: tuple[int, int] | None,
    seed: int,
) -> None:
    """Raise if some options do not go together, whatever the recipe."""
    if statistics is not None and text is not None:
        raise JaxmoeError("both --statistics and --text: give the statistics, or the texts to gather them from")
    if gradients is not None and (text is None or sequential):
        raise JaxmoeError("--gradients goes with --text, and not with --sequential: a layer is asked before its loss")
    if sequential and (text is None or layers is not None):
        raise JaxmoeError("--sequential goes from the first layer to the last with --text: give that, and no --layers")
    if gradients is not None and gradients not in GRADIENTS:
        raise JaxmoeError(f"gradients {gradients!r}: give {' or '.join(GRADIENTS)}")
    if not 0 <= seed < 2**32:
        raise JaxmoeError(f"seed {seed}: give a number from 0 to {2**32 - 1}")


def _texts(source: Source, text: Paths, sequences: int | None, length: int | None) -> Texts:
    """Cut texts into windows for a checkpoint."""
    given, tokenizer = paths(text), Tokenizer.open(source.folder)
    length = window_length(Found.of(source).model().longest, length)
    windows = text_windows(given, tokenizer, length=length, count=sequences)
    return Texts(given, sequences, length, windows, tokenizer.fingerprint)


def _statistics(folder: str | Path, source: Source) -> Statistics:
    """Open the statistics of a checkpoint."""
    return Statistics.open(Path(folder)).check(source)
