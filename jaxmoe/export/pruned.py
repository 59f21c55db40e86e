"""The slim checkpoint: the original architecture with fewer experts or smaller ones.

What remains of the experts lies under their old names, those of single experts counted anew. The router loses the rows
of the experts that are gone, with its biases. `config.json` says the new number under every key that said the old one.
Layers of multi-token prediction are left out and their count set to 0: they have experts of their own, and the config
has one number for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.decoder import check_fit, end_pieces, layer_pieces, layer_prefix
from jaxmoe.checkpoint.families import UNKNOWN, decoder_config, decoder_spec, lookup, runs
from jaxmoe.checkpoint.tensor_file import Planned
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.factors.slicing import slice_channels

_MTP_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
    "mtp_transformer_layers",
)

Kept = Callable[[], np.ndarray]
"""Returns the indices that stay of a layer, when they are known: `[keep]` or `[expert, keep]`."""


def slim_config(checkpoint: Checkpoint, unit: str, keep: int) -> dict[str, Any]:
    """Return the source's config with fewer experts or channels, under all keys that mean them.

    Args:
        checkpoint: the source.
        unit: "experts" or "channels".
        keep: how many stay.

    Raises:
        JaxmoeError: the config does not say how many there are.
    """
    family = checkpoint.family or UNKNOWN
    own, usual = (family.experts, UNKNOWN.experts) if unit == "experts" else (family.intermediate, "")
    shape = checkpoint.layers[0].shape
    old = shape.experts if unit == "experts" else shape.intermediate
    config = checkpoint.dense_config()
    decoder = dict(decoder_config(config))
    keys = [key for key in dict.fromkeys(f"{own}|{usual}".split("|")) if key and _says(lookup(decoder, key), old)]
    if not keys:
        raise JaxmoeError(
            f"{checkpoint.folder}: config.json does not say under a known name that there are {old} {unit}, so that"
            " fewer could not be told to who loads the result"
        )
    for key in keys:
        _replace(decoder, key.split("."), keep)
    if checkpoint.mtp:
        decoder |= {key: 0 for key in _MTP_COUNTS if decoder.get(key)}
    return decoder if decoder_config(config) is config else {**config, "text_config": decoder}


def _says(value: Any, number: int) -> bool:
    return value == number or (isinstance(value, list) and bool(value) and set(value) == {number})


def _replace(config: dict[str, Any], path: list[str], number: int) -> None:
    *outer, key = path
    for part in outer:
        config[part] = config = dict(config[part])
    config[key] = [number] * len(config[key]) if isinstance(config[key], list) else number


def slim_shape(shape: LayerShape, unit: str, keep: int) -> LayerShape:
    """Return the sizes of a layer that keeps so many of its units.

    Example:
        >>> slim_shape(LayerShape(experts=8, hidden=4, intermediate=6), "channels", 3)
        LayerShape(experts=8, hidden=4, intermediate=3, gated=True)
    """
    return shape._replace(**{"experts" if unit == "experts" else "intermediate": keep})


def slim_copied(checkpoint: Checkpoint) -> list[Planned]:
    """Plan every tensor of the source that is no matrix of an expert, without multi-token prediction."""
    return checkpoint.copied(but=checkpoint.mtp)


def slim_edited(
    checkpoint: Checkpoint, layer: MoELayer, copied: Sequence[Planned], unit: str, keep: int, kept: Kept
) -> dict[str, list[Planned]]:
    """Plan what becomes of a layer's router and biases, by the names of the tensors that they replace.

    Args:
        checkpoint: the source.
        layer: one of its layers.
        copied: from `slim_copied`.
        unit: "experts" or "channels".
        keep: how many stay.
        kept: which; asked for when a tensor is written.

    Raises:
        JaxmoeError: the router of a layer that is to lose experts is not found.
    """
    edited = _router(checkpoint, layer, copied, keep, kept) if unit == "experts" else {}
    return edited | _biases(checkpoint, layer, unit, keep, kept)


def _router(
    checkpoint: Checkpoint, layer: MoELayer, copied: Sequence[Planned], keep: int, kept: Kept
) -> dict[str, list[Planned]]:
    """Plan what has a row or a number for every expert, among the tensors beside the experts' matrices."""
    begin = layer.prefix
    family = checkpoint.family
    router = "" if family is None else begin + family.router
    if family is None or router not in checkpoint.matrices:
        known = f"there is no {router}" if router else f"model_type {checkpoint.model_type!r} is unknown"
        raise JaxmoeError(
            f"layer {layer.index}: jaxmoe does not know its router ({known}), so that experts cannot be removed; use a"
            " method that keeps them all, such as svd or mobe"
        )
    bias, module = begin + family.bias, router.rpartition(".")[0] + "."
    found = {}
    for tensor in copied:
        if not tensor.name.startswith(begin) or tensor.name in layer.biases:
            continue
        of_each = tensor.name.startswith(module) or tensor.name == bias or "per_expert" in tensor.name
        axes = [axis for axis, size in enumerate(tensor.shape) if size == layer.shape.experts]
        if of_each and axes:
            shape = tuple(keep if axis == axes[0] else size for axis, size in enumerate(tensor.shape))
            found[tensor.name] = [replace(tensor, shape=shape, produce=partial(_taken, tensor.produce, kept, axes[0]))]
        elif "experts." in tensor.name and tensor.shape[:1] == (layer.shape.experts,):
            raise JaxmoeError(
                f"{tensor.name} has as many experts, by the same number in config.json, and no method removes those:"
                " use one that keeps all experts, such as svd or mobe"
            )
    return found


def _taken(read: Callable[[], np.ndarray], kept: Kept, axis: int) -> np.ndarray:
    return read().take(kept(), axis)


def _biases(checkpoint: Checkpoint, layer: MoELayer, unit: str, keep: int, kept: Kept) -> dict[str, list[Planned]]:
    """Plan the biases of the experts that stay."""
    found: dict[str, list[Planned]] = {}
    interleaved = any(stack.interleaved for stack in layer.written)
    grammar = (checkpoint.family or UNKNOWN).grammar
    for name in layer.biases:
        matrix = checkpoint.matrices[name]
        parsed = grammar.classify(name, len(matrix.shape))
        assert parsed is not None
        expert = parsed.expert
        if unit == "experts" and expert is None:
            shape = (keep, *matrix.shape[1:])
            found[name] = [Planned(name, matrix.dtype, shape, partial(_taken, matrix.read, kept, 0))]
        elif unit == "experts" and expert is not None:
            # The first `keep` names stay, each with the numbers of the expert that has its place now.
            found[name] = []
            if expert < keep:
                produce = partial(_of_expert, checkpoint, parsed.template, expert, kept)
                found[name] = [Planned(name, matrix.dtype, matrix.shape, produce)]
        elif parsed.projection != "down":
            size = matrix.shape[-1] // layer.shape.intermediate * keep
            produce = partial(_bias_channels, matrix.read, kept, expert, layer.shape.intermediate, interleaved)
            found[name] = [Planned(name, matrix.dtype, (*matrix.shape[:-1], size), produce)]
    return found


def _of_expert(checkpoint: Checkpoint, template: str, position: int, kept: Kept) -> np.ndarray:
    return checkpoint.matrices[template.replace("{expert}", str(kept()[position]))].read()


def _bias_channels(
    read: Callable[[], np.ndarray], kept: Kept, expert: int | None, channels: int, interleaved: bool
) -> np.ndarray:
    """Return the biases of gate, up or both of the channels that stay."""
    values, chosen = read(), kept()
    if expert is not None:
        values, chosen = values[None], chosen[expert : expert + 1]
    parts = values.shape[-1] // channels
    # One axis for gate and up, one for the channels, in the order of the file.
    split = (
        values.reshape(len(values), channels, parts) if interleaved else values.reshape(len(values), parts, channels)
    )
    rows = split if interleaved else split.swapaxes(1, 2)
    rows = slice_channels(rows, chosen, "up")
    joined = (rows if interleaved else rows.swapaxes(1, 2)).reshape(len(values), -1)
    return joined[0] if expert is not None else joined


def check_stock(
    checkpoint: Checkpoint, config: Mapping[str, Any], shapes: Mapping[int, LayerShape], copied: Sequence[Planned]
) -> None:
    """Raise unless the architecture's own code would find every tensor in the size that the new config says.

    Args:
        checkpoint: the source.
        config: of the result.
        shapes: of its MoE layers.
        copied: its tensors other than the experts' matrices.

    Raises:
        JaxmoeError: other parts of the model have their size from the same key of the config, or that cannot be told.
    """
    decoder, family = decoder_config(config), checkpoint.family
    if family is None or not runs(str(decoder.get("model_type"))):
        raise JaxmoeError(
            f"model_type {checkpoint.model_type!r}: jaxmoe does not know what else has its size from the number of"
            " channels of the experts, so that it removes none; remove experts instead (reap, frequency)"
        )
    try:
        spec = decoder_spec(decoder, shapes, checkpoint.ignored)
    except JaxmoeError as error:
        raise JaxmoeError(f"{checkpoint.folder}: {error}") from None
    pieces = [*end_pieces(spec, family).values()]
    for index, layer in enumerate(spec.layers):
        pieces += layer_pieces(layer, layer_prefix(index, family), family).values()
    try:
        check_fit(pieces, {tensor.name: tensor.shape for tensor in copied})
    except JaxmoeError as error:
        raise JaxmoeError(
            f"{checkpoint.model_type} has one size in config.json for the routed experts and for others, so that"
            f" channels cannot be removed from the routed ones alone: remove experts instead (reap, frequency). {error}"
        ) from error
