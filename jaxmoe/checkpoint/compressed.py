"""A factored checkpoint that jaxmoe wrote, opened: its compressed layers, mapped from the files, and everything else.

The record in its `config.json` says what each layer's terms are and how the dense experts lay on disk before, so that
they can be written back in just that form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.layout import Stack, plan_dense
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry, listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.factored import is_factored, read_main_experts, read_spec
from jaxmoe.factors import CompressedLayer, Count, LayerShape
from jaxmoe.model.auxiliary import MainExperts, vector_shapes


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressedCheckpoint:
    """A folder with factored experts.

    Args:
        folder: where it lies.
        config: its `config.json`.
        original: the configuration of the dense model that it stands for.
        shapes: sizes of each compressed layer, by the path of its experts' module.
        specs: the kinds and sizes of its terms, likewise.
        main: the experts that run, of the layers where vectors stand in for the others.
        tensors: every tensor on disk by name.
    """

    folder: Path
    config: Mapping[str, Any]
    original: Mapping[str, Any]
    shapes: Mapping[str, LayerShape]
    specs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    main: Mapping[str, MainExperts]
    tensors: Mapping[str, TensorEntry] = field(repr=False)

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
        original, layers = read_spec(config)
        opened = cls(
            folder=folder,
            config=config,
            original=original,
            shapes={module: shape for module, (shape, _) in layers.items()},
            specs={module: spec for module, (_, spec) in layers.items()},
            main=read_main_experts(config),
            tensors=files.read_tensors(folder),
        )
        for module in opened.modules:
            opened.layer(module)
            opened.auxiliary(module)
        return opened

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the compressed experts' modules, in the order of the layers."""
        return tuple(self.shapes)

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
        targets = tuple(f"{module}.{target}." for target in self.specs[module])
        vectors = {f"{module}.{name}" for name in self._vectors(module)}
        return [name for name in self.tensors if name.startswith(targets) or name in vectors]

    def _vectors(self, module: str) -> dict[str, tuple[int, int]]:
        return vector_shapes(self.shapes[module]) if module in self.main else {}

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
            vectors[name] = entry.view()
        return vectors

    def layer(self, module: str) -> CompressedLayer:
        """Return one compressed layer, its arrays views of the files.

        Raises:
            JaxmoeError: a tensor is missing or has another size than the config says.
        """
        views = {name.removeprefix(f"{module}."): self.tensors[name].view() for name in self._names(module)}
        try:
            return CompressedLayer.from_tensors(views, self.specs[module], self.shapes[module])
        except (KeyError, ValueError) as error:
            if isinstance(error, JaxmoeError):
                raise
            raise JaxmoeError(
                f"{self.folder}: {module} does not hold what config.json says ({error}; it holds "
                f"{listing(sorted(views))}): write the checkpoint again"
            ) from None

    def count(self) -> Count:
        """Count what the compressed layers store, vectors that stand in for experts included."""
        held = [self.tensors[name] for module in self.modules for name in self._names(module)]
        return Count(sum(entry.numbers for entry in held), sum(entry.bytes for entry in held))

    def dense_config(self) -> dict[str, Any]:
        """Return the configuration of the dense model, as `Checkpoint` does."""
        return dict(self.original)

    def layouts(self) -> dict[str, Any] | None:
        """Return how the dense experts lay on disk, as `Checkpoint` does; None where the record does not say."""
        layouts = {module: entry.get("layout") for module, entry in self.config["jaxmoe"]["experts"].items()}
        return None if None in layouts.values() else layouts

    def copied(self) -> list[Planned]:
        """Plan every tensor that belongs to no compressed layer, byte for byte."""
        held = {name for module in self.modules for name in self._names(module)}
        return [
            Planned(name, entry.dtype, entry.shape, entry.view)
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
        layout = self.config["jaxmoe"]["experts"][module].get("layout")
        if layout is None:
            raise JaxmoeError(f"{self.folder}: config.json does not say how {module} lay on disk: compress again")
        layer = self.layer(module)
        stacks = [Stack(**stack) for stack in layout["stacks"]]

        def produce(projection: str) -> np.ndarray:
            return np.asarray(layer.materialize(projection))

        return plan_dense(stacks, self.shapes[module], np.dtype(layout["dtype"]), produce)
