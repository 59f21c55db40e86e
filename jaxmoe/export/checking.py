"""Open a finished folder as its user will, before it gets its name.

Names, shapes and dtypes must be those that a loader of the architecture expects: the folder is opened again as a
checkpoint, and as a model where jaxmoe could run the source; no tensor of the experts may be left that belongs to
nothing, and none may be missing. Of the first and the last layer, numbers are asked for, too: what the experts as
written make of random inputs, against what was meant.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.checkpoint import files
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored, layer_index
from jaxmoe.checkpoint.families import UNKNOWN, find_family
from jaxmoe.checkpoint.names import is_mtp
from jaxmoe.checkpoint.reader import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape

Sortable = TypeVar("Sortable", int, str)

Answers = Mapping[str, list[float]]
"""What the experts of a layer make of random inputs: numbers by projection, see `answers`."""

ROWS = 4
"""Random inputs of every expert."""

ROUNDINGS = 8
"""Numbers that were rounded on the way may differ by so many of their dtype's precisions."""

LEAST = 1e-3
"""What float32 sums in another order may differ by, and more; a mistake in a layout makes differences of about one."""


def first_and_last(things: Iterable[Sortable]) -> set[Sortable]:
    """Return what is checked of many things, such as the indices of all layers.

    Example:
        >>> sorted(first_and_last([3, 4, 5, 6]))
        [3, 6]
    """
    ordered = sorted(things)
    return {*ordered[:1], *ordered[-1:]}


def answers(layer: CompressedLayer) -> Answers:
    """Return u_r^T W_e v_r for random u_r and v_r, `ROWS` numbers of each expert, by projection.

    Args:
        layer: the experts, of all projections or of some.

    Example:
        >>> shape = LayerShape(experts=2, hidden=3, intermediate=2)
        >>> layer = CompressedLayer(terms={"down": (Dense(weight=jnp.ones((2, 3, 2))),)}, sizes=shape)
        >>> {name: len(numbers) for name, numbers in answers(layer).items()}
        {'down': 8}
    """
    found = {}
    for name in layer.sizes.projections:
        experts, out, in_ = layer.sizes.of(name)
        random = np.random.default_rng(0)
        left, right = (random.standard_normal((ROWS, size), np.float32) for size in (out, in_))
        rows = jnp.asarray(np.broadcast_to(right, (experts, ROWS, in_)))
        with jax.default_matmul_precision("float32"):
            given = layer.sums(rows, (name,)).get(name)
        if given is not None:
            found[name] = (np.asarray(given, np.float64) * left).sum(-1).ravel().tolist()
    return found


def vector_answers(vectors: Mapping[str, Any]) -> Answers:
    """Return the products of vectors that stand in for experts, `[expert, size]`, with a random one, by name.

    Example:
        >>> len(vector_answers({"auxiliary.up": np.ones((3, 5))})["auxiliary.up"])
        3
    """
    return {
        name: (np.asarray(array, np.float64) @ np.random.default_rng(0).standard_normal(array.shape[-1])).tolist()
        for name, array in vectors.items()
    }


def dense_answers(read, shape: LayerShape) -> Answers:
    """Return the answers of dense experts, one projection at a time; `read` returns one, `[expert, out, in]`."""
    found = {}
    for name in shape.projections:
        weight = jnp.asarray(read(name))
        found |= answers(CompressedLayer(terms={name: (Dense(weight=weight),)}, sizes=shape))
    return found


def check_written(folder: Path, source: Checkpoint | CompressedCheckpoint, meant: Mapping[int, Answers]) -> None:
    """Raise unless a folder can be used as it is.

    Args:
        folder: complete.
        source: what it was made of.
        meant: what the experts of some layers are to answer, by the layers' indices.

    Raises:
        StorageError: it cannot be opened, lacks tensors, has some that belong to nothing, or holds other numbers than
            were meant; all offenders are named.
    """
    try:
        opened = _open(folder, source)
        problems = _names(opened) if isinstance(opened, CompressedCheckpoint) else []
        problems = problems or _numbers(opened, meant)
    except JaxmoeError as error:
        problems = [str(error)]
    if problems:
        # Of what was asked for this says nothing: `compare` must not take it for a result.
        raise StorageError(
            f"{folder} was written and does not hold what was meant, so that it is not published: {listing(problems)}."
            " That is a defect of jaxmoe or of the disk: run it once more, and report it if it happens again"
        )


def _open(folder: Path, source: Checkpoint | CompressedCheckpoint) -> Checkpoint | CompressedCheckpoint:
    """Open the folder, as a model if the source is one that jaxmoe runs."""
    ignored = source.ignored if isinstance(source, Checkpoint) else ()
    try:
        StoredModel(source.folder, ignore_config_keys=ignored)
    except JaxmoeError:
        if is_factored(files.read_config(folder)):
            return CompressedCheckpoint.open(folder)
        return Checkpoint.open(folder, ignore_config_keys=ignored)
    return StoredModel(folder, ignore_config_keys=ignored).checkpoint


def _names(opened: CompressedCheckpoint) -> list[str]:
    """Return which tensors of factored experts are missing or belong to nothing."""
    family = find_family(opened.original)
    wanted: dict[str, tuple[int, ...]] = {}
    if family is not None and family.expert_biases:
        for module, record in opened.experts.items():
            experts, hidden, intermediate, _ = record.shape
            wanted[f"{module}.gate_up_proj_bias"] = (experts, 2 * intermediate)
            wanted[f"{module}.down_proj_bias"] = (experts, hidden)
    held = {planned.name: tuple(planned.shape) for planned in opened.copied()}
    problems = [
        f"{name} is missing" if name not in held else f"{name} is {list(held[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if held.get(name) != shape
    ]
    layers = {layer_index(module) for module in opened.modules}
    grammar = (family or UNKNOWN).grammar
    for name, shape in held.items():
        parsed = None if is_mtp(name) else grammar.classify(name, len(shape))
        inside = name.startswith(tuple(f"{module}." for module in opened.modules))
        if name not in wanted and (inside or (parsed is not None and parsed.layer in layers)):
            problems.append(f"{name} belongs to experts that are stored as factors")
    return problems


def _numbers(opened: Checkpoint | CompressedCheckpoint, meant: Mapping[int, Answers]) -> list[str]:
    """Return where the experts on disk answer otherwise than was meant."""
    problems = []
    for index, expected in meant.items():
        found, dtype = _answers(opened, index)
        for name, numbers in expected.items():
            one, other = np.asarray(numbers), np.asarray(found.get(name, []))
            bound = max(LEAST, ROUNDINGS * float(ml_dtypes.finfo(dtype).eps)) * np.sqrt(np.mean(one**2))
            if one.shape != other.shape or not (np.abs(one - other) <= bound).all():
                problems.append(f"layer {index}, {name}: the experts do not answer random inputs as they should")
    return problems


def _answers(opened: Checkpoint | CompressedCheckpoint, index: int) -> tuple[Answers, np.dtype]:
    """Return the answers of a layer as it stands in the files, and the coarsest dtype of its numbers."""
    if isinstance(opened, CompressedCheckpoint):
        (module,) = (name for name in opened.modules if layer_index(name) == index)
        layer = opened.layer(module)
        floats = [x.dtype for x in layer.tensors().values() if jnp.issubdtype(x.dtype, jnp.floating)]
        found = {**answers(layer), **vector_answers(opened.auxiliary(module))}
        return found, max(floats, key=lambda dtype: ml_dtypes.finfo(dtype).eps)
    (own,) = (layer for layer in opened.layers if layer.index == index)
    return dense_answers(lambda name: opened.projection(own, name), own.shape), own.dtype
