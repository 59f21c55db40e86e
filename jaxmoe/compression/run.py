"""Compress a checkpoint: one layer at a time, each finished layer kept, the output under its name only when complete.

Nothing ever holds the whole model: a layer is read target by target, fitted, measured, written and journaled before the
next one starts. A run that is killed goes on where it stopped and ends with the same bytes; runs over disjoint layers
share one folder and complete it together.
"""

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import experts_modules, factored_config
from jaxmoe.checkpoint.families import architecture
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import Planned, write_tensors
from jaxmoe.checkpoint.workspace import Workspace, fingerprint, finished, layer_file
from jaxmoe.compression.evidence import LayerSums, Sums, evidence, moments
from jaxmoe.compression.evidence import outcomes as weighing_outcomes
from jaxmoe.compression.plan import Plan, PlannedLayer, describe
from jaxmoe.compression.svd_fallback import behind_svd, svd_instead
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.card import model_card
from jaxmoe.export.checking import Answers, answers, check_written, dense_answers, first_and_last
from jaxmoe.export.folder import complete_folder, side_files, write_report
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import TARGETS, CompressedLayer, Count, Dense
from jaxmoe.factors.error import relative_errors
from jaxmoe.methods import Outcome
from jaxmoe.methods.method import REORDERED, count
from jaxmoe.report.events import Complete, LayerDone, OnEvent, Waiting, ignore
from jaxmoe.report.records import Projection

EXPORTS = ("factored", "dense")
Amend = Callable[[dict[str, Any]], dict[str, Any]]


def unchanged(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report as it is."""
    return report


def compress(
    checkpoint: Checkpoint,
    output: str | Path,
    plan: Plan,
    *,
    export: str = "factored",
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    command: str = "",
    statistics: Sums | None = None,
    amend: Amend = unchanged,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Carry out a plan and write the compressed checkpoint.

    Args:
        checkpoint: the source, which is never written to.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it.
        plan: what to store, from `make_plan`.
        export: "factored" (smaller on disk, runs through remote code) or "dense" (original architecture and size).
        seed: of everything random.
        layers: `(first, end)`: work on the decoder layers first <= index < end only; the run that finishes the last
            layer publishes.
        resume: whether to go on with an unfinished run; False starts over.
        command: the command line, for the report.
        statistics: calibrated statistics, asked for one layer at a time; the errors are then weighted by what the
            experts see, see `weighing`. None weighs all directions alike.
        amend: has the last word on the report of a complete run.
        on_event: called with a small record after every step.

    Returns:
        The report, also written to `report.json`; its `complete` is False while layers of other runs are missing.

    Raises:
        JaxmoeError: the output exists, the folder belongs to another run, a weight is not finite, or the disk is full.
    """
    check_export(checkpoint, export)
    output = output_folder(output, [checkpoint.folder, *reads(statistics)])
    begun = time.perf_counter()
    check_statistics(plan, statistics)
    run = _run_record(checkpoint, plan, export, seed, statistics)
    if (done := finished(output, run)) is not None:
        on_event(Complete(output=str(output)))
        return done
    mine = _selected(plan, layers)
    workspace = Workspace(output, run)
    with workspace.opened([planned.source.index for planned in mine], resume=resume):
        keys = {planned.source.index: _layer_key(run, planned) for planned in plan.layers}
        for position, planned in enumerate(mine):
            index = planned.source.index
            entry = workspace.entry(index, keys[index])
            resumed = entry is not None
            if entry is None:
                entry = _compress_layer(checkpoint, plan, planned, export, seed, statistics, workspace, keys[index])
            on_event(layer_done(entry, position + 1, len(mine), resumed=resumed))
        entries = {index: workspace.entry(index, key) for index, key in keys.items()}
        report = _report(checkpoint, output, plan, export, seed, command, entries, time.perf_counter() - begun)
        report["calibration"] = None if statistics is None else statistics.describe()
        if not report["complete"]:
            # Another run may have finished the last layer and published while this one was still counting.
            if (done := finished(output, run)) is not None:
                return done
            on_event(Waiting(layers=report["missing_layers"]))
            return report
        with workspace.exclusive("publish"):
            return _publish(checkpoint, plan, export, workspace, entries, amend({**report, "run": run}), on_event)


def layer_done(entry: Mapping[str, Any], done: int, total: int, *, resumed: bool) -> LayerDone:
    """Return the event for a layer whose entry in the journal is written."""
    projections = {name: Projection.read(own) for name, own in entry["projections"].items()}
    told = {"layer": entry["layer"], "seconds": entry["seconds"], "projections": projections}
    return LayerDone(done=done, total=total, resumed=resumed, **told)


def check_export(checkpoint: Checkpoint, export: str) -> None:
    """Raise if a checkpoint cannot be written in a form, so that nothing is fitted in vain."""
    if export not in EXPORTS:
        raise JaxmoeError(f"export {export!r}: give {' or '.join(EXPORTS)}")
    if export == "factored":
        architecture(checkpoint.model_type)
        biases = checkpoint.family is not None and checkpoint.family.expert_biases
        if wrong := [layer.index for layer in checkpoint.layers if bool(layer.biases) is not biases]:
            there = (
                "lack their biases" if biases else "have biases, for which their module in transformers has no place"
            )
            raise JaxmoeError(
                f"{checkpoint.folder}: the experts of layers {', '.join(map(str, wrong))} {there}, so that their"
                " factors could not be loaded: mend the checkpoint, or give --export dense"
            )


def reads(statistics: Sums | None) -> tuple[Path, ...]:
    """Return the folders that statistics come from."""
    return () if statistics is None else statistics.reads


def check_statistics(plan: Any, statistics: Sums | None) -> None:
    """Raise if the method of a plan needs what the statistics did not keep."""
    keeps = frozenset() if statistics is None else statistics.keeps
    if missing := {name: mend for name, mend in plan.method.requires(plan.settings).items() if name not in keeps}:
        mends = "; ".join(dict.fromkeys(missing.values()))
        have = "there are no statistics" if statistics is None else f"the statistics lack {', '.join(missing)}"
        raise JaxmoeError(f"{plan.method.name} with these settings cannot run: {have}; {mends}")


def _run_record(checkpoint: Checkpoint, plan: Plan, export: str, seed: int, statistics) -> dict[str, Any]:
    """Return everything that decides the bytes of the result."""
    return {
        "source": checkpoint.fingerprint(),
        "method": plan.method.name,
        "settings": asdict(plan.settings),
        "requested": plan.requested,
        "allocation": plan.allocation,
        "terms": fingerprint({str(p.source.index): p.template.spec() for p in plan.layers}),
        "statistics": None if statistics is None else statistics.fingerprint(),
        "export": export,
        "seed": seed,
        **where(),
    }


def where() -> dict[str, Any]:
    """Return what beside the input decides the bytes of a result: versions and platform."""
    return {
        "versions": {"jaxmoe": jaxmoe.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "platform": f"{jax.default_backend()} {platform.machine()}",
    }


def _layer_key(run: Mapping[str, Any], planned: PlannedLayer) -> str:
    return fingerprint({"run": run, "layer": planned.source.index, "terms": planned.template.spec()})


def _selected(plan: Plan, layers: tuple[int, int] | None) -> list[PlannedLayer]:
    if layers is None:
        return list(plan.layers)
    first, end = layers
    chosen = [planned for planned in plan.layers if first <= planned.source.index < end]
    if not chosen:
        known = [planned.source.index for planned in plan.layers]
        raise JaxmoeError(f"layers {first}:{end} hold no routed experts: they lie in layers {known[0]} to {known[-1]}")
    return chosen


def _compress_layer(checkpoint, plan, planned, export, seed, statistics, workspace, key) -> dict[str, Any]:
    start = time.perf_counter()
    source = planned.source
    sums = None if statistics is None else statistics.layer(source.index)
    layer, outcomes, histories = fit_layer(checkpoint, plan, planned, seed, sums)
    touched = {projection for target in planned.touched for projection in TARGETS[target]}
    projections = {
        projection: {**record, **measured_errors(checkpoint, source, layer, projection, sums, projection in touched)}
        for projection, record in describe(layer).items()
    }
    if export == "dense":
        tensors = checkpoint.dense_tensors(source, partial(_materialized, layer))
    else:
        tensors = [
            Planned(f"{source.module}.{name}", array.dtype, array.shape, partial(np.asarray, array))
            for name, array in layer.tensors().items()
        ]
    if statistics is not None:
        # Before the journal says that the layer is done: a run that goes on finds everything behind it.
        statistics.follow(source.index, layer)
    checksum = write_tensors(workspace.folder / layer_file(source.index), tensors)
    stored = layer.count()
    checked = source.index in first_and_last(own.source.index for own in plan.layers)
    record = {
        "layer": source.index,
        "spec": layer.spec(),
        "stored": stored._asdict(),
        "projections": projections,
        "outcomes": [{"layer": source.index, **outcome._asdict()} for outcome in outcomes],
        "losses": histories,
        **({"answers": _meant(layer, export)} if checked else {}),
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }
    return workspace.finish(source.index, key, checksum, record)


def measured_errors(
    checkpoint: Checkpoint,
    source: MoELayer,
    layer: CompressedLayer,
    projection: str,
    sums: LayerSums | None,
    touched: bool = True,
) -> dict[str, Any]:
    """Return what a report says of one projection's errors; those that were not touched are known to be zero."""
    errors = weighted = np.zeros(source.shape.experts)
    # As shrunk, but without the floor: what the calibration tokens lose.
    moment = moments(sums, projection, floor=0.0)
    if touched:
        weight = checkpoint.projection(source, projection)
        errors = relative_errors(weight, layer, projection)
        weighted = relative_errors(weight, layer, projection, moment=moment)
    return {
        "error": float(errors.mean()),
        "worst_error": float(errors.max()),
        "worst_expert": int(errors.argmax()),
        "weighted_error": None if moment is None else float(weighted.mean()),
    }


def fit_layer(
    checkpoint: Checkpoint, plan: Plan, planned: PlannedLayer, seed: int, sums: LayerSums | None
) -> tuple[CompressedLayer, list[Outcome], dict[str, list[float]]]:
    """Fit one layer and return it with what happened and the thinned history of the losses."""
    source, template = planned.source, planned.template
    key = jax.random.fold_in(jax.random.key(seed), source.index)
    terms, outcomes, histories = {}, weighing_outcomes(sums, planned.touched, source.shape), {}

    def read(target: str) -> jax.Array:
        return jax.device_put(checkpoint.target(source, target), may_alias=True)

    for position, (target, abstract) in enumerate(template.terms.items()):
        if target not in planned.touched:
            terms[target] = (Dense(weight=checkpoint.projection(source, target)),)
            continue
        weight, known = read(target), evidence(sums, target, read, gated=source.shape.gated)
        fit = plan.method.fit(weight, abstract, plan.settings, evidence=known, key=jax.random.fold_in(key, position))
        for array in jax.tree_util.tree_leaves(fit.terms):
            if not bool(jnp.isfinite(array.astype(jnp.float32)).all()):
                raise JaxmoeError(
                    f"layer {source.index}, {target}: {plan.method.name} gave factors that {source.dtype} cannot hold "
                    "(NaN or overflow); try another setting or seed"
                )
        if count(fit.terms).bytes > count(abstract).bytes:
            raise RuntimeError(f"{target}: {count(fit.terms)} of {count(abstract)}: a defect of {plan.method.name}")
        terms[target] = fit.terms
        outcomes += [outcome._replace(target=target) for outcome in fit.outcomes]
        if all(outcome.kind != REORDERED for outcome in fit.outcomes):
            behind = behind_svd(weight, fit.terms, known.moment, target)
            yields = behind is not None and plan.method.falls_back_to_svd and plan.settings.setting == "improved"
            if behind is not None and yields and (closer := svd_instead(weight, fit.terms, known)) is not None:
                terms[target] = closer
                behind = behind._replace(kind="svd_instead", detail=f"{behind.detail}; it is stored instead")
            outcomes += [] if behind is None else [behind]
        if len(fit.losses):
            thin = max(1, len(fit.losses) // 50)
            histories[target] = [float(x) for x in (*fit.losses[::thin], fit.losses[-1])]
    return CompressedLayer(terms=terms, sizes=source.shape).check(), outcomes, histories


def _meant(layer: CompressedLayer, export: str) -> Answers:
    """Return what a layer is to answer as exported; a sparse term that masks every batch anew is none when dense."""
    return dense_answers(layer.materialize, layer.sizes) if export == "dense" else answers(layer)


def _materialized(layer: CompressedLayer, projection: str) -> np.ndarray:
    return np.asarray(layer.materialize(projection))


def _report(checkpoint, output, plan, export, seed, command, entries, seconds) -> dict[str, Any]:
    done = {index: entry for index, entry in entries.items() if entry is not None}
    missing = [index for index, entry in entries.items() if entry is None]
    outcomes = [outcome for entry in done.values() for outcome in entry["outcomes"]]
    if export == "dense":
        detail = "the files hold the materialised matrices: nothing is saved on disk, the ratios are the factors'"
        outcomes.append({"layer": None, "kind": "dense_export", "target": None, "detail": detail})
    outcomes += [{"layer": None, "kind": "note", "target": None, "detail": note} for note in checkpoint.notes]
    achieved = plan.with_stored({index: Count(**entry["stored"]) for index, entry in done.items()})
    return {
        "jaxmoe": jaxmoe.__version__,
        "source": str(checkpoint.folder),
        "output": str(output),
        "command": command,
        "seed": seed,
        "export": export,
        **achieved.summary(),
        "layers": [
            {name: entry[name] for name in ("layer", "projections", "seconds", "losses")}
            for _, entry in sorted(done.items())
        ],
        "outcomes": outcomes,
        "predicted_peak_bytes": plan.peak_bytes,
        "peak_bytes": max([peak_bytes(), *(entry["peak_bytes"] for entry in done.values())]),
        "layer_seconds": sum(entry["seconds"] for entry in done.values()),
        "seconds": seconds,
        "complete": not missing,
        "missing_layers": missing,
    }


def _publish(checkpoint, plan, export, workspace, entries, report, on_event) -> dict[str, Any]:
    if export == "dense":
        config, code, size = checkpoint.dense_config(), {}, None
    else:
        modules = {
            planned.source.module: (planned.source.shape, entries[planned.source.index]["spec"])
            for planned in plan.layers
        }
        config = factored_config(checkpoint.dense_config(), experts_modules(modules, checkpoint.layouts()))
        code, size = remote_code(config), report["bytes"]["after"]
    layers = [planned.source.index for planned in plan.layers]
    meant = {index: entry["answers"] for index, entry in entries.items() if "answers" in entry}
    return publish(checkpoint, workspace, report, layers, config, code, size, meant, on_event)


def publish(
    checkpoint: Checkpoint | CompressedCheckpoint,
    workspace: Workspace,
    report: Mapping[str, Any],
    layers: Iterable[int],
    config: Mapping[str, Any],
    code: Mapping[str, str],
    size: int | None,
    meant: Mapping[int, Answers],
    on_event: OnEvent = ignore,
    *,
    copied: Sequence[Planned] | None = None,
) -> dict[str, Any]:
    """Complete a folder whose layers are all written, with its report and model card, and give it its name.

    Args:
        checkpoint: the source, of which everything but the experts is copied.
        workspace: where the layers' files lie.
        report: of the run, with the record that the workspace was opened with under `run`.
        layers: indices of the layers.
        config: what `config.json` will say.
        code: the Python files that travel along.
        size: bytes that all tensors take together, None if that was not counted before.
        meant: what the experts of some layers are to answer, see `export.checking`.
        on_event: called when it is done.
        copied: what the layers' files lack; None for everything of the source but the experts.

    Returns:
        The report, with what the files hold under `stored`.

    Raises:
        JaxmoeError: what was written cannot be opened again, or does not hold what was meant.
    """
    stored = complete_folder(
        workspace.folder,
        layers=[workspace.folder / layer_file(index) for index in layers],
        copied=checkpoint.copied() if copied is None else copied,
        config=config,
        code=code,
        beside=side_files(checkpoint.folder),
    )
    if size is not None and stored["bytes"] != size:
        raise RuntimeError(f"the files hold {stored}, the terms counted {size}: a defect of jaxmoe")
    check_written(workspace.folder, checkpoint, meant)
    report = write_report(workspace.folder, {**report, "stored": stored})
    write_bytes(workspace.folder / "README.md", model_card(report).encode())
    workspace.publish()
    on_event(Complete(output=str(workspace.output)))
    return report


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far, file pages included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
