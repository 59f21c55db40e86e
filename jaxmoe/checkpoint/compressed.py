"""A factored checkpoint that jaxmoe wrote, opened: its compressed layers, read one at a time, and everything else.

The record in its `config.json` says what each layer's terms are and how the dense experts lay on disk before, so that
they can be written back in just that form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.families import decoder_config
from jaxmoe.checkpoint.families.parts.moe_layers import num_layers
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.quantization import without_quantization
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.factored import Module, is_factored, read_spec
from jaxmoe.factors import CompressedLayer, Count, LayerShape
from jaxmoe.model.auxiliary import MainExperts, vector_shapes


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressedCheckpoint:
    """A folder with factored experts.

    Args:
        folder: where it lies.
        config: its `config.json`.
        original: the configuration of the dense model that it stands for.
        records: what the config says of each compressed layer, by the path of its experts' module.
        tensors: every tensor on disk by name.
        notes: what a user should know about how the checkpoint was read, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    original: Mapping[str, Any]
    records: Mapping[str, Module] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> "CompressedCheckpoint":
        """Open a factored checkpoint and check that the files hold what its config says.

        Raises:
            JaxmoeError: it is not factored, of a newer format, damaged, or lacks tensors.
        """
        folder = hub.resolve(str(source), revision)
        config = files.read_config(folder)
        if not is_factored(config):
            raise JaxmoeError(
                f"{folder} holds no factored experts (model_type {config['model_type']}): it is dense already"
            )
        weights = files.read_weights(folder)
        try:
            original, records = read_spec(config)
            weights.require(num_layers(decoder_config(original)))
        except JaxmoeError as error:
            raise JaxmoeError(f"{folder}: {error}") from None
        opened = cls(
            folder=folder,
            config=config,
            original=original,
            records=records,
            tensors=weights.tensors,
            notes=weights.notes,
        )
        for module in opened.modules:
            opened.abstract_layer(module)
            opened.auxiliary(module)
        return opened

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the compressed experts' modules, in the order of the layers."""
        return tuple(self.records)

    @property
    def shapes(self) -> dict[str, LayerShape]:
        """Sizes of each compressed layer, by the path of its experts' module."""
        return {module: record.shape for module, record in self.records.items()}

    @property
    def main(self) -> dict[str, MainExperts]:
        """The experts that run, of the layers where vectors stand in for the others."""
        return {module: record.main for module, record in self.records.items() if record.main is not None}

    @property
    def parameters(self) -> int:
        """Numbers in the files."""
        return sum(entry.numbers for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.bytes for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """Return a SHA-256 of the files, see `files.fingerprint`."""
        return files.fingerprint(self.folder, self.tensors)

    def _names(self, module: str) -> list[str]:
        targets = tuple(f"{module}.{target}." for target in self.records[module].terms)
        vectors = {f"{module}.{name}" for name in self._vectors(module)}
        return [name for name in self.tensors if name.startswith(targets) or name in vectors]

    def _vectors(self, module: str) -> dict[str, tuple[int, int]]:
        record = self.records[module]
        return {} if record.main is None else vector_shapes(record.shape)

    def auxiliary(self, module: str) -> dict[str, np.ndarray]:
        """Return the vectors that stand in for experts of a layer, by name; none where all chosen experts run.

        Raises:
            JaxmoeError: one is missing, or has another size or dtype than it must have.
        """
        vectors = {}
        for name, shape in self._vectors(module).items():
            entry = self.tensors.get(f"{module}.{name}")
            if entry is None or (entry.dtype, entry.shape) != ("F32", shape):
                found = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
                raise JaxmoeError(
                    f"{self.folder}: {module}.{name} {found}, not F32 {list(shape)}: write the checkpoint again"
                )
            vectors[name] = entry.read()
        return vectors

    def layer(self, module: str) -> CompressedLayer:
        """Read one compressed layer.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._layer(module, TensorEntry.read)

    def abstract_layer(self, module: str) -> CompressedLayer:
        """Return one compressed layer for counting and checks: of its numbers only the integers are read.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._layer(module, lambda entry: entry.read() if entry.dtype[0] in "IU" else entry.abstract())

    def _layer(self, module: str, take: Callable[[TensorEntry], np.ndarray]) -> CompressedLayer:
        own, vectors = {name.removeprefix(f"{module}."): name for name in self._names(module)}, self._vectors(module)
        arrays = {name: take(self.tensors[whole]) for name, whole in own.items() if name not in vectors}
        record = self.records[module]
        try:
            return CompressedLayer.from_tensors(arrays, record.terms, record.shape)
        except JaxmoeError as error:
            raise JaxmoeError(
                f"{self.folder}: {module} does not hold what config.json says: {error}; write the checkpoint again"
            ) from None

    def count(self) -> Count:
        """Count what the compressed layers store, vectors that stand in for experts included."""
        held = [self.tensors[name] for module in self.modules for name in self._names(module)]
        return Count(sum(entry.numbers for entry in held), sum(entry.bytes for entry in held))

    def dense_config(self) -> dict[str, Any]:
        """Return the configuration of the dense model, as `Checkpoint` does."""
        return without_quantization(self.original)

    def layouts(self) -> dict[str, Any] | None:
        """Return how the dense experts lay on disk, as `Checkpoint` does; None where the record does not say."""
        found = {module: record.layout for module, record in self.records.items()}
        return None if None in found.values() else msgspec.to_builtins(found)

    def copied(self) -> list[Planned]:
        """Plan every tensor that belongs to no compressed layer, byte for byte."""
        held = {name for module in self.modules for name in self._names(module)}
        return [
            Planned(name, entry.dtype, entry.shape, entry.read)
            for name, entry in self.tensors.items()
            if name not in held
        ]

    def check_dense(self) -> None:
        """Raise if vectors stand in for some experts, so that there is no dense model of the original architecture."""
        if self.main:
            raise JaxmoeError(
                f"{self.folder}: vectors stand in for some of a token's experts in {len(self.main)} layers, which a"
                " stock architecture cannot hold: use it as it is, or convert the checkpoint that it was made of"
            )

    def dense_tensors(self, module: str) -> list[Planned]:
        """Plan a layer's materialised experts under the names and in the form that the original had."""
        record = self.records[module]
        if record.layout is None:
            raise JaxmoeError(f"{self.folder}: config.json does not say how {module} lay on disk: compress again")
        layer = self.layer(module)

        def produce(projection: str) -> np.ndarray:
            dense = np.asarray(layer.materialize(projection))
            if not np.isfinite(dense).all():
                raise JaxmoeError(
                    f"{self.folder}: NaN or infinite weights in {module}, {projection}: the checkpoint is damaged,"
                    " fetch or write it again"
                )
            return dense

        return plan_dense(record.layout.stacks, record.shape, np.dtype(record.layout.dtype), produce)
