"""A checkpoint whose arrays were trained: the same files' names, dtypes and configuration, other numbers.

What was not trained is copied byte for byte; a quantised original is written without its quantisation.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.decoder import Piece, end_pieces, join_expert_biases
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.quantization import as_stored
from jaxmoe.checkpoint.reader import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.tensor_file import DTYPES, Planned
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import answers, check_written, first_and_last, vector_answers
from jaxmoe.export.folder import complete_folder, side_files


def write_trained(
    model: StoredModel, parameters: Mapping[str, Any], changed: list[str], folder: Path
) -> dict[str, int]:
    """Write a checkpoint with other numbers into a folder, the index last.

    Args:
        model: the source.
        parameters: all arrays as `jaxmoe.model.forward` takes them.
        changed: names of those that differ from the source's, such as `layers.3.router.weight`.
        folder: exists, and becomes a complete checkpoint.

    Returns:
        `{"parameters": elements, "bytes": bytes}` of all tensors in the folder.

    Raises:
        JaxmoeError: numbers that the dtype of the files cannot hold, or what was written is not what was meant.
    """
    new = dict(_new_tensors(model, parameters, changed))
    source = model.checkpoint
    planned = source.copied()
    if isinstance(source, CompressedCheckpoint):
        # What was quantised and is trained is not any more.
        plain = {name for name in new if len(source.matrices[name].parts) > 1}
        planned = []
        for name, matrix in source.matrices.items():
            whole = [Planned(name, matrix.dtype, matrix.shape, matrix.read)]
            planned += whole if name in plain else as_stored(matrix)
        trained = [model.family.linear_module(name) for name in sorted(plain)]
        config = source.with_quantization(source.config, planned, trained)
    else:
        config = source.dense_config()
        for layer in source.layers:
            planned += source.dense_tensors(layer, partial(_experts, source, layer, parameters, changed))
    if unknown := sorted(new.keys() - {tensor.name for tensor in planned}):
        raise RuntimeError(f"trained tensors that the source does not have: {unknown}")
    planned = [_replaced(tensor, new[tensor.name]) if tensor.name in new else tensor for tensor in planned]
    beside = side_files(model.folder)
    stored = complete_folder(folder, layers=[], copied=planned, config=config, code={}, beside=beside)
    meant = {}
    for index in first_and_last(model.modules):
        own = parameters["layers"][index]
        vectors = {name: array for name, array in own.items() if name.startswith("auxiliary.")}
        meant[index] = {**answers(own["experts"]), **vector_answers(vectors)}
    check_written(folder, source, meant)
    return stored


def _replaced(tensor: Planned, array: np.ndarray) -> Planned:
    # A selection bias may be stored as a row.
    values = _stored(tensor.name, array, DTYPES[tensor.code]).reshape(tensor.shape)
    return Planned(tensor.name, tensor.dtype, tensor.shape, lambda: values)


def _experts(source: Checkpoint, layer, parameters: Mapping[str, Any], changed: list[str], projection: str):
    """Return a projection's dense matrices, trained or as they were."""
    if f"layers.{layer.index}.experts.terms.{projection}.0.weight" not in changed:
        return source.projection(layer, projection)
    trained = parameters["layers"][layer.index]["experts"].terms[projection][0].weight
    return _stored(f"layer {layer.index}, {projection}", trained, layer.dtype)


def _stored(name: str, array: Any, dtype: np.dtype) -> np.ndarray:
    """Return trained numbers in the dtype of the files, or raise if it cannot hold them."""
    values = np.asarray(array).astype(dtype)
    if not np.isfinite(values.astype(np.float32)).all():
        raise JaxmoeError(f"{name}: trained to numbers that {dtype} cannot hold; try a smaller --learning-rate")
    return values


def _new_tensors(model: StoredModel, parameters: Mapping[str, Any], changed: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield what the tensors that hold changed arrays are to hold, by their names on disk; dense experts excepted."""
    yield from _pieces(model, end_pieces(model.spec, model.family), parameters, changed)
    for index, own in enumerate(parameters["layers"]):
        begin = f"layers.{index}."
        names = [name.removeprefix(begin) for name in changed if name.startswith(begin)]
        yield from _pieces(model, model.pieces(index), own, names)
        if any(name.endswith(".bias") and name.startswith("experts.") for name in names):
            biases = {name: np.asarray(own[name], np.float32) for name in own if name.startswith("experts.")}
            yield from join_expert_biases(model.biases(index), biases, model.family).items()
        for linear in model.factored_maps(index):
            role = next(iter(linear.rows))
            if any(name.startswith(f"{role}.weight.terms.") for name in names):
                factors = own[f"{role}.weight"].tensors()
                yield from ((f"{linear.module}.{name}", array) for name, array in factors.items())
        if not isinstance(model.checkpoint, CompressedCheckpoint) or index not in model.modules:
            continue
        module = model.modules[index]
        if any(name.startswith("experts.terms.") for name in names):
            yield from ((f"{module}.{name}", array) for name, array in own["experts"].tensors().items())
        yield from ((f"{module}.{name}", own[name]) for name in names if name.startswith("auxiliary."))


def _pieces(model: StoredModel, pieces: Mapping[str, Piece], arrays: Mapping[str, Any], changed: list[str]):
    """Yield the tensors that hold some of these arrays, whole, where one holds several."""
    joined: dict[str, np.ndarray] = {}
    for name in changed:
        if name not in pieces:
            continue
        piece = pieces[name]
        if piece.tensor not in joined:
            joined[piece.tensor] = np.array(model.matrices[piece.tensor].read(), np.float32)
        whole = joined[piece.tensor]
        whole[piece.rows] = np.asarray(arrays[name], np.float32).reshape(whole[piece.rows].shape)
    yield from joined.items()
