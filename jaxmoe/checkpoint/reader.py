"""A checkpoint on disk, opened: its MoE layers, their matrices when asked for, and everything else to be copied.

Opening reads headers only; matrices are read when they are asked for, and decoded one expert at a time where they are
quantised. Nothing is written to the source.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.expert_biases import join_biases
from jaxmoe.checkpoint.experts import MoELayer, find_experts
from jaxmoe.checkpoint.families import Family, decoder_config, find_family
from jaxmoe.checkpoint.families.parts.moe_layers import num_layers
from jaxmoe.checkpoint.formats import format_name
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.quantization import (
    Matrix,
    as_stored,
    assemble,
    leaving_out,
    obstacle,
    quantization_config,
    without_quantization,
)
from jaxmoe.checkpoint.shard import aligned_bytes
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A Hugging Face checkpoint with routed experts.

    Args:
        folder: where it lies.
        config: its `config.json`.
        model_type: the architecture's name in it.
        family: the architecture's record; None if jaxmoe has none and read it by its standard names.
        tensors: every tensor on disk by name.
        matrices: every tensor by the name that it has without quantisation.
        layers: the MoE layers of the decoder in ascending order, without those of multi-token prediction.
        mtp: names on disk of the tensors of multi-token prediction, which are copied.
        notes: what a user should know about how the checkpoint was read, one sentence each.
        ignored: keys of the config that a user says change nothing, where jaxmoe does not know them.
        keeps: whether quantised matrices that no method replaces are copied as they are, see `keeping`.

    Example:
        >>> checkpoint = Checkpoint.open("jaxmoe/demo/checkpoint")  # doctest: +SKIP
        >>> checkpoint.projection(checkpoint.layers[0], "down").shape  # doctest: +SKIP
        (16, 128, 64)
    """

    folder: Path
    config: Mapping[str, Any]
    model_type: str
    family: Family | None
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    matrices: Mapping[str, Matrix] = field(repr=False)
    layers: tuple[MoELayer, ...] = field(repr=False)
    mtp: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    keeps: bool = False

    @classmethod
    def open(
        cls, source: str | Path, revision: str | None = None, *, ignore_config_keys: Collection[str] = ()
    ) -> "Checkpoint":
        """Open a checkpoint and check everything that can be checked without reading its numbers.

        Args:
            source: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            ignore_config_keys: keys of its config to leave out of account when the model is run, where jaxmoe does not
                know what they mean; those that it has are noted.

        Raises:
            JaxmoeError: if it cannot be found or read, is damaged, has no routed experts, or was compressed already.
        """
        folder = hub.resolve(source, revision)
        config = files.read_config(folder)
        if "jaxmoe" in config:
            raise JaxmoeError(
                f"{folder} was compressed by jaxmoe already: give the original, or write this one out as a dense"
                " checkpoint with `jaxmoe convert --to dense` first"
            )
        try:
            weights = files.read_weights(folder)
            tensors = weights.tensors
            family = find_family(config)
            matrices = assemble(tensors, config)
            if family is not None and family.expert_biases:
                matrices = join_biases(matrices, family.grammar, interleaved=family.interleaved)
            found = find_experts(matrices, config, family)
            weights.require(num_layers(decoder_config(config)))
        except JaxmoeError as error:
            raise JaxmoeError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
        mtp = tuple(part.name for name in found.mtp for part in matrices[name].parts)
        ignored = tuple(sorted({*ignore_config_keys} & decoder_config(config).keys()))
        return cls(
            folder=folder,
            config=config,
            model_type=config["model_type"],
            family=family,
            tensors=tensors,
            matrices=matrices,
            layers=found.layers,
            mtp=mtp,
            notes=(*weights.notes, *_notes(config, family, found.layers, tensors, matrices, mtp, ignored)),
            ignored=ignored,
        )

    @property
    def quantized(self) -> bool:
        """Whether some tensors stand for others."""
        return bool(_encodings(self.matrices))

    def keeping(self, form: str) -> "Checkpoint":
        """Return the checkpoint as one of which quantised matrices stay as they are, where a form of the result can."""
        return replace(self, keeps=bool(self._staying()) and self._obstacle(form) is None)

    def plain(self) -> "Checkpoint":
        """Return the checkpoint as one of which everything is copied without quantisation."""
        return replace(self, keeps=False)

    def quantization_note(self, form: str) -> str | None:
        """Return what a user should know of how quantised matrices that no method replaces are written in a form."""
        staying = self._staying()
        if not staying:
            return None
        kind = format_name({}, quantization_config(self.config))
        if self.keeps:
            return f"{len(staying)} matrices beside the routed experts stay as they were quantised ({kind})"
        return (
            f"{len(staying)} matrices beside the routed experts, quantised in the source ({kind}), are written in"
            f" bfloat16: {self._obstacle(form)}"
        )

    def _obstacle(self, form: str) -> str | None:
        """Return why quantised matrices that no method replaces cannot stay as they are, None where they can."""
        if self.family is not None:
            routers = {layer.prefix + self.family.router for layer in self.layers}
            if any(matrix.name in routers for matrix in self._staying()):
                return "its routers are quantised, whose rows a step may remove"
        return obstacle(quantization_config(self.config), self._staying(), form)

    def _staying(self) -> list[Matrix]:
        """Return the quantised matrices beside the routed experts."""
        replaced = {name for layer in self.layers for name in layer.names}
        return [m for m in self.matrices.values() if _encoded(m) and m.parts[0].name not in replaced]

    @property
    def parameters(self) -> int:
        """Numbers of the whole model without quantisation; scales do not count."""
        return sum(matrix.numbers for matrix in self.matrices.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.bytes for entry in self.tensors.values())

    def projection(self, layer: MoELayer, name: str, experts: slice = slice(None)) -> np.ndarray:
        """Read the matrices of one projection, `[expert, out, in]`, in the layer's dtype.

        Args:
            layer: one of `layers`.
            name: `gate`, `up` or `down`.
            experts: which ones.
        """
        for stack in layer.layout:
            if name in TARGETS[stack.target]:
                return stack.read(self.matrices, layer.shape, name, experts)
        raise JaxmoeError(
            f"layer {layer.index} has no {name}: its projections are {', '.join(layer.shape.projections)}"
        )

    def target(self, layer: MoELayer, name: str) -> np.ndarray:
        """Return a target's matrices as a fit reads them: float32, aligned, finite, `[expert, out, in]`.

        One projection at most is held beside them.

        Args:
            layer: one of `layers`.
            name: `gate`, `up`, `gate_up` or `down`.

        Raises:
            JaxmoeError: a weight is NaN or infinite; the message names the tensors.
        """
        shape = layer.shape.of(name)
        weight = aligned_bytes(4 * prod(shape)).view(np.float32).reshape(shape)
        start = 0
        for projection in TARGETS[name]:
            part = self.projection(layer, projection)
            weight[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        if not np.isfinite(weight).all():
            raise JaxmoeError(self._not_finite(layer, name))
        return weight

    def _not_finite(self, layer: MoELayer, target: str) -> str:
        named = []
        for name in layer.names:
            entry = self.tensors[name]
            values = entry.read()
            if values.dtype.kind not in "iu" and not np.isfinite(values.astype(np.float32)).all():
                named.append(f"{name} in {entry.file}")
        where = "; ".join(named[:8]) or f"layer {layer.index}, {target}"
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        return f"NaN or infinite weights in {where}{more}: the checkpoint is damaged, fetch or train it again"

    def dense_tensors(self, layer: MoELayer, produce: Callable[[str], np.ndarray]) -> list[Planned]:
        """Plan a layer's dense experts under the source's names and in its layout and dtype (unquantised).

        Args:
            layer: one of `layers`.
            produce: returns a projection's matrices, `[expert, out, in]`, in any float dtype.
        """
        return plan_dense(layer.written, layer.shape, layer.dtype, produce)

    def copied(self, but: Collection[str] = ()) -> list[Planned]:
        """Plan every tensor that no method replaces: byte for byte, or in bfloat16 where quantised ones are not kept.

        Args:
            but: matrices to leave out, by their names without quantisation or those of a part.
        """
        replaced = {*but, *(name for layer in self.layers for name in layer.names)}
        planned: list[Planned] = []
        for name, matrix in self.matrices.items():
            if name in replaced or matrix.parts[0].name in replaced:
                continue
            plain = Planned(name, matrix.dtype, matrix.shape, matrix.read)
            planned += as_stored(matrix) if self.keeps and _encoded(matrix) else [plain]
        return planned

    def with_quantization(
        self, config: Mapping[str, Any], copied: Sequence[Planned], modules: Collection[str]
    ) -> dict[str, Any]:
        """Return a config that says how tensors which were copied are quantised; the same where none is.

        Args:
            config: of the result.
            copied: tensors of it.
            modules: paths in transformers of the modules that are not quantised any more.
        """
        return leaving_out(config, quantization_config(self.config), copied, modules)

    def dense_config(self) -> dict[str, Any]:
        """Return the config of what `dense_tensors` and `copied` write: the source's, without any quantisation."""
        config = without_quantization(self.config)
        for part in (config, config.get("text_config")) if self.quantized else ():
            for key in ("dtype", "torch_dtype"):
                if isinstance(part, dict) and key in part:
                    part[key] = "bfloat16"
        return config

    def layouts(self) -> dict[str, dict[str, Any]]:
        """Return for each experts' module how `dense_tensors` writes it, as JSON: `dtype` and `stacks`.

        `plan_dense` writes the dense tensors again from that alone: `Stack(**stack)` for each of the stacks.
        """
        return {
            layer.module: {"dtype": layer.dtype.name, "stacks": [asdict(stack) for stack in layer.written]}
            for layer in self.layers
        }

    def fingerprint(self) -> str:
        """Return a SHA-256 of the files, see `files.fingerprint`."""
        return files.fingerprint(self.folder, self.tensors)


def _notes(
    config: Mapping[str, Any],
    family: Family | None,
    layers: tuple[MoELayer, ...],
    tensors: Mapping[str, TensorEntry],
    matrices: Mapping[str, Matrix],
    mtp: tuple[str, ...],
    ignored: tuple[str, ...],
) -> list[str]:
    notes = []
    if ignored:
        notes.append(f"Left out of account in config.json, as was asked for: {', '.join(ignored)}.")
    if family is None:
        first = layers[0]
        names = ", ".join(stack.name for stack in first.layout)
        notes.append(
            f"model_type {config['model_type']!r} is unknown to jaxmoe and was read by its standard names. Known from"
            f" the tensors: {len(layers)} MoE layers, {first.shape.experts} experts, sizes and names ({names})."
            f" Unknown: how it routes, and its module in memory ({first.module} is assumed); methods that need the"
            " weights alone and the dense export work."
        )
    if mtp:
        predicting = set(mtp)
        numbers = sum(matrix.numbers for matrix in matrices.values() if matrix.parts[0].name in predicting)
        notes.append(
            f"{len(mtp)} tensors of multi-token prediction ({numbers:,} parameters) are copied, not compressed."
        )
    if any(layer.written != layer.layout for layer in layers):
        notes.append(
            "The experts lie one by one, with biases, as transformers does not load them for this architecture: biases"
            " and dense experts are written together, as it does."
        )
    if kinds := _encodings(matrices):
        notes.append(
            f"The source is quantised ({', '.join(kinds)} with scales) and read exactly; what is replaced is written"
            " without its quantisation."
        )
    elif settings := quantization_config(config):
        notes.append(
            f"{files.CONFIG} says that the weights are quantised ({format_name({}, settings)}), and none is: what is"
            " written does not say so."
        )
    return notes


def _encodings(matrices: Mapping[str, Matrix]) -> list[str]:
    """Return the dtypes in which quantised tensors are stored."""
    return sorted({matrix.parts[0].dtype for matrix in matrices.values() if _encoded(matrix)})


def _encoded(matrix: Matrix) -> bool:
    """Tell whether a matrix is stored otherwise than it is read."""
    return matrix.parts[0].dtype != matrix.dtype
