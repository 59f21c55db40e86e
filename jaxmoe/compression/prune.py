"""Carry out a slim plan: one layer at a time, resumable, the output under its name only when complete."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import jaxmoe
from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import write_tensors
from jaxmoe.checkpoint.workspace import Workspace, fingerprint, finished, layer_file
from jaxmoe.compression.evidence import LayerSums, Sums, evidence
from jaxmoe.compression.pruned_sizes import SlimPlan
from jaxmoe.compression.run import (
    Amend,
    check_statistics,
    layer_done,
    measured_errors,
    peak_bytes,
    publish,
    reads,
    unchanged,
    where,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import dense_answers, first_and_last
from jaxmoe.export.pruned import slim_config, slim_copied, slim_edited
from jaxmoe.factors import CompressedLayer, Dense
from jaxmoe.factors.slicing import slice_channels
from jaxmoe.methods import Outcome
from jaxmoe.methods.pruning import Pruned
from jaxmoe.report.events import Complete, OnEvent, ignore


def slim(
    checkpoint: Checkpoint,
    output: str | Path,
    plan: SlimPlan,
    *,
    statistics: Sums | None,
    resume: bool = True,
    command: str = "",
    amend: Amend = unchanged,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Write the checkpoint that a plan describes.

    Args:
        checkpoint: the source, which is never written to.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it.
        plan: from `make_slim_plan`.
        statistics: calibrated statistics; all slimming methods so far need some.
        resume: whether to go on with an unfinished run; False starts over.
        command: the command line, for the report.
        amend: has the last word on the report.
        on_event: called with a small record after every layer.

    Returns:
        The report, also written to `report.json`.

    Raises:
        JaxmoeError: the output exists, the folder belongs to another run, the statistics lack something, or the disk is
            full.
    """
    output = output_folder(output, [checkpoint.folder, *reads(statistics)])
    begun = time.perf_counter()
    check_statistics(plan, statistics)
    run = {
        "source": checkpoint.fingerprint(),
        "method": plan.method.name,
        "settings": asdict(plan.settings),
        "requested": plan.requested,
        "kept": {plan.method.unit: plan.keep},
        "statistics": None if statistics is None else statistics.fingerprint(),
        "export": "slim",
        **where(),
    }
    if (done := finished(output, run)) is not None:
        on_event(Complete(output=str(output)))
        return done
    workspace = Workspace(output, run)
    copied = slim_copied(checkpoint)
    with workspace.opened([layer.index for layer in checkpoint.layers], resume=resume):
        entries = []
        for position, layer in enumerate(checkpoint.layers):
            key = fingerprint({"run": run, "layer": layer.index})
            entry = workspace.entry(layer.index, key)
            resumed = entry is not None
            if entry is None:
                sums = None if statistics is None else statistics.layer(layer.index)
                entry = _layer(checkpoint, plan, layer, copied, sums, workspace, key)
            entries.append(entry)
            on_event(layer_done(entry, position + 1, len(checkpoint.layers), resumed=resumed))
        report = {
            "jaxmoe": jaxmoe.__version__,
            "source": str(checkpoint.folder),
            "output": str(output),
            "command": command,
            "seed": 0,
            "export": "slim",
            **plan.summary(),
            "layers": [
                {name: entry[name] for name in ("layer", "kept", "projections", "seconds") if name in entry}
                for entry in entries
            ],
            "outcomes": _outcomes(checkpoint, entries),
            "calibration": None if statistics is None else statistics.describe(),
            "predicted_peak_bytes": plan.peak_bytes,
            "peak_bytes": max([peak_bytes(), *(entry["peak_bytes"] for entry in entries)]),
            "layer_seconds": sum(entry["seconds"] for entry in entries),
            "seconds": time.perf_counter() - begun,
            "complete": True,
            "run": run,
        }
        edited = {name for entry in entries for name in entry["edited"]}
        return publish(
            checkpoint,
            workspace,
            amend(report),
            [layer.index for layer in checkpoint.layers],
            slim_config(checkpoint, plan.method.unit, plan.keep),
            {},
            plan.bytes["after"],
            {entry["layer"]: entry["answers"] for entry in entries if "answers" in entry},
            on_event,
            copied=[tensor for tensor in copied if tensor.name not in edited],
        )


def _layer(checkpoint, plan: SlimPlan, layer: MoELayer, copied, sums: LayerSums | None, workspace, key):
    """Slim one layer and write it with its router and biases."""
    start = time.perf_counter()
    unit = plan.method.unit
    read = partial(checkpoint.projection, layer)
    known = evidence(sums, "down", lambda name: read(name).astype(np.float32))
    found: Pruned = plan.method.fit(known, plan.keep, plan.settings, groups=plan.groups)
    _check(found, plan, layer)
    edited = slim_edited(checkpoint, layer, copied, unit, plan.keep, lambda: found.kept)
    rest = partial(_remaining, read, found, unit)
    tensors = plan_dense(layer.written, plan.shapes[layer.index], layer.dtype, rest)
    tensors += [tensor for new in edited.values() for tensor in new]
    projections = plan.projections(layer.index)
    for name, record in projections.items():
        # The original's sizes, with zeros for what is gone.
        padded = CompressedLayer(
            terms={name: (Dense(weight=_padded(rest(name), found.kept, layer.shape.of(name), name, unit)),)},
            sizes=layer.shape,
        )
        record |= measured_errors(checkpoint, layer, padded, name, sums)
    checksum = write_tensors(workspace.folder / layer_file(layer.index), tensors)
    outcomes = [*_never_routed(sums), *found.outcomes]
    checked = layer.index in first_and_last(own.index for own in checkpoint.layers)
    record = {
        "layer": layer.index,
        **({"kept": found.kept.tolist()} if unit == "experts" else {}),
        "edited": sorted(edited),
        "projections": projections,
        **({"answers": dense_answers(rest, plan.shapes[layer.index])} if checked else {}),
        "outcomes": [{"layer": layer.index, **outcome._asdict()} for outcome in outcomes],
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }
    return workspace.finish(layer.index, key, checksum, record)


def _check(found: Pruned, plan: SlimPlan, layer: MoELayer) -> None:
    """Raise unless a method kept just so many, and gave numbers."""
    lead = () if plan.method.unit == "experts" else (layer.shape.experts,)
    if found.kept.shape != (*lead, plan.keep) or (np.diff(found.kept, axis=-1) <= 0).any():
        raise RuntimeError(f"layer {layer.index}: {plan.method.name} kept {found.kept.shape}, not {plan.keep} in order")
    for name, weight in found.weights.items():
        if not np.isfinite(weight).all():
            raise JaxmoeError(
                f"layer {layer.index}, {name}: {plan.method.name} gave weights that are not finite; calibrate with more"
                " text, or try another setting"
            )


def _remaining(read, found: Pruned, unit: str, projection: str) -> np.ndarray:
    """Return a projection of what stays."""
    if projection in found.weights:
        return found.weights[projection]
    weight = read(projection)
    return weight[found.kept] if unit == "experts" else slice_channels(weight, found.kept, projection)


def _padded(weight: np.ndarray, kept: np.ndarray, shape: tuple[int, ...], projection: str, unit: str) -> np.ndarray:
    whole = np.zeros(shape, np.float32)
    if unit == "experts":
        whole[kept] = weight
    else:
        index = kept[:, None, :] if projection == "down" else kept[:, :, None]
        np.put_along_axis(whole, index, weight.astype(np.float32), axis=2 if projection == "down" else 1)
    return whole


def _never_routed(sums: LayerSums | None) -> list[Outcome]:
    never = [] if sums is None else np.flatnonzero(np.asarray(sums.counts) == 0).tolist()
    if not never:
        return []
    detail = f"no calibration token chose experts {', '.join(map(str, never))}: they count for nothing"
    return [Outcome("never_routed", "", detail)]


def _outcomes(checkpoint: Checkpoint, entries: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [outcome for entry in entries for outcome in entry["outcomes"]]
    notes = [note for note in checkpoint.notes if "multi-token prediction" not in note]
    if checkpoint.mtp:
        notes.append(
            f"{len(checkpoint.mtp)} tensors of multi-token prediction are left out, and their layers set to 0 in"
            " config.json: they have as many experts as the model had"
        )
    return found + [{"layer": None, "kind": "note", "target": None, "detail": note} for note in notes]
