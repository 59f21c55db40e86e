"""The linear maps of a decoder's layers beside the routed experts: where each lies on disk, and in transformers.

A map is one tensor `[out, in]` on disk and one linear module in transformers. Mostly it has one role of
`model.roles.ROLES`; where several matrices lie in one tensor, such as gate and up of shared experts, the map has the
roles of all of them, stacked along its outputs. Biases are tensors of their own and stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxmoe.checkpoint.decoder import Piece, check_fit, layer_pieces, layer_prefix
from jaxmoe.checkpoint.experts import FLOATS
from jaxmoe.checkpoint.factored_format import LinearModule
from jaxmoe.checkpoint.families import Family, decoder_config, decoder_spec
from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.tensor_file import DTYPES, listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLinear, LinearShape
from jaxmoe.model.linear import Outputs
from jaxmoe.model.roles import LINEAR_TARGETS, ROLES, offered_targets
from jaxmoe.model.spec import DecoderSpec

if TYPE_CHECKING:
    from jaxmoe.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """One linear map of a decoder layer.

    Args:
        index: of the layer.
        name: its role, such as `attention.query`, or its roles as one, such as `shared.gate_up`.
        module: path of the linear module in transformers.
        tensor: name of its weight on disk, without quantisation.
        shape: sizes.
        bias: whether there is one, which stays as it is.
        rows: of each role, by role: those of its outputs.
    """

    index: int
    name: str
    module: str
    tensor: str
    shape: LinearShape
    bias: bool
    rows: Mapping[str, slice]

    @property
    def target(self) -> str:
        """What it belongs to, one of `model.roles.LINEAR_TARGETS`."""
        return ROLES[next(iter(self.rows))].target

    @property
    def reads(self) -> str:
        """The activations that it is applied to, see `model.roles`."""
        return ROLES[next(iter(self.rows))].reads

    def parameters(self, stored: CompressedLinear) -> dict[str, CompressedLinear | Outputs]:
        """Return what `jaxmoe.model` computes with where terms stand for the map, by the arrays' names."""
        if len(self.rows) == 1:
            return {f"{role}.weight": stored for role in self.rows}
        return {
            f"{role}.weight": Outputs(whole=stored, start=own.start, stop=own.stop) for role, own in self.rows.items()
        }


def linear_maps(pieces: Mapping[str, Piece], index: int, family: Family) -> tuple[LinearMap, ...]:
    """Return a layer's linear maps in the order of its arrays.

    Args:
        pieces: what the layer's arrays are read from, see `decoder.layer_pieces`.
        index: of the layer.
        family: the architecture's record.
    """
    tensors: dict[str, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        role = name.removesuffix(".weight")
        if role in ROLES:
            tensors.setdefault(piece.tensor, {})[role] = piece
    found = []
    for tensor, own in tensors.items():
        outs = [piece.shape[0] for piece in own.values()]
        ends = np.cumsum([0, *outs]).tolist()
        part = next(iter(own)).partition(".")[0]
        found.append(
            LinearMap(
                index=index,
                name=f"{part}.{'_'.join(role.partition('.')[2] for role in own)}",
                module=family.linear_module(tensor),
                tensor=tensor,
                shape=LinearShape(ends[-1], next(iter(own.values())).shape[1]),
                bias=any(f"{role}.bias" in pieces for role in own),
                rows={role: slice(a, b) for role, a, b in zip(own, ends, ends[1:])},
            )
        )
    return tuple(found)


def targets_of(maps: Mapping[int, tuple[LinearMap, ...]]) -> tuple[str, ...]:
    """Return which of `LINEAR_TARGETS` the maps of some layers belong to."""
    found = {own.target for layer in maps.values() for own in layer}
    return tuple(target for target in LINEAR_TARGETS if target in found)


def find_linear(checkpoint: "Checkpoint", targets: tuple[str, ...]) -> dict[int, tuple[LinearMap, ...]]:
    """Return the linear maps of some targets, by layer; layers without any are left out.

    Args:
        checkpoint: whose config says what its decoder computes.
        targets: as `model.roles.check_targets` returns them.

    Raises:
        JaxmoeError: jaxmoe does not know exactly what the decoder computes, the model has nothing of any target, or a
            tensor is missing or not what the config says.
    """
    if set(targets) <= {"experts"}:
        return {}
    maps = _all_maps(checkpoint)
    offered_targets(targets, targets_of(maps))
    chosen = {index: tuple(own for own in layer if own.target in targets) for index, layer in maps.items()}
    _check_dtypes(chosen, checkpoint.matrices)
    return {index: layer for index, layer in chosen.items() if layer}


def _all_maps(checkpoint: "Checkpoint") -> dict[int, tuple[LinearMap, ...]]:
    family = checkpoint.family
    shapes = {layer.index: layer.shape for layer in checkpoint.layers}
    try:
        if family is None:
            raise JaxmoeError(f"model_type {checkpoint.model_type!r} is unknown to jaxmoe")
        config = decoder_config(checkpoint.config)
        spec: DecoderSpec = decoder_spec(config, shapes, checkpoint.ignored)
        pieces = {
            index: layer_pieces(layer, layer_prefix(index, family), family) for index, layer in enumerate(spec.layers)
        }
        found = {name: matrix.shape for name, matrix in checkpoint.matrices.items()}
        check_fit([piece for own in pieces.values() for piece in own.values()], found)
    except JaxmoeError as error:
        raise JaxmoeError(
            f"{checkpoint.folder}: of this model only the experts can be targets, since where its other matrices lie"
            f" and what they read is not known: {error}"
        ) from error
    return {index: linear_maps(own, index, family) for index, own in pieces.items()}


def _check_dtypes(maps: Mapping[int, tuple[LinearMap, ...]], matrices: Mapping[str, Matrix]) -> None:
    every = [own for layer in maps.values() for own in layer]
    if wrong := [own.tensor for own in every if matrices[own.tensor].dtype not in FLOATS]:
        raise JaxmoeError(f"{', '.join(wrong[:8])}: jaxmoe compresses {', '.join(FLOATS)}")


def weight_dtype(own: LinearMap, matrices: Mapping[str, Matrix]) -> np.dtype:
    """Return the dtype in which a map's weight is read, and its factors are stored."""
    return np.dtype(DTYPES[matrices[own.tensor].dtype])


def check_factored(maps: Mapping[str, LinearMap], modules: Mapping[str, LinearModule]) -> None:
    """Raise unless what a factored checkpoint says of linear modules fits the decoder; all offenders are listed.

    Args:
        maps: the decoder's linear maps that are factored, by module.
        modules: what the checkpoint's record says, by module.
    """
    problems = [f"{name} is no linear map of this decoder" for name in modules if name not in maps]
    for name, own in maps.items():
        record = modules[name]
        found = (record.shape, record.bias, record.layout.name)
        wanted = (own.shape, own.bias, own.tensor)
        if found != wanted:
            problems.append(f"{name} is {found}, and the decoder has {wanted}")
    if problems:
        raise JaxmoeError(
            f"the factored linear maps do not fit the decoder: {listing(sorted(problems))}; write the checkpoint again"
        )
