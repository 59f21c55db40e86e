"""Calibrate a stored model: stream texts through it and gather every layer's statistics, layer by layer.

A run that is killed resumes at the layer where it stopped: the hidden states that enter it lie in the unfinished
folder. Memory holds one layer's weights and the sums of one text; where the second moments of a layer's experts would
take more than a bound, the layer runs several times, for some of its experts each. With gradients, the states that
enter every layer are kept, and the layers are visited a second time from the last to the first.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.calibration.fisher import layer_backward, loss_gradients
from jaxmoe.calibration.folder import Statistics, layer_arrays
from jaxmoe.calibration.inputs import kept_inputs
from jaxmoe.calibration.record import Record, Source
from jaxmoe.calibration.statistics import FIELDS, LayerStatistics, merge_arrays
from jaxmoe.calibration.sums import POOLED, Summing
from jaxmoe.calibration.writer import StatisticsWriter
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.mapped import create_mapped
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import JOURNAL
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.roles import check_targets, offered_targets
from jaxmoe.model.spec import LayerSpec
from jaxmoe.report.events import Calibrated, OnEvent, ignore
from jaxmoe.streaming import TOKENS, HiddenStates, Prefetched, on_device, run_layer, start
from jaxmoe.texts import Windows

LEAST = 256 << 20
"""Bytes that the sums of a layer's experts may always take in memory."""

Sums = dict[str, np.ndarray]


def calibrate_windows(
    model: StoredModel,
    texts: Sequence[Windows],
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    moments: str = "weighted",
    gradients: str | None = None,
    targets: str | Collection[str] = "experts",
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    tokens: int = TOKENS,
    limit: int | None = None,
    on_event: OnEvent = ignore,
) -> Statistics:
    """Gather the statistics of a model's routed experts, and perhaps of its other linear maps, on some texts.

    Args:
        model: to calibrate.
        texts: its windows, a domain each, of one length.
        folder: the statistics folder to create.
        tokenizer: fingerprint of what made the windows, None if unknown.
        moments: which second moments to keep: "none", "pooled", "expert" or "weighted".
        gradients: whether to keep the Fisher information, of each "sequence" or "token"; None for none.
        targets: what beside "experts" is to have the second moments of its inputs kept: "attention", "shared", "dense".
        layers: `(first, end)`: keep the decoder layers first <= index < end only; None for all.
        resume: whether to resume an unfinished run.
        tokens: that go through a layer together.
        limit: bytes that the sums of a layer's experts may take in memory; None for as much as its matrices take in
            float32, at least 256 MB.
        on_event: called with a small record after every layer.

    Raises:
        JaxmoeError: the folder holds something else, activations are not finite, no layer with experts is chosen, or
            the model lacks a target.
    """
    record = make_record(model, texts, tokenizer, moments=moments, gradients=gradients, targets=targets, layers=layers)
    writer = StatisticsWriter(output_folder(folder, [model.folder]), record)
    if (done := writer.finished()) is not None:
        return done
    with writer.opened(resume=resume):
        ids, counted = (np.concatenate([getattr(text, name) for text in texts]) for name in ("ids", "counted"))
        states = HiddenStates(ids, writer.workspace.folder / JOURNAL / "states", model.spec.hidden, tokens=tokens)
        run = _Run(model, texts, states, counted, writer, limit, on_event)
        run.forward() if gradients is None else run.backward(gradients)
        return writer.publish()


def make_record(
    model: StoredModel,
    texts: Sequence[Windows],
    tokenizer: str | None,
    *,
    moments: str = "weighted",
    gradients: str | None = None,
    targets: str | Collection[str] = "experts",
    layers: tuple[int, int] | None = None,
) -> Record:
    """Return what the statistics of these texts will say of themselves; the arguments are those of `calibrate`."""
    first, end = layers or (0, len(model.spec.layers))
    chosen = [index for index in sorted(model.shapes) if first <= index < end]
    if not chosen:
        known = sorted(model.shapes)
        raise JaxmoeError(f"layers {first}:{end} hold no routed experts: they lie in layers {known[0]} to {known[-1]}")
    asked = offered_targets(check_targets(targets), model.linear_targets)
    others = tuple(name for name in asked if name != "experts")
    if others and moments == "none":
        raise JaxmoeError(
            f"targets {', '.join(others)} ask for second moments, and moments is none: give pooled, expert or weighted"
        )
    inputs = {
        index: kept_inputs(model.linear_sizes(index), others, experts=index in chosen)
        for index in range(first, min(end, len(model.spec.layers)))
    }
    if gradients is not None and any(len(text.ids[0]) < 2 for text in texts):
        raise JaxmoeError("windows of one token predict nothing: give a length of at least 2")
    if gradients is not None and isinstance(model.checkpoint, CompressedCheckpoint) and model.checkpoint.main:
        raise JaxmoeError(
            f"{model.folder}: vectors scale what its experts read, and the Fisher information of these is not gathered:"
            " calibrate the checkpoint that it was made of, or without gradients"
        )
    sources = {
        text.name: (
            Source(
                fingerprint=text.fingerprint,
                sequences=int(text.counted.any(1).sum()),
                length=text.ids.shape[1],
                tokens=int(text.counted.sum()),
            ),
        )
        for text in texts
    }
    return Record(
        model=model.fingerprint(),
        tokenizer=tokenizer,
        domains=sources,
        layers={index: model.shapes[index] for index in chosen},
        moments=moments,
        gradients=gradients,
        targets=others,
        inputs={index: own for index, own in inputs.items() if own},
    )


class _Run:
    """One calibration: what its steps share."""

    def __init__(
        self, model: StoredModel, texts, states: HiddenStates, counted, writer, limit: int | None, on_event: OnEvent
    ):
        self.model, self.states, self.counted = model, states, counted
        self.writer, self.limit, self.on_event = writer, limit, on_event
        ends = np.cumsum([0, *(len(text.ids) for text in texts)])
        self.parts = {text.name: slice(int(a), int(b)) for text, a, b in zip(texts, ends, ends[1:])}
        self.missing: dict[int, list[str]] = {}
        for domain, index in writer.missing():
            self.missing.setdefault(index, []).append(domain)

    def forward(self) -> None:
        """Visit the layers from the first whose records are missing to the last."""
        if not self.missing:
            return
        for index, parameters in Prefetched(self.model, range(self._begin(), max(self.missing) + 1)):
            self._visit(index, parameters)
            self.states.remove(index)

    def _begin(self) -> int:
        """Return the last layer, at most the first missing one, whose input states are there; embed if none are."""
        for index in range(min(self.missing), -1, -1):
            if self.states.whole(index):
                return index
        start(self.model, self.states)
        return 0

    def _visit(self, index: int, parameters: dict[str, Any]) -> None:
        """Move all states through a layer; write the records of those texts for which they are missing."""
        spec, states = self.model.spec.layers[index], self.states
        last = index == len(self.model.spec.layers) - 1
        out = None if last else states.create(index + 1)
        for domain, part in self.parts.items():
            if domain not in self.missing.get(index, ()):
                for _ in run_layer(index, parameters, spec, states, out, part=part):
                    pass
                continue
            record, counted = self.writer.record, self.counted
            sums = gather(record, index, parameters, spec, states, counted, limit=self.limit, out=out, part=part)
            self._write(domain, index, sums)
        if out is not None:
            states.finish(index + 1)
        self._report(index)

    def _write(self, domain: str, index: int, sums: Sums) -> None:
        record = self.writer.record
        inputs = {name: array for name, array in sums.items() if name not in FIELDS}
        statistics = None
        if (shape := record.layers.get(index)) is not None:
            own = {name: array for name, array in sums.items() if name in FIELDS}
            tokens, sequences = record.tokens(domain), record.sequences(domain)
            statistics = LayerStatistics(shape=shape, tokens=tokens, sequences=sequences, **own)
        self.writer.write(domain, index, statistics, inputs)

    def _report(self, index: int) -> None:
        if self.missing.pop(index, None) is not None:
            total = len(self.writer.record.visited)
            done = total - len(self.missing)
            self.on_event(Calibrated(layer=index, done=done, total=total))

    def backward(self, mode: str) -> None:
        """Visit the layers from the last to the first, after a forward pass that keeps what enters every layer."""
        if not self.missing:
            return
        depth = len(self.model.spec.layers)
        gradients = HiddenStates(
            self.states.ids, self.states.folder / "gradients", self.model.spec.hidden, tokens=TOKENS
        )
        begin = next((i for i in range(max(self.missing) + 1, depth + 1) if gradients.whole(i)), None)
        if begin is None:
            self._keep_all()
            self._losses(gradients)
            begin = depth
        for index, parameters in Prefetched(self.model, range(begin - 1, min(self.missing) - 1, -1)):
            self._visit_back(index, parameters, gradients, mode)
            gradients.remove(index + 1)
            self.states.remove(index + 1)

    def _keep_all(self) -> None:
        depth = len(self.model.spec.layers)
        have = next((i for i in range(depth, -1, -1) if self.states.whole(i)), None)
        if have is None:
            start(self.model, self.states)
            have = 0
        for index, parameters in Prefetched(self.model, range(have, depth)):
            out = self.states.create(index + 1)
            for _ in run_layer(index, parameters, self.model.spec.layers[index], self.states, out):
                pass
            self.states.finish(index + 1)

    def _losses(self, gradients: HiddenStates) -> None:
        """Write the gradient of the losses with respect to what leaves the last layer."""
        depth, ends = len(self.model.spec.layers), on_device(self.model.ends())
        source, out = self.states.open(depth), gradients.create(depth)
        for windows in self.states.batches():
            given = (jnp.asarray(a[windows]) for a in (source, self.states.ids, self.counted))
            out[windows] = _head_gradient(*given, ends, spec=self.model.spec)
        gradients.finish(depth)

    def _visit_back(self, index: int, parameters: dict[str, Any], gradients: HiddenStates, mode: str) -> None:
        spec, record = self.model.spec.layers[index], self.writer.record
        source, left, out = self.states.open(index), gradients.open(index + 1), gradients.create(index)
        for domain, part in self.parts.items():
            wanted = domain in self.missing.get(index, ())
            passes = list(_passes(record, index, self.limit)) if wanted else [None]
            sums: Sums = {}
            for position, summing in enumerate(passes):
                arrays: Sums = {}
                for windows in self.states.batches(part):
                    given = (jnp.asarray(a[windows]) for a in (source, left, self.counted))
                    entered, observed = _back(*given, parameters, summing, spec=spec, mode=mode)
                    entered = np.asarray(entered)
                    if not np.isfinite(entered).all():
                        raise JaxmoeError(f"layer {index}: the gradient is not finite on {domain}: check the weights")
                    if position == 0:
                        out[windows] = entered
                    if summing:
                        # The Fisher information is that of all experts in every pass.
                        names = [name for name in observed if position == 0 or name in summing.names]
                        _add(arrays, {name: observed[name] for name in names})
                    del entered, observed
                if summing:
                    _place(sums, arrays, summing, self.states.folder)
            if wanted:
                self._write(domain, index, sums)
        gradients.finish(index)
        self._report(index)


def gather(
    record: Record,
    index: int,
    parameters: dict[str, Any],
    spec: LayerSpec,
    states: HiddenStates,
    counted: np.ndarray,
    *,
    limit: int | None,
    out: np.ndarray | None = None,
    part: slice = slice(None),
) -> Sums:
    """Return the sums of one layer on some windows, in as many visits as their size asks for.

    Args:
        record: what to keep.
        index: of the layer.
        parameters: its arrays, on the device.
        spec: what it computes.
        states: the windows' hidden states.
        counted: which tokens count.
        limit: see `calibrate`.
        out: where the states that leave the layer are written, see `streaming.run_layer`.
        part: the windows.
    """
    sums: Sums = {}
    for position, summing in enumerate(_passes(record, index, limit)):
        arrays: Sums = {}
        written = out if position == 0 else None
        steps = run_layer(
            index, parameters, spec, states, written, part=part, observe=summing, extra=counted, reads=summing.inputs
        )
        for step in steps:
            _add(arrays, step.observed)
            # Before the next batch makes as much again.
            del step
        _place(sums, arrays, summing, states.folder)
    return sums


def _passes(record: Record, index: int, limit: int | None) -> Iterator[Summing]:
    """Yield what to sum in each visit of a layer: everything, or the sums of some experts at a time."""
    inputs = tuple(record.inputs.get(index, {}))
    if (shape := record.layers.get(index)) is None:
        yield Summing(shape=None, names=(), experts=0, inputs=inputs)
        return
    names = tuple(name for name in layer_arrays(record, index) if not name.startswith("fisher_"))
    own = tuple(name for name in names if name not in POOLED)
    each = sum(8 * int(np.prod(FIELDS[name].shape(shape)[1:])) for name in own)
    limit = max(LEAST, 4 * shape.numbers) if limit is None else limit
    visits = -(-shape.experts // max(1, limit // each))
    at_once = -(-shape.experts // visits)
    for first in range(0, shape.experts, at_once):
        some = min(at_once, shape.experts - first)
        yield Summing(
            shape=shape,
            names=names if first == 0 else own,
            experts=some,
            first=first,
            inputs=inputs if first == 0 else (),
        )


def _add(arrays: Sums, observed: dict[str, Any]) -> None:
    """Add a batch's float32 sums to those of the batches before, in float64."""
    for name, array in observed.items():
        if name in arrays:
            merge_arrays(name, arrays[name], np.asarray(array), out=arrays[name])
        else:
            arrays[name] = np.asarray(array).astype(FIELDS[name].dtype if name in FIELDS else "float64")


def _place(sums: Sums, arrays: Sums, summing: Summing, folder: Path) -> None:
    """Put the rows of some experts where they belong; what does not fit into memory at once lies in mapped files."""
    for name, array in arrays.items():
        if summing.shape is None or name in summing.inputs or array.shape == FIELDS[name].shape(summing.shape):
            sums[name] = array
        else:
            whole = FIELDS[name].shape(summing.shape)
            if name not in sums:
                sums[name] = create_mapped(folder / f"{name}.sums", FIELDS[name].dtype, whole)
            sums[name][summing.first : summing.first + summing.experts] = array


@partial(jax.jit, static_argnames="spec")
def _head_gradient(x, ids, counted, ends, spec):
    with jax.default_matmul_precision("float32"):
        return loss_gradients(x, ids, counted, ends, spec)


@partial(jax.jit, static_argnames=("spec", "mode"))
def _back(x, gradient, counted, parameters, summing: Summing | None, spec: LayerSpec, mode: str):
    with jax.default_matmul_precision("float32"):
        entered, fisher, seen = layer_backward(x, gradient, parameters, spec, mode=mode)
        observed = {} if summing is None else summing(seen, counted)
        return entered, observed | {f"fisher_{name}": array for name, array in fisher.items()}
