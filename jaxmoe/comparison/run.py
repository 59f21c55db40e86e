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

import jaxmoe
from jaxmoe.calibration.checkpoint import SEQUENCES
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.comparison.cells import Calibration, Cell, cells, make
from jaxmoe.comparison.contenders import calibrated, check_forms, contenders, wants_gradients, with_baselines
from jaxmoe.comparison.costs import forget_peak, token_costs
from jaxmoe.comparison.diagnostics import routing, spectra
from jaxmoe.comparison.folder import ComparisonFolder
from jaxmoe.comparison.summary import rows
from jaxmoe.compression.fewer_experts import blocks
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.run import environment
from jaxmoe.compression.step import Texts
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.evaluation.evaluate import evaluate_windows
from jaxmoe.evaluation.windows import Walked, walk
from jaxmoe.report.comparison import comparison_csv, comparison_markdown
from jaxmoe.report.events import CellDone, OnEvent, ignore, without_complete
from jaxmoe.report.page import page
from jaxmoe.texts import Paths, Tokenizer, Windows, paths, text_windows, window_length


def compare(
    checkpoint: str | Path,
    report: str | Path,
    methods: Sequence[str | Recipe] | str,
    *,
    ratios: Sequence[float],
    text: Paths,
    of: str = "experts",
    unit: str = "parameters",
    calibration_text: Paths | None = None,
    setting: str = "improved",
    set: Mapping[str, Any] | None = None,
    sequences: int | None = SEQUENCES,
    windows: int | None = None,
    length: int | None = None,
    main_experts: Sequence[int] | None = None,
    seeds: int = 1,
    keep: bool = False,
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Measure methods and recipes at several sizes on one checkpoint: tables, and a report to read in a browser.

    The same call resumes where it stopped; with further methods, ratios or seeds it adds to what is in the folder.

    Args:
        checkpoint: a folder or a hub id.
        report: folder of the comparison; what it holds from earlier runs is used again.
        methods: names of methods, recipes or recipe files, as a list or with commas between them; cheap baselines join
            them: truncated SVD of every expert and, with calibration, pruning by frequency and by REAP.
        ratios: removed fractions.
        text: to evaluate on, as `jaxmoe.evaluate` takes it.
        of: what the ratios are fractions of: "touched" (the matrices that are replaced), "experts" or "model".
        unit: what is counted, "parameters" or "bytes".
        calibration_text: to calibrate on, once for all; None for no calibration.
        setting: "paper", "improved" or "both".
        set: settings by `METHOD:NAME`, or by `METHOD:SETTING:NAME` for one of both settings.
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
        `source`, `texts`, `length`, `calibration`, `rows` (see `summary`), `cells`, `routing` (None without
        calibration) and `spectra` (see `diagnostics`), all of it JSON; `no_page` says why there is no HTML report.

    Raises:
        JaxmoeError: what was asked for cannot be: a method, a text, a ratio, the checkpoint or the folder.
    """
    recipes = contenders(methods, setting=setting, set=set)
    texts, learned = paths(text), paths(calibration_text)
    opened = Checkpoint.open(str(checkpoint), revision=revision, ignore_config_keys=ignore_config_keys)
    report = output_folder(report, [opened.folder, *texts, *learned], beside=(), into=True)
    check_forms(opened, recipes)
    factored = "factored" in exports(opened.model_type)
    everyone = with_baselines(recipes, calibrated=calibration_text is not None, factored=factored)
    model = StoredModel(opened.folder, ignore_config_keys=opened.ignored)
    tokenizer = Tokenizer.open(opened.folder)
    if main_experts is None:
        main_experts = [max(1, max(block.router.top_k for _, block in blocks(model.spec)) // 2)]
    asked = cells(everyone, ratios, of=of, unit=unit, main_experts=main_experts, seeds=seeds)
    length = window_length(model.longest, length)
    cut = text_windows(texts, tokenizer, length=length, count=windows)
    calibration = None
    if calibration_text is not None:
        windows_of_it = text_windows(learned, tokenizer, length=length, count=sequences)
        calibration = Texts(learned, sequences, length, windows_of_it, tokenizer.fingerprint)
    folder = ComparisonFolder(report)
    with folder.opened(opened.fingerprint()):
        run = _Run(folder, opened, model, cut, str(checkpoint), revision, keep, on_event)
        if calibration is not None:
            run.calibrate(calibration, recipes)
        for position, cell in enumerate(asked):
            record = run.cell(cell)
            write_tables(folder.path, run.result())
            on_event(CellDone(name=cell.name, done=position + 1, total=len(asked), **_said(record)))
        result = run.result()
        write_tables(folder.path, result)
        try:
            content = page(result).encode()
        except JaxmoeError as error:
            result["no_page"] = str(error)
        else:
            write_bytes(folder.path / "index.html", content)
        return result


def write_tables(folder: Path, result: dict[str, Any]) -> None:
    """Write what was measured so far as JSON, Markdown and CSV."""
    contents = {
        "comparison.json": json.dumps(result, indent=1),
        "table.md": comparison_markdown(result),
        "table.csv": comparison_csv(result),
    }
    for name, content in contents.items():
        write_bytes(folder / name, content.encode())


def _said(record: dict[str, Any]) -> dict[str, Any]:
    if "reason" in record:
        return {"reason": record["reason"]}
    return {"perplexity": record["evaluation"]["geometric_mean_perplexity"], "seconds": record["seconds"]}


class _Run:
    """One run of a comparison: what its cells share."""

    def __init__(
        self,
        folder: ComparisonFolder,
        checkpoint: Checkpoint,
        model: StoredModel,
        texts: Sequence[Windows],
        source: str,
        revision: str | None,
        keep: bool,
        on_event: OnEvent,
    ):
        self.folder, self.checkpoint, self.model, self.texts = folder, checkpoint, model, texts
        self.source, self.revision, self.keep = source, revision, keep
        self.on_event = without_complete(on_event)
        self.statistics: Statistics | None = None
        self.calibration: dict[str, Any] | None = None
        self.texts_seen: Texts | None = None
        self.common = {"model": model.fingerprint(), **environment()}
        self.question = {**self.common, "texts": _windows_identity(texts)}
        self.walked: Walked | None = None

    def context(self, calibrated: bool) -> str:
        """Return what cells must have in common to stand in one table: the calibration only if they use one."""
        return fingerprint({**self.question, "calibration": self.calibration if calibrated else "unused"})

    def calibrate(self, texts: Texts, recipes: Sequence[Recipe]) -> None:
        """Gather the statistics of all cells, with gradients if any of them wants those, or find them in the folder."""
        self.texts_seen = texts
        self.calibration = {"texts": _windows_identity(texts.windows)}
        digest = fingerprint({**self.common, **self.calibration})[:8]
        plain = self.folder.path / f"statistics-{digest}"
        rich = plain.with_name(f"{plain.name}-gradients")
        gradients = rich.exists() or any(map(wants_gradients, recipes))
        self.statistics = calibrate_windows(
            self.model,
            texts.windows,
            rich if gradients else plain,
            tokenizer=texts.tokenizer,
            gradients="sequence" if gradients else None,
            on_event=self.on_event,
        ).check(self.checkpoint)

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Return the record of a cell, measured now unless it was before."""
        recipe, decided = cell.recipe, cell.decided()
        statistics = self.statistics if calibrated(recipe) else None
        # Statistics with gradients serve those who do not use these just as well: their cells stay what they are.
        gradients = statistics is not None and wants_gradients(recipe) and statistics.record.gradients
        context = self.context(calibrated(recipe))
        key = fingerprint({"cell": decided, "context": context, "gradients": gradients or None})
        output = self.folder.checkpoint(cell.name, key)
        known = self.folder.find(key)
        if known is not None and ("reason" in known or output.exists() or not self.keep):
            return known
        calibration = Calibration()
        if statistics is not None and self.texts_seen is not None:
            calibration = Calibration.of(recipe, statistics, self.texts_seen, gradients=bool(gradients))
        ignored = self.checkpoint.ignored
        options = [*calibration.options(), *(["--ignore-config-keys", ",".join(ignored)] if ignored else [])]
        command = cell.command(self.source, output, options, self.revision, self.checkpoint.family)
        record = {
            "context": context,
            **decided,
            "setting": recipe.setting,
            "changed": recipe.changed,
            "calibrated": statistics is not None,
            "name": cell.name,
            "command": command,
        }
        record |= self._measured(cell, output, command, calibration)
        if not self.keep:
            self.folder.set_aside(output)
        self.folder.add(key, record)
        self.folder.sweep()
        return record

    def _measured(self, cell: Cell, output: Path, command: str, calibration: Calibration) -> dict[str, Any]:
        try:
            forget_peak()
            begin = time.perf_counter()
            made = make(cell, self.checkpoint, output, calibration, command=command, on_event=self.on_event)
            seconds = time.perf_counter() - begin
            small = StoredModel(output, ignore_config_keys=self.checkpoint.ignored)
            measured = evaluate_windows(small, self.texts, against=self._original(), on_event=self.on_event)
            costs = token_costs(small)
        except StorageError:
            raise  # A full disk says nothing of the cell.
        except JaxmoeError as error:
            return {"reason": str(error)}
        finally:
            # Programs of sizes that do not come again: kept, they would count as the memory of later cells.
            jax.clear_caches()
        evaluation, report = measured.as_json(), made.as_json()
        del evaluation["against"]
        kept = ("requested", "achieved", "allocation", "parameters", "bytes", "outcomes", "peak_bytes", "steps")
        return {
            "output": str(output),
            **{name: report[name] for name in kept if name in report},
            **costs,
            # A run that was resumed counts what it did before, too.
            "seconds": max(seconds, made.layer_seconds),
            "layers": [{"layer": layer["layer"], "projections": layer["projections"]} for layer in report["layers"]],
            "evaluation": evaluation,
        }

    def _original(self) -> Walked:
        """Return the original's hidden states behind its last layer, which all cells are compared with."""
        if self.walked is None:
            self.walked = walk(self.model, np.concatenate([text.ids for text in self.texts]), on_event=self.on_event)
        return self.walked

    def original(self) -> dict[str, Any]:
        """Return what was measured of the original."""
        key = fingerprint({"original": self.question})
        known = self.folder.find(key)
        if known is not None:
            return known
        measured = evaluate_windows(self.model, self.texts, on_event=self.on_event).as_json()
        sizes = {"parameters": self.checkpoint.parameters, "bytes": self.checkpoint.bytes}
        return self.folder.add(key, {**sizes, **token_costs(self.model), "evaluation": measured})

    def spectra(self) -> list[dict[str, Any]]:
        key = fingerprint({"spectra": self.common})
        known = self.folder.find(key)
        return (known or self.folder.add(key, {"spectra": spectra(self.checkpoint)}))["spectra"]

    def result(self) -> dict[str, Any]:
        original, found = self.original(), self.folder.cells({self.context(True), self.context(False)})
        statistics = self.statistics
        return {
            "jaxmoe": jaxmoe.__version__,
            "source": self.source,
            "model_type": self.model.model_type,
            "texts": [{"name": text.name, "windows": len(text.ids), "left_out": text.left_out} for text in self.texts],
            "length": self.texts[0].ids.shape[1],
            "calibration": None if statistics is None else statistics.describe(),
            "rows": rows(original, found),
            "cells": found,
            "routing": None if statistics is None else routing(statistics),
            "spectra": self.spectra(),
            **({"ignored_config_keys": list(self.model.ignored)} if self.model.ignored else {}),
        }


def _windows_identity(texts: Sequence[Windows]) -> list[dict[str, Any]]:
    return [
        {"name": text.name, "fingerprint": text.fingerprint, "windows": len(text.ids), "length": text.ids.shape[1]}
        for text in texts
    ]
