"""A training run on disk: it can be stopped at any moment, and goes on to the same numbers.

    FOLDER/
      states/<step>      Orbax checkpoints of the training's state, the last few
      metrics.jsonl      a line for every step: its losses, norm of the gradient, rate

Which rows a step takes follows from the state's key and the number of the step alone, and metrics that are newer than
the state a run goes on from are written again.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.errors import JaxmoeError
from jaxmoe.recovery.losses import Batch, Side
from jaxmoe.recovery.sharding import place_batch, place_parameters, shardings
from jaxmoe.recovery.trainable import merge, names, split
from jaxmoe.recovery.training import State, Training, batch_rows, begin, train_step
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
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Train, and return the trained arrays in float32 by name.

    Args:
        student: the model.
        teacher: what it is to be like, None where no loss needs it.
        rows: the text.
        chosen: names of the arrays to train, see `trainable.select`.
        training: how.
        folder: for the states and metrics; a run that was stopped goes on from them.
        seed: of the order of the data.
        save_every: steps after which the state is saved.
        keep: so many states remain.
        mesh: of devices, see `sharding`; None for one device.
        on_event: called after every step with its metrics.

    Raises:
        JaxmoeError: a loss or gradient is not finite; the last state that was saved is kept.
    """
    from orbax.checkpoint import v1 as ocp

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
    # Any: Orbax declares another class of the same policies.
    policy: Any = ocp.training.preservation_policies.LatestN(keep)
    place = str((folder / STATES).absolute())
    with ocp.training.Checkpointer(place, preservation_policy=policy, cleanup_tmp_directories=True) as states:
        if states.latest is not None:
            state = _restored(states.latest.step, states, state)
        metrics = _metrics(folder / METRICS, int(state.step))
        with (folder / METRICS).open("a", encoding="utf-8") as log:
            for number in range(int(state.step), training.steps):
                batch = Batch(*(part[batch_rows(state.key, number, training.rows, len(rows.ids))] for part in rows))
                if mesh is not None:
                    batch = place_batch(batch, mesh, training.accumulate)
                state, found = step(state, frozen, taught, batch)
                line = {"step": number + 1, **{name: float(value) for name, value in found.items()}}
                _check_finite(line, states.latest)
                log.write(json.dumps(line) + "\n")
                log.flush()
                metrics.append(line)
                if (number + 1) % save_every == 0 or number + 1 == training.steps:
                    states.save(number + 1, _flat(state), force=True)
                on_event({"event": "step", "done": number + 1, "total": training.steps, **line})
    return {"trained": {name: np.asarray(array) for name, array in state.trained.items()}, "metrics": metrics}


def _flat(state: State) -> dict[str, Any]:
    return dict(zip(names(state), jax.tree.leaves(state), strict=True))


def _restored(step: int, states, state: State) -> State:
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _flat(state).items()}
    found = states.load(step, abstract)
    return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in abstract])


def _metrics(path: Path, done: int) -> list[dict[str, Any]]:
    """Return the metrics of the steps that the state knows, and forget later ones."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if path.exists() else []
    write_bytes(path, "".join(lines).encode())
    return [json.loads(line) for line in lines]


def _check_finite(line: Mapping[str, float], latest) -> None:
    bad = [name for name, value in line.items() if not np.isfinite(value)]
    if bad:
        kept = "no state was saved yet" if latest is None else f"the state of step {latest.step} is kept"
        raise JaxmoeError(
            f"step {line['step']}: {' and '.join(bad)} not finite, training diverged; {kept}: try a smaller"
            " --learning-rate or --clip in another output folder"
        )
