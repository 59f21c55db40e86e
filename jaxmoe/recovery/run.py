"""A training run on disk: it can be stopped at any moment, and resumes to the same numbers.

    FOLDER/
      states/            the training's state after some steps, see `states`
      metrics.jsonl      a line for every step: its losses, norm of the gradient, rate

Which rows a step takes follows from the state's key and the number of the step alone, and metrics that are newer than
the state from which a run resumes are written again.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.records import read_bytes
from jaxmoe.errors import JaxmoeError
from jaxmoe.recovery.losses import Batch, Side
from jaxmoe.recovery.sharding import place_batch, place_parameters, shardings
from jaxmoe.recovery.states import States
from jaxmoe.recovery.trainable import merge, names, split
from jaxmoe.recovery.training import State, Training, batch_rows, begin, train_step
from jaxmoe.report.events import Damaged, OnEvent, TrainingStep, ignore
from jaxmoe.texts.packing import Rows

METRICS, STATES = "metrics.jsonl", "states"


def train(
    student: Side,
    teacher: Side | None,
    rows: Rows,
    chosen: list[str],
    training: Training,
    folder: Path,
    *,
    seed: int = 0,
    save_every: int = 50,
    keep: int = 2,
    mesh: Any = None,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Train, and return `trained` (arrays in float32 by name), `metrics` of all steps and `damaged` (see `Found`).

    Args:
        student: the model.
        teacher: what it is to be like, None where no loss needs it.
        rows: the text.
        chosen: names of the arrays to train, see `trainable.select`.
        training: how.
        folder: for the states and metrics; a run that was stopped resumes from them.
        seed: of the order of the data.
        save_every: steps after which the state is saved.
        keep: so many states remain.
        mesh: of devices, see `sharding`; None for one device.
        on_event: called after every step with its metrics.

    Raises:
        JaxmoeError: a loss or gradient is not finite (the last state that was saved is kept), or what an earlier run
            saved cannot be used.
    """
    trained = split(student.parameters, chosen)
    # Nothing is held twice: what is trained lives in the state alone.
    frozen = merge(student.parameters, dict.fromkeys(chosen, jnp.zeros(0)))
    taught = None if teacher is None else teacher.parameters
    if mesh is not None:
        trained = {name: jax.device_put(x, shardings(name, x, student.spec, mesh)) for name, x in trained.items()}
        frozen = place_parameters(frozen, student.spec, mesh)
        taught = None if teacher is None else place_parameters(taught, teacher.spec, mesh)
    state = begin(trained, training, seed)
    specs = (student.spec, None if teacher is None else teacher.spec)
    step = jax.jit(partial(train_step, specs=specs, training=training), donate_argnums=0)
    states = States(folder / STATES, keep)
    metrics = _metrics(folder / METRICS, {"loss", *training.weights})
    found = states.newest({name: _abstract(array) for name, array in _flat(state).items()}, len(metrics))
    if found is not None:
        state = jax.tree.unflatten(jax.tree.structure(state), [found.arrays[name] for name in _flat(state)])
    damaged = () if found is None else found.damaged
    for reason in damaged:
        on_event(Damaged(reason=reason, instead=f"going on from step {int(state.step)}"))
    del metrics[int(state.step) :]
    # Metrics that are newer than the state are written again.
    write_bytes(folder / METRICS, "".join(_line(own) for own in metrics).encode())
    with (folder / METRICS).open("a", encoding="utf-8") as log:
        for number in range(int(state.step), training.steps):
            batch = Batch(*(part[batch_rows(state.key, number, training.rows, len(rows.ids))] for part in rows))
            if mesh is not None:
                batch = place_batch(batch, mesh, training.accumulate)
            state, measured = step(state, frozen, taught, batch)
            line = {"step": number + 1, **{name: float(value) for name, value in measured.items()}}
            _check_finite(line, states.steps())
            log.write(_line(line))
            log.flush()
            metrics.append(line)
            if (number + 1) % save_every == 0 or number + 1 == training.steps:
                states.save(number + 1, _flat(state))
            on_event(TrainingStep(done=number + 1, total=training.steps, metrics=line))
    arrays = {name: np.asarray(array) for name, array in state.trained.items()}
    return {"trained": arrays, "metrics": metrics, "damaged": damaged}


def _flat(state: State) -> dict[str, Any]:
    return dict(zip(names(state), jax.tree.leaves(state), strict=True))


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _line(metrics: Mapping[str, float]) -> str:
    return json.dumps(metrics) + "\n"


def _metrics(path: Path, wanted: set[str]) -> list[dict[str, float]]:
    """Return the metrics of the steps from the first to the last before a line that does not read."""
    found: list[dict[str, float]] = []
    if path.is_symlink() or not path.exists():
        return found
    for text in read_bytes(path).splitlines():
        try:
            line = msgspec.json.decode(text, type=dict[str, int | float])
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
        if line.get("step") != len(found) + 1 or not wanted <= line.keys():
            break
        found.append(line)
    return found


def _check_finite(line: Mapping[str, float], saved: list[int]) -> None:
    bad = [name for name, value in line.items() if not np.isfinite(value)]
    if bad:
        kept = f"the state of step {saved[-1]} is kept" if saved else "no state was saved yet"
        raise JaxmoeError(
            f"step {line['step']}: {' and '.join(bad)} not finite, training diverged; {kept}: try a smaller"
            " --learning-rate or --clip in another output folder"
        )
