"""Open a finished folder as its user will, before it gets its name.

Names, shapes and dtypes must be those that a loader of the architecture expects: the folder is opened again as a
checkpoint, and as a model where jaxmoe could run the source; no tensor of the experts may be left that belongs to
nothing, and none may be missing. Of the first and the last layer, numbers are asked for, too: what the experts as
written make of random inputs, against what was meant.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.checkpoint import files
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored, layer_index
from jaxmoe.checkpoint.families import UNKNOWN
from jaxmoe.checkpoint.names import is_mtp
from jaxmoe.checkpoint.reader import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.tensor_file import DTYPES, listing
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.factors import CompressedLayer, CompressedLinear, Dense, LayerShape, LinearShape

Sortable = TypeVar("Sortable", int, str)

Answers = Mapping[str, list[float]]
"""What matrices of a layer make of random inputs: numbers by projection of the experts, see `answers`, or by tensor."""

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
    """Return the products of vectors that compensate for experts, `[expert, size]`, with a random one, by name.

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


def linear_answers(linear: CompressedLinear) -> list[float]:
    """Return u_r^T W v_r of a linear map for random u_r and v_r, `ROWS` numbers.

    Example:
        >>> len(linear_answers(CompressedLinear(terms=(Dense(weight=jnp.ones((1, 3, 2))),), sizes=LinearShape(3, 2))))
        4
    """
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((ROWS, size), np.float32) for size in linear.sizes)
    with jax.default_matmul_precision("float32"):
        given = linear.apply(jnp.asarray(right))
    return (np.asarray(given, np.float64) * left).sum(-1).tolist()


def dense_linear_answers(matrix) -> list[float]:
    """Return the answers of a dense linear map, `[out, in]`."""
    weight = jnp.asarray(matrix)[None]
    return linear_answers(CompressedLinear(terms=(Dense(weight=weight),), sizes=LinearShape(*matrix.shape)))


def digest(array: np.ndarray) -> str:
    """Return a SHA-256 of an array's bytes.

    Example:
        >>> digest(np.zeros(3, "float32"))[:8]
        '15ec7bf0'
    """
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def check_written(
    folder: Path,
    source: Checkpoint | CompressedCheckpoint,
    meant: Mapping[int, Answers],
    exact: Mapping[int, Mapping[str, str]] = {},
) -> None:
    """Raise unless a folder can be used as it is.

    Args:
        folder: complete.
        source: what it was made of.
        meant: what the experts of some layers are to answer, by the layers' indices, and under the names of their
            tensors on disk the layers' other linear maps that were replaced.
        exact: digests of what some layers' projections are to hold to the bit, read as dense matrices.

    Raises:
        StorageError: it cannot be opened, lacks tensors, has some that belong to nothing, or holds other numbers than
            were meant; all offenders are named.
    """
    try:
        opened = _open(folder, source)
        problems = _names(opened) if isinstance(opened, CompressedCheckpoint) else []
        problems = problems or [*_numbers(opened, meant), *_bits(opened, exact)]
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
    family = opened.family
    wanted: dict[str, tuple[int, ...]] = {}
    if family is not None and family.expert_biases:
        for module, record in opened.experts.items():
            experts, hidden, intermediate, _ = record.shape
            wanted[f"{module}.gate_up_proj_bias"] = (experts, 2 * intermediate)
            wanted[f"{module}.down_proj_bias"] = (experts, hidden)
    held = {name: tuple(matrix.shape) for name, matrix in opened.beside().items()}
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
    for module, record in opened.linears.items():
        strays = {record.layout.name, *(name for name in held if name.startswith(f"{module}."))} & held.keys()
        problems += [f"{n} belongs to a map that is stored as factors" for n in strays - {f"{module}.bias"}]
    return problems


def _numbers(opened: Checkpoint | CompressedCheckpoint, meant: Mapping[int, Answers]) -> list[str]:
    """Return where the experts and linear maps on disk answer otherwise than was meant."""
    problems = []
    for index, expected in meant.items():
        found, dtype = _answers(opened, index, expected)
        for name, numbers in expected.items():
            one, other = np.asarray(numbers), np.asarray(found.get(name, []))
            bound = max(LEAST, ROUNDINGS * float(ml_dtypes.finfo(dtype).eps)) * np.sqrt(np.mean(one**2))
            if one.shape != other.shape or not (np.abs(one - other) <= bound).all():
                who = name if name.endswith(".weight") else f"layer {index}, {name}: the experts"
                problems.append(f"{who} do not answer random inputs as they should")
    return problems


def _bits(opened: Checkpoint | CompressedCheckpoint, exact: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Return which projections do not hold what was meant to the bit."""
    if not isinstance(opened, Checkpoint):
        return []
    return [
        f"layer {layer.index}, {name}: the experts do not hold the numbers that were fitted"
        for layer in opened.layers
        for name, expected in exact.get(layer.index, {}).items()
        if digest(opened.projection(layer, name)) != expected
    ]


def _answers(opened: Checkpoint | CompressedCheckpoint, index: int, names: Iterable[str]) -> tuple[Answers, np.dtype]:
    """Return the answers of a layer as it stands in the files, and the coarsest dtype of its numbers.

    Args:
        opened: the folder.
        index: of the layer.
        names: of what is asked for; of these only linear maps have to be named, by their tensors.
    """
    found: dict[str, list[float]] = {}
    dtypes: list[np.dtype] = []
    if isinstance(opened, CompressedCheckpoint):
        for module in (name for name in opened.modules if layer_index(name) == index):
            layer = opened.layer(module)
            found |= {**answers(layer), **vector_answers(opened.auxiliary(module))}
            dtypes += _floats(layer)
        for module, record in opened.linears.items():
            if record.layout.name in names:
                linear = opened.linear(module)
                found[record.layout.name] = linear_answers(linear)
                dtypes += _floats(linear)
    else:
        for own in (layer for layer in opened.layers if layer.index == index):
            found |= dense_answers(lambda name, own=own: opened.projection(own, name), own.shape)
            dtypes.append(own.dtype)
        for name in names:
            if (matrix := opened.matrices.get(name)) is not None:
                found[name] = dense_linear_answers(matrix.read())
                dtypes.append(DTYPES[matrix.dtype])
    return found, max(dtypes, key=lambda dtype: ml_dtypes.finfo(dtype).eps)


def _floats(stored: CompressedLayer | CompressedLinear) -> list[np.dtype]:
    return [x.dtype for x in stored.tensors().values() if jnp.issubdtype(x.dtype, jnp.floating)]
