"""A factored checkpoint that jaxmoe wrote, opened: its compressed modules, read one at a time, and everything else.

The record in its `config.json` says what each module's terms are and how the dense experts and matrices lay on disk
before, so that they can be written back in just that form.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.factored_format import ExpertsModule, LinearModule, is_factored, read_record
from jaxmoe.checkpoint.families import Family, decoder_config, find_family
from jaxmoe.checkpoint.families.parts.moe_layers import num_layers
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.quantization import (
    Matrix,
    as_stored,
    assemble,
    leaving_out,
    quantization_config,
    without_quantization,
)
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, CompressedLinear, Count, LayerShape
from jaxmoe.factors.quantised import CODED
from jaxmoe.model.compressed_experts import MainExperts, vector_shapes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressedCheckpoint:
    """A folder with factored modules.

    Args:
        folder: where it lies.
        config: its `config.json`.
        original: the configuration of the dense model that it stands for.
        experts: what the config says of the routed experts of each layer, by the path of their module.
        linears: what the config says of matrices outside of them, by the paths of their modules.
        tensors: every tensor on disk by name.
        matrices: every tensor by the name that it has without quantisation, which the source's own matrices may have.
        notes: what a user should know about how the checkpoint was read, one sentence each.
        ignored: keys of the config that are left out of account.
    """

    folder: Path
    config: Mapping[str, Any]
    original: Mapping[str, Any]
    experts: Mapping[str, ExpertsModule] = field(repr=False)
    linears: Mapping[str, LinearModule] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    matrices: Mapping[str, Matrix] = field(repr=False)
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, source: str | Path, revision: str | None = None, *, ignore_config_keys: Collection[str] = ()
    ) -> "CompressedCheckpoint":
        """Open a factored checkpoint and check that the files hold what its config says.

        Args:
            source: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            ignore_config_keys: keys of its config to leave out of account when the model is run.

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
            original, modules = read_record(config)
            weights.require(num_layers(decoder_config(original)))
        except JaxmoeError as error:
            raise JaxmoeError(f"{folder}: {error}") from None
        opened = cls(
            folder=folder,
            config=config,
            original=original,
            experts={name: own for name, own in modules.items() if isinstance(own, ExpertsModule)},
            linears={name: own for name, own in modules.items() if isinstance(own, LinearModule)},
            tensors=weights.tensors,
            matrices={},
            notes=weights.notes,
            ignored=tuple(sorted({*ignore_config_keys} & decoder_config(original).keys())),
        )
        try:
            opened = replace(opened, matrices=opened._assembled())
        except JaxmoeError as error:
            raise JaxmoeError(f"{folder}: {error}") from None
        for module in opened.modules:
            opened.abstract_layer(module)
            opened.auxiliary(module)
        for module in opened.linears:
            opened.abstract_linear(module)
        return opened

    def _assembled(self) -> dict[str, Matrix]:
        """Return the matrices: the modules' tensors as they are, and what those beside them stand for."""
        own = {name: self.tensors[name] for module in (*self.experts, *self.linears) for name in self._names(module)}
        rest = {name: entry for name, entry in self.tensors.items() if name not in own}
        return {**own, **assemble(rest, self.config)}

    @property
    def family(self) -> Family | None:
        """The record of the original's architecture, None where it is not known."""
        return find_family(self.original)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the compressed experts' modules, in the order of the layers."""
        return tuple(self.experts)

    @property
    def shapes(self) -> dict[str, LayerShape]:
        """Sizes of each compressed layer, by the path of its experts' module."""
        return {module: record.shape for module, record in self.experts.items()}

    @property
    def main(self) -> dict[str, MainExperts]:
        """The experts that run, of the layers where vectors compensate for the others."""
        return {module: record.main for module, record in self.experts.items() if record.main is not None}

    @property
    def parameters(self) -> int:
        """Numbers that are stored; scales of what the source had quantised do not count."""
        return sum(matrix.numbers for matrix in self.matrices.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.bytes for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """Return a SHA-256 of the files, see `files.fingerprint`."""
        return files.fingerprint(self.folder, self.tensors)

    def _names(self, module: str) -> list[str]:
        """Return the tensors that stand for a module."""
        if (linear := self.linears.get(module)) is not None:
            begin = tuple(f"{module}.{position}." for position in range(len(linear.terms)))
            return [name for name in self.tensors if name.startswith(begin)]
        targets = tuple(f"{module}.{target}." for target in self.experts[module].terms)
        vectors = {f"{module}.{name}" for name in self._vectors(module)}
        return [name for name in self.tensors if name.startswith(targets) or name in vectors]

    def _vectors(self, module: str) -> dict[str, tuple[int, int]]:
        record = self.experts[module]
        return {} if record.main is None else vector_shapes(record.shape)

    def auxiliary(self, module: str) -> dict[str, np.ndarray]:
        """Return the vectors that compensate for experts of a layer, by name; none where all chosen experts run.

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
        """Read the routed experts of one layer.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._read(module, self.experts[module].read, TensorEntry.read)

    def abstract_layer(self, module: str) -> CompressedLayer:
        """Return the routed experts of one layer for counting and checks: of its numbers only the integers are read.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._read(module, self.experts[module].read, _counted)

    def linear(self, module: str) -> CompressedLinear:
        """Read one matrix outside of the routed experts.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._read(module, self.linears[module].read, TensorEntry.read)

    def abstract_linear(self, module: str) -> CompressedLinear:
        """Return one matrix outside of the routed experts for counting and checks, as `abstract_layer` does.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        return self._read(module, self.linears[module].read, _counted)

    def _read(self, module: str, rebuild: Callable[[dict[str, Any]], T], take: Callable[[TensorEntry], Any]) -> T:
        own = {name.removeprefix(f"{module}."): name for name in self._names(module)}
        vectors = self._vectors(module) if module in self.experts else {}
        try:
            return rebuild({name: take(self.tensors[whole]) for name, whole in own.items() if name not in vectors})
        except JaxmoeError as error:
            raise JaxmoeError(
                f"{self.folder}: {module} does not hold what config.json says: {error}; write the checkpoint again"
            ) from None

    def count(self) -> Count:
        """Count what the compressed experts store, vectors that compensate for others included."""
        return self._count(self.experts)

    def count_linears(self) -> Count:
        """Count what the compressed matrices outside of the routed experts store."""
        return self._count(self.linears)

    def _count(self, modules: Iterable[str]) -> Count:
        held = [self.tensors[name] for module in modules for name in self._names(module)]
        return Count(sum(entry.numbers for entry in held), sum(entry.bytes for entry in held))

    def dense_config(self) -> dict[str, Any]:
        """Return the configuration of the dense model, as `Checkpoint` does."""
        return without_quantization(self.original)

    def layouts(self) -> dict[str, Any] | None:
        """Return how the dense experts lay on disk, as `Checkpoint` does; None where the record does not say."""
        found = {module: record.layout for module, record in self.experts.items()}
        return None if None in found.values() else msgspec.to_builtins(found)

    def beside(self) -> dict[str, Matrix]:
        """Return the matrices that belong to no compressed module."""
        held = {name for module in (*self.experts, *self.linears) for name in self._names(module)}
        return {name: matrix for name, matrix in self.matrices.items() if name not in held}

    def copied(self) -> list[Planned]:
        """Plan every tensor that belongs to no compressed module, byte for byte."""
        return [planned for matrix in self.beside().values() for planned in as_stored(matrix)]

    def decoded(self) -> list[Planned]:
        """Plan every matrix that belongs to no compressed module, without quantisation where it has one."""
        return [Planned(name, matrix.dtype, matrix.shape, matrix.read) for name, matrix in self.beside().items()]

    def with_quantization(
        self, config: Mapping[str, Any], copied: Sequence[Planned], modules: Collection[str]
    ) -> dict[str, Any]:
        """Return a config that says how tensors which were copied are quantised, as `Checkpoint` does."""
        return leaving_out(config, quantization_config(self.config), copied, modules)

    def linear_tensors(self) -> list[Planned]:
        """Plan every tensor of the compressed matrices outside of the routed experts, byte for byte."""
        held = [self.tensors[name] for module in self.linears for name in self._names(module)]
        return [Planned(entry.name, entry.dtype, entry.shape, entry.read) for entry in held]

    def check_dense(self) -> None:
        """Raise if vectors compensate for some experts: no dense model of the original architecture does that."""
        if self.main:
            raise JaxmoeError(
                f"{self.folder}: vectors compensate for some of a token's experts in {len(self.main)} layers, which"
                " a stock architecture cannot hold: use it as it is, or convert the checkpoint that it was made of"
            )

    def dense_tensors(self, module: str) -> list[Planned]:
        """Plan a module's materialised experts or matrix under the names and in the form that the original had."""
        if (linear := self.linears.get(module)) is not None:
            own, dtype = self.linear(module), np.dtype(linear.layout.dtype)

            def matrix() -> np.ndarray:
                return self._finite(module, "the matrix", own.materialize).astype(dtype)

            return [Planned(linear.layout.name, dtype, tuple(linear.shape), matrix)]
        record = self.experts[module]
        if record.layout is None:
            raise JaxmoeError(f"{self.folder}: config.json does not say how {module} lay on disk: compress again")
        layer = self.layer(module)

        def matrices(projection: str) -> np.ndarray:
            return self._finite(module, projection, partial(layer.materialize, projection))

        return plan_dense(record.layout.stacks, record.shape, np.dtype(record.layout.dtype), matrices)

    def _finite(self, module: str, what: str, materialize: Callable[[], Any]) -> np.ndarray:
        dense = np.asarray(materialize())
        if not np.isfinite(dense).all():
            raise JaxmoeError(
                f"{self.folder}: NaN or infinite weights in {module}, {what}: the checkpoint is damaged,"
                " fetch or write it again"
            )
        return dense


def _counted(entry: TensorEntry) -> Any:
    """Return a tensor without its numbers, unless these are whole and no codes: they decide what is read of others."""
    return entry.read() if entry.dtype[0] in "IU" and not entry.name.endswith(CODED) else entry.abstract()
