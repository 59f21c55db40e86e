"""Carry out one pass over the layers of a model: finished layers are kept, and the output appears when it is complete.

Nothing ever holds the whole model: a layer is worked on, written and journaled before the next one starts. A run that
is killed resumes where it stopped and ends with the same bytes; runs over disjoint layers share one folder and complete
it together. What happens to a layer is the pass's business, see `Pass`: none is known here.
"""

import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

import jaxmoe
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import Planned, write_tensors
from jaxmoe.checkpoint.workspace import Workspace, fingerprint, finished, layer_file
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Source
from jaxmoe.compression.whole import Whole, told
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.card import model_card
from jaxmoe.export.checking import Answers, check_written
from jaxmoe.export.folder import complete_folder, side_files, write_report
from jaxmoe.methods.method import Outcome
from jaxmoe.report.events import Complete, LayerDone, OnEvent, Waiting, ignore
from jaxmoe.report.records import Improvement, Projection, Report

_NOT_REPORTED = (
    "key",
    "sha256",
    "spec",
    "linears",
    "stored",
    "counts",
    "edited",
    "answers",
    "digests",
    "outcomes",
    "peak_bytes",
)
"""What the journal says of a layer and the report does not."""

OF_A_STEP = ("method", "settings", "requested", "achieved", "kept", "parameters", "bytes", "outcomes", "layer_seconds")
"""What the report of a recipe says of each of its steps."""


class Written(NamedTuple):
    """A layer as a pass leaves it.

    Args:
        index: of the layer.
        tensors: what its file will hold.
        record: what the journal will say of it, `projections` and whatever else the pass needs later, as JSON.
        outcomes: what the user should know.
        answers: what its experts are to answer, see `export.checking`; None where that is not checked.
    """

    index: int
    tensors: Sequence[Planned]
    record: Mapping[str, Any]
    outcomes: Sequence[Outcome] = ()
    answers: Answers | None = None


class Files(NamedTuple):
    """What a complete folder holds beside the layers' files.

    Args:
        config: what `config.json` will say.
        code: the Python files that travel along.
        copied: the tensors that no layer's file holds.
        size: bytes that all tensors take together, None if that was not counted before.
    """

    config: Mapping[str, Any]
    code: Mapping[str, str]
    copied: Sequence[Planned]
    size: int | None


@runtime_checkable
class Pass(Protocol):
    """One pass over the layers of a model, planned: everything that differs between the steps of recipes."""

    @property
    def source(self) -> Source:
        """What is read, and never written to."""
        ...

    @property
    def export(self) -> str:
        """Form of the result: "factored", "dense", "slim" or one of `export.packed.PACKED`."""
        ...

    @property
    def loads_in(self) -> Sequence[str]:
        """The programs that will load the result, one sentence each."""
        ...

    @property
    def seed(self) -> int:
        """The random seed."""
        ...

    @property
    def statistics(self) -> Sums | None:
        """Calibrated statistics, None without."""
        ...

    @property
    def indices(self) -> Sequence[int]:
        """The layers to work on, ascending."""
        ...

    @property
    def peak_bytes(self) -> int | None:
        """Predicted peak of memory beyond that of the idle program; None where nothing predicts it."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of the result beside source, statistics, form and seed, as JSON."""
        ...

    def layers(self, indices: Sequence[int], journal: Path) -> Iterator[Written]:
        """Work on some layers, ascending; `journal` is a folder for what is kept meanwhile."""
        ...

    def summary(self, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the keys of the plan as they came true, given the journal's entries of the layers that are done."""
        ...

    def steps(self, entries: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the same for each step of the pass."""
        ...

    def sizes(self, entries: Mapping[int, Mapping[str, Any]]) -> Sizes:
        """Return the sizes as they came true."""
        ...

    def calibration(self) -> dict[str, Any] | None:
        """Return what the report says of the text behind it."""
        ...

    def notes(self) -> list[Outcome]:
        """Return what the user should know of the whole."""
        ...

    def files(self, entries: Mapping[int, Mapping[str, Any]]) -> Files:
        """Return what joins the layers' files, all of which are written."""
        ...


def environment() -> dict[str, Any]:
    """Return what beside the input decides the bytes of a result: versions and platform."""
    return {
        "versions": {"jaxmoe": jaxmoe.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "platform": f"{jax.default_backend()} {platform.machine()}",
    }


def run(
    work: Pass,
    output: str | Path,
    *,
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    command: str = "",
    files: Mapping[str, str] | None = None,
    whole: Whole | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Carry out a pass and write what comes of it.

    Args:
        work: what happens to the layers.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it.
        layers: `(first, end)`: work on the decoder layers first <= index < end only; the run that finishes the last
            layer publishes.
        resume: whether to resume an unfinished run; False starts over.
        command: the command line, for the report.
        files: further text files of the output, by name.
        whole: the recipe that the pass completes, where it has other steps.
        on_event: called with a small record after every layer.

    Returns:
        The report, also written to `report.json`; its `complete` is False while layers of other runs are missing.

    Raises:
        JaxmoeError: the output exists, the folder belongs to another run, a weight is not finite, or the disk is full.
    """
    statistics = work.statistics
    output = output_folder(output, [work.source.folder, *(() if statistics is None else statistics.reads)])
    begun = time.perf_counter()
    identity = {
        "source": work.source.fingerprint(),
        **work.identity(),
        "statistics": None if statistics is None else statistics.fingerprint(),
        "export": work.export,
        "seed": work.seed,
        **environment(),
    }
    recorded = identity if whole is None or whole.identity is None else dict(whole.identity)
    if (before := finished(output, recorded)) is not None:
        on_event(Complete(output=str(output)))
        return Report.read(before)
    mine = _selected(work.indices, layers)
    workspace = Workspace(output, identity)
    with workspace.opened(mine, resume=resume):
        keys = {index: fingerprint({"run": identity, "layer": index}) for index in work.indices}
        entries = {index: workspace.entry(index, key) for index, key in keys.items()}
        missing = [index for index in mine if entries[index] is None]
        stream = work.layers(missing, workspace.journal)
        for position, index in enumerate(mine):
            known = entries[index]
            entry = entries[index] = known or _next(stream, workspace, keys)
            on_event(_layer_done(entry, position + 1, len(mine), resumed=known is not None))
        # What other runs did meanwhile.
        entries |= {index: workspace.entry(index, keys[index]) for index in keys.keys() - {*mine}}
        done = {index: entry for index, entry in sorted(entries.items()) if entry is not None}
        report = {"output": str(output), "command": command, **_report(work, done, time.perf_counter() - begun)}
        if not report["complete"]:
            # Another run may have finished the last layer and published while this one was still counting.
            if (other := finished(output, recorded)) is not None:
                return Report.read(other)
            on_event(Waiting(layers=report["missing_layers"]))
            return Report.read(report)
        report["run"] = recorded
        if whole is not None:
            report = whole.report(report, work.sizes(done), work.steps(done))
        with workspace.exclusive("publish"):
            return _publish(work, workspace, done, Report.read(report), files or {}, on_event)


def _selected(indices: Sequence[int], layers: tuple[int, int] | None) -> list[int]:
    if layers is None:
        return list(indices)
    first, end = layers
    if chosen := [index for index in indices if first <= index < end]:
        return chosen
    raise JaxmoeError(f"layers {first}:{end} hold no routed experts: they lie in layers {indices[0]} to {indices[-1]}")


def _next(stream: Iterator[Written], workspace: Workspace, keys: Mapping[int, str]) -> dict[str, Any]:
    """Have the next layer worked on, and write and journal it."""
    start = time.perf_counter()
    layer = next(stream)
    checksum = write_tensors(workspace.folder / layer_file(layer.index), layer.tensors)
    record = {
        "layer": layer.index,
        **layer.record,
        **({} if layer.answers is None else {"answers": layer.answers}),
        "outcomes": [told(layer.index, outcome) for outcome in layer.outcomes],
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }
    return workspace.finish(layer.index, keys[layer.index], checksum, record)


def _layer_done(entry: Mapping[str, Any], done: int, total: int, *, resumed: bool) -> LayerDone:
    return LayerDone(
        done=done,
        total=total,
        layer=entry["layer"],
        resumed=resumed,
        seconds=entry["seconds"],
        projections={name: Projection.read(own) for name, own in entry["projections"].items()},
        error=Improvement.read(entry["error"]) if "error" in entry else None,
    )


def step_outcomes(work: Pass, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the outcomes and the time of a pass, for the record of its last step; nothing where none ran.

    Args:
        work: the pass.
        entries: the journal's, of the layers that are done.
    """
    if not entries:
        return {}
    found = [outcome for entry in entries.values() for outcome in entry["outcomes"]]
    return {
        "outcomes": found + [told(None, note) for note in work.notes()],
        "layer_seconds": sum(entry["seconds"] for entry in entries.values()),
    }


def _report(work: Pass, entries: Mapping[int, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    missing = [index for index in work.indices if index not in entries]
    return {
        "jaxmoe": jaxmoe.__version__,
        "source": str(work.source.folder),
        "seed": work.seed,
        "export": work.export,
        **work.summary(entries),
        "layers": [
            {name: value for name, value in entry.items() if name not in _NOT_REPORTED} for entry in entries.values()
        ],
        "outcomes": [],
        "layer_seconds": 0.0,
        **step_outcomes(work, entries),
        "calibration": work.calibration(),
        "predicted_peak_bytes": work.peak_bytes,
        "peak_bytes": max([peak_bytes(), *(entry["peak_bytes"] for entry in entries.values())]),
        "seconds": seconds,
        "complete": not missing,
        "missing_layers": missing,
    }


def _publish(
    work: Pass,
    workspace: Workspace,
    entries: Mapping[int, Mapping[str, Any]],
    report: Report,
    further: Mapping[str, str],
    on_event: OnEvent,
) -> Report:
    """Complete the folder, open it again as its user will, and give it its name.

    Raises:
        JaxmoeError: what was written cannot be opened again, or does not hold what was meant.
    """
    files = work.files(entries)
    stored = complete_folder(
        workspace.folder,
        layers=[workspace.folder / layer_file(index) for index in entries],
        copied=files.copied,
        config=files.config,
        code={**files.code, **further},
        beside=side_files(work.source.folder),
    )
    if files.size is not None and stored["bytes"] != files.size:
        raise RuntimeError(f"the files hold {stored}, the terms counted {files.size}: a defect of jaxmoe")
    meant = {index: entry["answers"] for index, entry in entries.items() if "answers" in entry}
    exact = {index: entry["digests"] for index, entry in entries.items() if "digests" in entry}
    check_written(workspace.folder, work.source, meant, exact)
    record = write_report(workspace.folder, {**report.as_json(), "stored": stored})
    write_bytes(workspace.folder / "README.md", model_card(Report.read(record)).encode())
    workspace.publish()
    on_event(Complete(output=str(workspace.output)))
    return Report.read(record)


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far, file pages included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
