"""The packed checkpoint: the original architecture with few bits for its experts, in a format of other programs.

`pack-quantized` of compressed-tensors holds a matrix as `weight_packed`, `weight_scale` and `weight_shape`, see
`checkpoint.quantization.integers`. transformers takes one scheme for the experts of the whole model, and reads others
wrongly without a word; vLLM takes one for each layer. So every matrix of every expert has to be symmetric, of 4 or 8
bits, in groups that kernels know, and alike; what is not is refused before anything runs. Everything else of the model
is as it was.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.tensor_file import Planned, listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import digest
from jaxmoe.factors import TARGETS, CompressedLayer, Count, LayerShape
from jaxmoe.factors.leaves import values
from jaxmoe.factors.quantised import MixedArray, QuantisedArray

BITS = (4, 8)
"""Widths for which there are kernels, and which all versions of compressed-tensors pack alike."""

GROUPS = (128, 64, 32)
"""Sizes of groups for which there are kernels, beside whole rows."""

PACKED = ("packed", "packed-vllm")
"""The forms: with one scheme for the whole model; or, for vLLM alone, with one for each layer."""

ONE_WIDTH = "give all experts one width, as gptq4, gptq8 and --set bits_per=model do"

NAMES = "(gate_proj|up_proj|down_proj|w1|w2|w3)"
EXPERT = re.compile(rf".*\.experts\.\d+\.{NAMES}\.weight")


class Scheme(NamedTuple):
    """How the experts of a layer are held: bits of a code, and inputs of a group (0: a whole row)."""

    bits: int
    group: int

    @property
    def weights(self) -> dict[str, Any]:
        """What compressed-tensors says of it in a config.

        Example:
            >>> Scheme(4, 0).weights
            {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'channel', 'dynamic': False}
        """
        grouped = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, **grouped, "dynamic": False}

    def __str__(self) -> str:
        return f"{self.bits} bits in {f'groups of {self.group}' if self.group else 'whole rows'}"


def can_pack(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint's experts can be packed under their names."""
    return not _obstacle(checkpoint)


def check_packable(checkpoint: Checkpoint, form: str = "packed") -> None:
    """Raise unless a checkpoint's experts can be packed under their names.

    Args:
        checkpoint: the source.
        form: one of `PACKED`.

    Raises:
        JaxmoeError: transformers would not find packed experts of the architecture, or they have biases.
    """
    if obstacle := _obstacle(checkpoint):
        raise JaxmoeError(f"--export {form}: {obstacle}; write it with --export factored or dense")


def _obstacle(checkpoint: Checkpoint) -> str | None:
    family = checkpoint.family
    if family is None or family.transformers is None:
        return f"jaxmoe knows no classes of transformers that load {checkpoint.model_type!r}"
    if family.not_packed:
        return f"{checkpoint.model_type!r}: {family.not_packed}"
    for layer in checkpoint.layers:
        for stack in layer.written:
            if not (stack.per_expert and EXPERT.fullmatch(stack.name.replace("{expert}", "0"))) or stack.transposed:
                return f"packed experts are read under the names of single ones, and {stack.name} holds {stack.target}"
        if layer.biases:
            return f"the experts of layer {layer.index} have biases"
    return None


def schemes(layers: Mapping[int, CompressedLayer], form: str = "packed") -> dict[int, Scheme]:
    """Return how the experts of each layer are held, all of them in one way.

    Args:
        layers: what stands for the experts, abstract or real, by layer.
        form: one of `PACKED`.

    Raises:
        JaxmoeError: some matrices cannot be packed, or not all alike; the message lists them and says what works.
    """
    problems: dict[str, str] = {}
    mends: dict[str, None] = {}
    found: dict[int, Scheme] = {}
    for index, layer in layers.items():
        own: dict[str, Scheme] = {}
        for target in layer.terms:
            scheme, mend = _scheme(layer, target)
            if isinstance(scheme, Scheme):
                own[target] = scheme
            else:
                problems[f"layer {index}, {target}"] = scheme
                mends[mend] = None
        if len({*own.values()}) > 1:
            problems[f"layer {index}"] = ", ".join(f"{target} {scheme}" for target, scheme in own.items())
            mends[_one_group(layer.sizes)] = None
        elif own:
            found[index] = next(iter(own.values()))
    if form == "packed" and not problems and len({*found.values()}) > 1:
        problems = {f"layer {index}": str(scheme) for index, scheme in found.items()}
        mends = dict.fromkeys((ONE_WIDTH, "for vLLM alone, --export packed-vllm"))
    if problems:
        each = "model" if form == "packed" else "layer"
        raise JaxmoeError(
            f"--export {form} takes experts of 4 or 8 bits, symmetric, in groups of 32, 64 or 128 or whole rows, the"
            f" same for the whole {each}: {'; or '.join(mends)}; or write it with --export factored, which takes all."
            f" {listing([f'{where}: {what}' for where, what in problems.items()], 8)}"
        )
    return found


def _scheme(layer: CompressedLayer, target: str) -> tuple[Scheme | str, str]:
    """Return the scheme of a target; or why there is none, and what to do about it."""
    terms = layer.terms[target]
    if [term.kind for term in terms] != ["dense"]:
        return " + ".join(term.kind for term in terms), "end the recipe with gptq4 or gptq8 and factor nothing"
    (weight,) = (getattr(term, "weight") for term in terms)  # noqa: B009
    if not isinstance(weight, QuantisedArray):
        mixed = isinstance(weight, MixedArray)
        return ("several widths" if mixed else "not quantised"), ONE_WIDTH
    store = weight.store
    if store.table is not None:
        return f"a codebook ({store.table})", "use codes without one, such as gptq4 or rtn4"
    if store.zero != "none":
        return f"{store.zero} zeros", "leave out zeros, with --set zero=none"
    if store.bits not in BITS:
        return f"{store.bits} bits", "give 4 or 8 bits, such as gptq4 or gptq8"
    if store.scale not in ("bfloat16", "float16", "float32"):
        return f"scales of {store.scale}", "keep the scales in bfloat16, with --set scale=bfloat16"
    if store.group not in (0, *GROUPS):
        return f"groups of {store.group}", _one_group(layer.sizes)
    return Scheme(store.bits, store.group), ""


def _one_group(sizes: LayerShape) -> str:
    """Return the settings that give all matrices of a layer one size of groups."""
    size = next((g for g in GROUPS if sizes.hidden % g == 0 and sizes.intermediate % g == 0), 0)
    return f"give one size of groups that divides {sizes.hidden} and {sizes.intermediate}, with --set group={size}"


def packed_tensors(layer: MoELayer, experts: CompressedLayer) -> list[Planned]:
    """Plan the packed experts of a layer, under the names that compressed-tensors gives their parts.

    Args:
        layer: of the source, or of what is left of it.
        experts: quantised so that `schemes` takes them.
    """
    planned = []
    for stack in layer.written:
        weight, rows = _rows(experts, stack.target)
        codes, scale = np.asarray(weight.codes), np.asarray(weight.scale).astype(layer.dtype)
        shape = np.array(stack.on_disk(experts.sizes))
        for expert, name in enumerate(stack.names(experts.sizes)):
            own = slice(expert * weight.shape[1] + rows.start, expert * weight.shape[1] + rows.stop)
            parts = {"packed": codes[own], "scale": scale[own], "shape": shape}
            planned += [
                Planned(f"{name}_{part}", array.dtype, array.shape, partial(np.ascontiguousarray, array))
                for part, array in parts.items()
            ]
    return planned


def _rows(experts: CompressedLayer, projection: str) -> tuple[QuantisedArray, range]:
    """Return the array that holds a projection, and which of each expert's rows are its."""
    for target, (term, *_) in experts.terms.items():
        if projection in TARGETS[target]:
            size = experts.sizes.of(projection)[1]
            start = TARGETS[target].index(projection) * size
            return getattr(term, "weight"), range(start, start + size)  # noqa: B009
    raise RuntimeError(f"nothing holds {projection}: a defect of jaxmoe")


def beside(checkpoint: Checkpoint, layers: Mapping[int, CompressedLayer]) -> Count:
    """Count what a packed checkpoint holds beside the codes and scales of its experts, and in wider scales."""
    total = Count(0, 0)
    for layer in checkpoint.layers:
        experts = layers[layer.index]
        for projection in experts.sizes.projections:
            weight, rows = _rows(experts, projection)
            scales = len(rows) * experts.sizes.experts * weight.store.groups(weight.shape[2])
            wider = layer.dtype.itemsize - np.dtype("float16").itemsize if weight.store.scale != "float32" else 0
            total += Count(2 * experts.sizes.experts, 16 * experts.sizes.experts + wider * scales)
    return total


def digests(experts: CompressedLayer, dtype: np.dtype) -> dict[str, str]:
    """Return a SHA-256 of the values of each projection in the dtype of the files, to compare what was written with."""
    found = {}
    for projection in experts.sizes.projections:
        weight, rows = _rows(experts, projection)
        found[projection] = digest(np.asarray(values(weight))[:, rows.start : rows.stop].astype(dtype))
    return found


def packed_config(checkpoint: Checkpoint, config: Mapping[str, Any], found: Mapping[int, Scheme]) -> dict[str, Any]:
    """Return a config that says how the experts are packed.

    Args:
        checkpoint: what they are the experts of.
        config: what it says otherwise.
        found: how those of each layer are held, from `schemes`.
    """
    own = [*dict.fromkeys(found.values())]
    groups = {}
    for number, scheme in enumerate(own):
        layers = (
            "" if len(own) == 1 else rf"\.layers\.({'|'.join(str(i) for i, x in found.items() if x == scheme)})\..*"
        )
        groups[f"group_{number}"] = {
            "targets": [rf"re:.*{layers}\.experts\.\d+\.{NAMES}$"],
            "weights": scheme.weights,
            "input_activations": None,
            "output_activations": None,
        }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*_predicting(checkpoint.mtp)}),
    }
    return {**config, "quantization_config": settings}


def _predicting(names: Sequence[str]) -> Iterator[str]:
    """Yield expressions for the experts of multi-token prediction, which stay as they are."""
    for name in names:
        if EXPERT.fullmatch(name):
            yield f"re:{re.escape(name[: name.index('.experts.')])}\\.experts\\..*"


def most_devices(shape: LayerShape, group: int) -> int:
    """Return over how many devices tensor parallelism can cut a layer's experts so that their groups stay whole.

    Example:
        >>> most_devices(LayerShape(experts=128, hidden=2048, intermediate=768), 64)
        4
    """
    fitting = (n for n in (64, 32, 16, 8, 4, 2) if shape.intermediate % (n * max(1, group)) == 0)
    return next(fitting, 1)
