"""A statistics folder, opened: the layers' records, merged over the domains that one asks for.

    STATISTICS/statistics.json                  what it was gathered from; written last
    STATISTICS/code/layer00003.safetensors      sums over the tokens of one domain and layer

Opening reads the small JSON alone. Sums are read when asked for, from mapped files; matrices lie there in float32 and
are merged in float64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.calibration.inputs import STORED, InputMoment
from jaxmoe.calibration.record import Record
from jaxmoe.calibration.statistics import FIELDS, LayerStatistics, kept, merge_arrays
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import layer_index
from jaxmoe.checkpoint.tensor_file import CODES, TensorEntry, listing, read_header
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.roles import BLOCK_INPUT
from jaxmoe.texts import tokenizer_fingerprint

RECORD = "statistics.json"


def layer_path(domain: str, index: int) -> str:
    """Return where the record of one domain and layer lies in the folder.

    Example:
        >>> layer_path("code", 3)
        'code/layer00003.safetensors'
    """
    return f"{domain}/layer{index:05d}.safetensors"


def layer_arrays(record: Record, index: int) -> tuple[str, ...]:
    """Return the names of the arrays that a layer's files hold."""
    return kept(record.layers[index], moments=record.moments, gradients=record.gradients is not None)


def stored_dtype(name: str) -> str:
    """Return the dtype in which an array of a layer's file lies there, of the experts' or another input's moment.

    Example:
        >>> stored_dtype("counts"), stored_dtype("attention.input")
        ('int64', 'float32')
    """
    return FIELDS[name].stored if name in FIELDS else STORED


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """A finished statistics folder.

    Args:
        folder: where it lies.
        record: what it was gathered from.

    Example:
        >>> statistics = Statistics.open("statistics")  # doctest: +SKIP
        >>> statistics.layer(3, domains=["code"]).counts  # doctest: +SKIP
    """

    folder: Path
    record: Record

    @classmethod
    def open(cls, folder: str | Path) -> "Statistics":
        """Open a statistics folder.

        Raises:
            JaxmoeError: it is not there, not finished, damaged, or of a newer schema.
        """
        folder = Path(folder).expanduser()
        if not (folder / RECORD).is_file():
            if folder.with_name(folder.name + ".partial").is_dir():
                raise JaxmoeError(
                    f"{folder} is not finished: run the same calibration again, it resumes where it stopped"
                )
            raise JaxmoeError(f"{folder} has no {RECORD}: give a folder that `jaxmoe calibrate` wrote")
        return cls(folder=folder, record=Record.read(folder / RECORD))

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(self.record.domains)

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the layers."""
        return tuple(sorted(self.record.layers))

    @property
    def keeps(self) -> frozenset[str]:
        """The names of the arrays that are kept of every layer."""
        return frozenset(layer_arrays(self.record, self.layers[0]))

    @property
    def reads(self) -> tuple[Path, ...]:
        """The folder, into which nothing else may be written."""
        return (self.folder,)

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the model, the texts and what was kept of them."""
        return fingerprint(self.record.as_json())

    def describe(self) -> dict[str, Any]:
        """Return what a report says of these statistics."""
        return {"sequential": False, **self.record.describe()}

    def follow(self, index: int, parameters: Any) -> None:
        """Do nothing: these sums are of the original model, whatever becomes of its layers."""

    def layer(self, index: int, domains: Iterable[str] | None = None) -> LayerStatistics:
        """Return the record of one layer.

        Args:
            index: of the decoder layer.
            domains: whose tokens, all if None.

        Raises:
            JaxmoeError: there is no such layer or domain, or a file is damaged.
        """
        chosen = self._chosen([index], domains)
        return LayerStatistics(
            shape=self.record.layers[index],
            tokens=sum(map(self.record.tokens, chosen)),
            sequences=sum(map(self.record.sequences, chosen)),
            **{name: self.read(index, name, chosen) for name in layer_arrays(self.record, index)},
        )

    def read(
        self, index: int, name: str, domains: Iterable[str] | None = None, experts: slice = slice(None)
    ) -> np.ndarray:
        """Return one array of a layer's record, or its rows of some experts: what memory can hold of a large layer.

        Args:
            index: of the decoder layer.
            name: one of `FIELDS`.
            domains: whose tokens, all if None.
            experts: which rows of the array.

        Raises:
            JaxmoeError: it was not kept, or holds what no sum can be: NaN, infinity, or less than nothing.
        """
        chosen = self._chosen([index], domains)
        if name not in layer_arrays(self.record, index):
            known = ", ".join(layer_arrays(self.record, index))
            raise JaxmoeError(f"{self.folder} did not keep {name} of layer {index}: calibrate again, it has {known}")
        parts = (self._part(domain, index, name, experts) for domain in chosen)
        return reduce(lambda a, b: merge_arrays(name, a, b), parts)

    def inputs(self, index: int, name: str, domains: Iterable[str] | None = None) -> InputMoment | None:
        """Return the second moment of what some linear maps of a layer read; None where it was not kept.

        Args:
            index: of the decoder layer.
            name: of the activation, see `inputs.py`.
            domains: whose tokens, all if None.

        Raises:
            JaxmoeError: there is no such domain, or a file is damaged.
        """
        chosen = self._chosen([], domains)
        tokens = sum(map(self.record.tokens, chosen))
        if name == BLOCK_INPUT and index in self.record.layers:
            kept = "input_moment" in layer_arrays(self.record, index)
            return InputMoment(self.read(index, "input_moment", chosen), tokens) if kept else None
        if name not in self.record.inputs.get(index, {}):
            return None
        parts = [self._entries(domain, index)[name].read().astype("float64") for domain in chosen]
        total = reduce(np.add, parts)
        if not np.isfinite(total).all():
            raise JaxmoeError(
                f"{self.folder}: {name} of layer {index} is not finite: a file was damaged or edited, calibrate again"
            )
        return InputMoment(total, tokens)

    def _part(self, domain: str, index: int, name: str, experts: slice) -> np.ndarray:
        part = self._entries(domain, index)[name].read(experts).astype(FIELDS[name].dtype)
        # Row by row: the large ones are as large as memory allows.
        if not all(FIELDS[name].possible(row) for row in part):
            raise JaxmoeError(
                f"{self.folder / layer_path(domain, index)}: {name} holds what no sum over tokens can be (NaN, infinity"
                " or a negative number): the file was damaged or edited, calibrate again"
            )
        return part

    def check(
        self,
        checkpoint: Checkpoint | CompressedCheckpoint | None = None,
        *,
        layers: Iterable[int] | None = None,
        domains: Iterable[str] | None = None,
    ) -> "Statistics":
        """Return self, or raise unless these statistics are whole and serve a checkpoint.

        Args:
            checkpoint: of which they are to be; None if that does not matter.
            layers: that are needed; those of the checkpoint if None.
            domains: that are needed, all that there are if None.

        Raises:
            JaxmoeError: they are of another model or tokenizer, lack a layer or domain, or a file is missing or
                damaged; all such files are listed.
        """
        if checkpoint is not None:
            if self.record.model != checkpoint.fingerprint():
                raise JaxmoeError(
                    f"{self.folder} is of another model than {checkpoint.folder}: calibrate with this very checkpoint"
                )
            found = tokenizer_fingerprint(checkpoint.folder)
            if None not in (self.record.tokenizer, found) and self.record.tokenizer != found:
                raise JaxmoeError(
                    f"{self.folder} was gathered with another tokenizer than that of {checkpoint.folder}:"
                    " calibrate again"
                )
            if layers is None:
                layers = list(_shapes(checkpoint))
        others = [index for index in self.record.visited if index not in self.record.layers]
        needed = list(self.layers if layers is None else layers)
        chosen = self._chosen(needed, domains)
        if checkpoint is not None:
            shapes = _shapes(checkpoint)
            if wrong := [str(i) for i in needed if i in shapes and shapes[i] != self.record.layers[i]]:
                raise JaxmoeError(f"{self.folder} has other shapes than the model in layers {', '.join(wrong)}")
        problems = []
        for domain in chosen:
            for index in sorted({*needed, *others}):
                try:
                    self._entries(domain, index)
                except JaxmoeError as error:
                    problems.append(str(error))
        if problems:
            raise JaxmoeError(listing(problems, 8))
        return self

    def _chosen(self, layers: Sequence[int], domains: Iterable[str] | None) -> list[str]:
        if missing := [str(index) for index in layers if index not in self.record.layers]:
            known = ", ".join(map(str, self.layers))
            raise JaxmoeError(f"{self.folder} has no layer {', '.join(missing)}: calibrate them too, it has {known}")
        chosen = list(self.domains if domains is None else dict.fromkeys(domains))
        if unknown := [name for name in chosen if name not in self.record.domains]:
            raise JaxmoeError(
                f"{self.folder} has no domain {', '.join(unknown)}: the domains there are {', '.join(self.domains)}"
            )
        if not chosen:
            raise JaxmoeError(f"no domain chosen: those of {self.folder} are {', '.join(self.domains)}")
        return chosen

    def _entries(self, domain: str, index: int) -> dict[str, TensorEntry]:
        path = self.folder / layer_path(domain, index)
        entries = read_header(path)
        shapes = {name: (size, size) for name, size in self.record.inputs.get(index, {}).items()}
        if (sizes := self.record.layers.get(index)) is not None:
            shapes |= {name: FIELDS[name].shape(sizes) for name in layer_arrays(self.record, index)}
        for name, shape in shapes.items():
            code = CODES[np.dtype(stored_dtype(name))]
            if name not in entries or (entries[name].dtype, entries[name].shape) != (code, shape):
                raise JaxmoeError(f"{path} does not hold {name} as {RECORD} says: calibrate again")
        return entries


def _shapes(checkpoint: Checkpoint | CompressedCheckpoint) -> dict[int, LayerShape]:
    """Return the sizes of the layers with routed experts."""
    if isinstance(checkpoint, CompressedCheckpoint):
        return {layer_index(module): shape for module, shape in checkpoint.shapes.items()}
    return {layer.index: layer.shape for layer in checkpoint.layers}
