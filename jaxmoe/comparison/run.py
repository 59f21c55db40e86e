"""Compare recipes on one checkpoint: one calibration, one evaluation of the original, then cell after cell.

A cell is compressed, evaluated against the original and removed before the next one begins, so that the disk holds one
compressed checkpoint at a time. Sizes that a recipe cannot reach, and models that broke, are results with their reason.
Everything that a cell depends on stands in its key, see `folder`.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from msgspec.structs import replace

import jaxmoe
from jaxmoe.calibration.checkpoint import SEQUENCES
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.comparison.cells import Calibration, Cell, cells, make
from jaxmoe.comparison.contenders import able, calibrated, check_all, contenders, wants_gradients, with_baselines
from jaxmoe.comparison.costs import bits_per_weight, forget_peak, loaded_bytes, token_costs
from jaxmoe.comparison.diagnostics import routing, spectra
from jaxmoe.comparison.folder import ComparisonFolder
from jaxmoe.comparison.summary import Original, rows
from jaxmoe.compression.fewer_experts import blocks
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.run import environment
from jaxmoe.compression.step import EXPERTS, Texts
from jaxmoe.errors import JaxmoeError, StorageError, called_as
from jaxmoe.evaluation.evaluate import evaluate_windows
from jaxmoe.evaluation.windows import Walked, walk
from jaxmoe.report.comparison import comparison_csv, comparison_markdown
from jaxmoe.report.comparison_records import CellMeasured, CellResult, Comparison, Spectrum, Text
from jaxmoe.report.events import CellDone, OnEvent, ignore, without_complete
from jaxmoe.report.page import page
from jaxmoe.report.records import Layer, Record
from jaxmoe.texts import Paths, Tokenizer, Windows, paths, text_windows, window_length

RECORDS = 2
"""The form of the records in a comparison's folder: those of earlier forms are measured again."""


@called_as("jaxmoe.compare(checkpoint, report, methods, ratios=[...], text=[...])")
def compare(
    checkpoint: str | Path,
    report: str | Path,
    methods: Sequence[str | Recipe] | str,
    *,
    ratios: Sequence[float],
    text: Paths,
    of: str = "experts",
    unit: str = "bytes",
    targets: Sequence[str] = EXPERTS,
    calibration_text: Paths | None = None,
    setting: str = "improved",
    set: Mapping[str, Any] | None = None,
    baselines: Sequence[str] | str | None = None,
    sequences: int | None = SEQUENCES,
    windows: int | None = None,
    length: int | None = None,
    main_experts: Sequence[int] | None = None,
    seeds: int = 1,
    keep: bool = False,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    on_event: OnEvent = ignore,
) -> Comparison:
    """Measure methods and recipes at several sizes on one checkpoint: tables, and a report to read in a browser.

    The same call resumes where it stopped; with further methods, ratios or seeds it adds to what is in the folder.

    Args:
        checkpoint: a folder or a hub id.
        report: folder of the comparison; what it holds from earlier runs is used again.
        methods: names of methods, recipes or recipe files, as a list or with commas between them.
        ratios: removed fractions.
        text: to evaluate on, as `jaxmoe.evaluate` takes it.
        of: what the ratios are fractions of: "touched" (the matrices that are replaced), "experts" or "model".
        unit: what is counted: "bytes", or "parameters", of which methods that hold numbers in few bits know nothing.
        targets: what is replaced, as `jaxmoe.compress` takes it.
        calibration_text: to calibrate on, once for all; None for no calibration.
        setting: "paper", "improved" or "both".
        set: settings by `METHOD:NAME`, or by `METHOD:SETTING:NAME` for one of both settings.
        baselines: cheap methods that join them, some of "svd" (truncated SVD of every expert), "frequency" and "reap"
            (pruning), "rtn" and "gptq" (rounding to nearest and GPTQ), as a list or with commas between; "none" for
            none, None for all that can be carried out.
        sequences: so many calibration windows of each text; all if None.
        windows: so many windows of each text to evaluate on; all if None.
        length: tokens in a window; None for what `texts.window_length` says.
        main_experts: how many experts of a token run, for methods that remove nothing; None for half of them.
        seeds: cells of each recipe and size, with the seeds 0, 1, ...
        keep: whether compressed checkpoints stay, in `REPORT/checkpoints`.
        revision: branch, tag or commit of a hub id.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.
        on_event: called with an event after every step.

    Returns:
        What was measured, which `comparison.json` holds, too; its `no_page` says why there is no HTML report.

    Raises:
        JaxmoeError: what was asked for cannot be: a method, a text, a ratio, the checkpoint or the folder.
    """
    recipes = contenders(methods, setting=setting, set=set)
    texts, learned = paths(text), paths(calibration_text)
    targets = tuple(dict.fromkeys(targets)) or EXPERTS
    opened = Checkpoint.open(str(checkpoint), revision=revision, ignore_config_keys=ignore_config_keys)
    report = output_folder(report, [opened.folder, *texts, *learned], beside=(), into=True)
    check_all(opened, recipes, targets)
    model = StoredModel(opened.folder, ignore_config_keys=opened.ignored)
    tokenizer = Tokenizer.open(opened.folder)
    if main_experts is None:
        main_experts = [max(1, max(block.router.top_k for _, block in blocks(model.spec)) // 2)]

    def sized(recipes: Sequence[Recipe]) -> list[Cell]:
        counted = {"of": of, "unit": unit, "targets": targets}
        return cells(recipes, ratios, **counted, main_experts=main_experts, seeds=seeds)

    for cell in sized(recipes):
        cell.recipe.asked(**cell.size)
    given = calibration_text is not None
    asked = sized(with_baselines(recipes, lambda own: able(own, opened, sized([own]), texts=given), baselines))
    length = window_length(model.longest, length)
    cut = text_windows(texts, tokenizer, length=length, count=windows)
    calibration = None
    if calibration_text is not None:
        windows_of_it = text_windows(learned, tokenizer, length=length, count=sequences)
        calibration = Texts(learned, sequences, length, windows_of_it, tokenizer.fingerprint)
    folder = ComparisonFolder(report)
    with folder.opened(opened.fingerprint()):
        run = _Run(folder, opened, model, cut, str(checkpoint), targets, revision, keep, on_event)
        if calibration is not None:
            run.calibrate(calibration, [cell.recipe for cell in asked])
        for position, cell in enumerate(asked):
            record = run.cell(cell)
            write_tables(folder.path, run.result())
            on_event(CellDone(name=cell.name, done=position + 1, total=len(asked), **_said(record)))
        result = run.result()
        write_tables(folder.path, result)
        try:
            content = page(result).encode()
        except JaxmoeError as error:
            result = replace(result, no_page=str(error))
        else:
            write_bytes(folder.path / "index.html", content)
        return result


def write_tables(folder: Path, result: Comparison) -> None:
    """Write what was measured so far as JSON, Markdown and CSV."""
    contents = {
        "comparison.json": json.dumps(result.as_json(), indent=1),
        "table.md": comparison_markdown(result),
        "table.csv": comparison_csv(result),
    }
    for name, content in contents.items():
        write_bytes(folder / name, content.encode())


def _said(record: CellResult) -> dict[str, Any]:
    if record.measured is None:
        return {"reason": record.reason}
    found = record.measured.evaluation
    spread = found.kl_percentiles
    tails = {} if spread is None else {"kl_p99": spread.p99, "kl_p999": spread.p999}
    perplexity = found.geometric_mean_perplexity
    return {"perplexity": perplexity, "kl": found.kl, **tails, "seconds": record.measured.seconds}


class _Run:
    """One run of a comparison: what its cells share."""

    def __init__(
        self,
        folder: ComparisonFolder,
        checkpoint: Checkpoint,
        model: StoredModel,
        texts: Sequence[Windows],
        source: str,
        targets: tuple[str, ...],
        revision: str | None,
        keep: bool,
        on_event: OnEvent,
    ):
        self.folder, self.checkpoint, self.model, self.texts = folder, checkpoint, model, texts
        self.source, self.targets, self.revision, self.keep = source, targets, revision, keep
        self.on_event = without_complete(on_event)
        self.statistics: Statistics | None = None
        self.calibration: dict[str, Any] | None = None
        self.texts_seen: Texts | None = None
        self.common = {"records": RECORDS, "model": model.fingerprint(), **environment()}
        self.question = {**self.common, "texts": _windows_identity(texts)}
        self.walked: Walked | None = None

    def context(self, calibrated: bool) -> str:
        """Return what cells must have in common to stand in one table: the calibration only if they use one."""
        return fingerprint({**self.question, "calibration": self.calibration if calibrated else "unused"})

    def calibrate(self, texts: Texts, recipes: Sequence[Recipe]) -> None:
        """Gather the statistics of all cells, with gradients if any of them wants those, or find them in the folder."""
        self.texts_seen = texts
        self.calibration = {"texts": _windows_identity(texts.windows)}
        targets = {} if self.targets == EXPERTS else {"targets": list(self.targets)}
        digest = fingerprint({**self.common, **self.calibration, **targets})[:8]
        plain = self.folder.path / f"statistics-{digest}"
        rich = plain.with_name(f"{plain.name}-gradients")
        gradients = rich.exists() or any(map(wants_gradients, recipes))
        self.statistics = calibrate_windows(
            self.model,
            texts.windows,
            rich if gradients else plain,
            tokenizer=texts.tokenizer,
            gradients="sequence" if gradients else None,
            targets=self.targets,
            on_event=self.on_event,
        ).check(self.checkpoint)

    def cell(self, cell: Cell) -> CellResult:
        """Return the record of a cell, measured now unless it was before."""
        recipe, decided = cell.recipe, cell.decided()
        statistics = self.statistics if calibrated(recipe) else None
        # Statistics with gradients serve those who do not use these just as well: their cells stay what they are.
        gradients = statistics is not None and wants_gradients(recipe) and statistics.record.gradients
        context = self.context(calibrated(recipe))
        key = fingerprint({"cell": decided, "context": context, "gradients": gradients or None})
        output = self.folder.checkpoint(cell.name, key)
        known = self.folder.find(key, CellResult)
        if known is not None and (known.measured is None or output.exists() or not self.keep):
            return known
        calibration = Calibration()
        if statistics is not None and self.texts_seen is not None:
            calibration = Calibration.of(recipe, statistics, self.texts_seen, gradients=bool(gradients))
        ignored = self.checkpoint.ignored
        options = [*calibration.options(), *(["--ignore-config-keys", ",".join(ignored)] if ignored else [])]
        command = cell.command(self.source, output, options, self.revision, self.checkpoint.family)
        measured = self._measured(cell, output, command, calibration)
        record = CellResult.read(
            {
                "context": context,
                **decided,
                "setting": recipe.setting,
                "changed": recipe.changed,
                "calibrated": statistics is not None,
                "name": cell.name,
                "command": command,
                **({"reason": measured} if isinstance(measured, str) else measured.as_json()),
            }
        )
        if not self.keep:
            self.folder.set_aside(output)
        self.folder.add(key, record)
        self.folder.sweep()
        return record

    def _measured(self, cell: Cell, output: Path, command: str, calibration: Calibration) -> CellMeasured | str:
        """Return what a cell is like, or why it cannot be."""
        try:
            forget_peak()
            begin = time.perf_counter()
            made = make(cell, self.checkpoint, output, calibration, command=command, on_event=self.on_event)
            seconds = time.perf_counter() - begin
            small = StoredModel(output, ignore_config_keys=self.checkpoint.ignored)
            evaluation = evaluate_windows(small, self.texts, against=self._original(), on_event=self.on_event)
            costs: dict[str, Any] = token_costs(small) | {"loaded_bytes": loaded_bytes(small)}
        except StorageError:
            raise  # A full disk says nothing of the cell.
        except JaxmoeError as error:
            return str(error)
        finally:
            # Programs of sizes that do not come again: kept, they would count as the memory of later cells.
            jax.clear_caches()
        kept = ("requested", "achieved", "removed", "bits_per_weight", "allocation", "parameters", "bytes", "outcomes")
        return CellMeasured(
            output=str(output),
            **{name: getattr(made, name) for name in (*kept, "peak_bytes", "steps")},
            **costs,
            # A run that was resumed counts what it did before, too.
            seconds=max(seconds, made.layer_seconds),
            layers=[Layer(layer=own.layer, projections=own.projections, bits=own.bits) for own in made.layers],
            evaluation=replace(evaluation, against=None),
        )

    def _original(self) -> Walked:
        """Return the original's hidden states behind its last layer, which all cells are compared with."""
        if self.walked is None:
            self.walked = walk(self.model, np.concatenate([text.ids for text in self.texts]), on_event=self.on_event)
        return self.walked

    def original(self) -> Original:
        """Return what was measured of the original."""
        key = fingerprint({"original": self.question})
        known = self.folder.find(key, Original)
        if known is not None:
            return known
        measured = Original(
            parameters=self.checkpoint.parameters,
            bytes=self.checkpoint.bytes,
            loaded_bytes=loaded_bytes(self.model),
            bits_per_weight=bits_per_weight(self.checkpoint),
            **token_costs(self.model),
            evaluation=evaluate_windows(self.model, self.texts, on_event=self.on_event),
        )
        return self.folder.add(key, measured)

    def spectra(self) -> list[Spectrum]:
        """Return the spectra of the original's matrices."""
        key = fingerprint({"spectra": self.common})
        known = self.folder.find(key, _Spectra)
        return (known or self.folder.add(key, _Spectra(spectra=spectra(self.checkpoint)))).spectra

    def result(self) -> Comparison:
        """Return what was measured so far, in this run and in those before."""
        original, found = self.original(), self.folder.cells({self.context(True), self.context(False)})
        statistics = self.statistics
        return Comparison(
            jaxmoe=jaxmoe.__version__,
            source=self.source,
            model_type=self.model.model_type,
            texts=[Text(name=own.name, windows=len(own.ids), left_out=own.left_out) for own in self.texts],
            length=self.texts[0].ids.shape[1],
            calibration=None if statistics is None else statistics.describe(),
            rows=rows(original, found),
            cells=found,
            routing=None if statistics is None else routing(statistics),
            spectra=self.spectra(),
            ignored_config_keys=list(self.model.ignored) or None,
        )


class _Spectra(Record, frozen=True, kw_only=True):
    spectra: list[Spectrum]


def _windows_identity(texts: Sequence[Windows]) -> list[dict[str, Any]]:
    return [
        {"name": text.name, "fingerprint": text.fingerprint, "windows": len(text.ids), "length": text.ids.shape[1]}
        for text in texts
    ]
