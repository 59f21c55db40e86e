"""Write a statistics folder, one domain and layer at a time; a killed run resumes where it stopped.

Work lies in `STATISTICS.partial` with a journal (`checkpoint.workspace`), and gets its name when every record is there.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxmoe.calibration.folder import RECORD, Statistics, layer_arrays, layer_path, stored_dtype
from jaxmoe.calibration.record import Record
from jaxmoe.calibration.statistics import FIELDS, LayerStatistics
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.mapped import create_mapped
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import Planned, write_tensors
from jaxmoe.checkpoint.workspace import Unit, Workspace, fingerprint, make_folder, sweep
from jaxmoe.errors import JaxmoeError


def _unit(key: tuple[str, int]) -> Unit:
    domain, index = key
    return Unit(f"{domain}-layer{index:05d}", layer_path(domain, index))


class StatisticsWriter:
    """A statistics folder in the making.

    Args:
        folder: that is to be; it appears when it is complete.
        record: what is gathered, known beforehand: an unfinished folder with another record is refused.

    Example:
        >>> writer = StatisticsWriter("statistics", record)  # doctest: +SKIP
        >>> with writer.opened():  # doctest: +SKIP
        ...     for domain, index in writer.missing():
        ...         writer.write(domain, index, gather(domain, index))
        ...     statistics = writer.publish()
    """

    def __init__(self, folder: str | Path, record: Record):
        self.folder = output_folder(folder)
        self.record = record
        self.workspace = Workspace(self.folder, record.as_json(), _unit)
        self._key = fingerprint(record.as_json())

    def finished(self) -> Statistics | None:
        """Return the statistics if this very run was completed before, None where there is no such folder.

        Raises:
            JaxmoeError: something else stands there.
        """
        if not self.folder.exists():
            return None
        if not (self.folder / RECORD).is_file() or Record.read(self.folder / RECORD) != self.record:
            self.workspace.check_free()
        sweep(self.folder)
        return Statistics.open(self.folder).check()

    @contextmanager
    def opened(self, *, resume: bool = True) -> Iterator[None]:
        """Open the unfinished folder for the length of a `with` block; nobody else may work on it meanwhile.

        Args:
            resume: whether to resume an unfinished run; False starts over.

        Raises:
            JaxmoeError: the output exists, the folder was begun with another record, or another process works on it.
        """
        self.workspace.check_free()
        with self.workspace.opened([], resume=resume), self.workspace.exclusive("calibration"):
            yield

    def missing(self) -> list[tuple[str, int]]:
        """Return the domains and layers that are not written yet, or not whole, layer by layer."""
        pairs = [(domain, index) for index in self.record.visited for domain in self.record.domains]
        return [pair for pair in pairs if self.workspace.entry(pair, self._key) is None]

    def write(
        self,
        domain: str,
        index: int,
        statistics: LayerStatistics | None,
        inputs: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Write the record of one domain and layer.

        Args:
            domain: whose tokens it counts.
            index: of the decoder layer.
            statistics: of its routed experts, None where none are announced.
            inputs: second moments of its other linear maps' inputs, by activation, `[in, in]`.

        Raises:
            JaxmoeError: it is not what the folder's record announces, or holds NaN or infinite sums.
        """
        self._check(domain, index, statistics, inputs)
        arrays = {**({} if statistics is None else statistics.arrays()), **inputs}
        tensors = [
            Planned(name, stored_dtype(name), array.shape, partial(self._stored, array, stored_dtype(name)))
            for name, array in arrays.items()
        ]
        path = self.workspace.folder / layer_path(domain, index)
        make_folder(path.parent)
        checksum = write_tensors(path, tensors)
        self.workspace.finish((domain, index), self._key, checksum, {"domain": domain, "layer": index})

    def _stored(self, array: np.ndarray, dtype: str) -> np.ndarray:
        """Return an array in the dtype in which it is stored, in a mapped file if it came in one."""
        if not isinstance(array, np.memmap):
            return array.astype(dtype)
        stored = create_mapped(self.workspace.journal / "stored.sums", dtype, array.shape)
        for row, part in enumerate(array):
            stored[row] = part
        return stored

    def publish(self) -> Statistics:
        """Give the complete folder its name, and return it opened.

        Raises:
            JaxmoeError: a record is missing.
        """
        if missing := self.missing():
            domain, index = missing[0]
            raise JaxmoeError(
                f"{len(missing)} records are missing in {self.workspace.folder}, first layer {index} of {domain}:"
                " write them all before publishing"
            )
        content = json.dumps(self.record.as_json(), indent=2)
        write_bytes(self.workspace.folder / RECORD, content.encode())
        self.workspace.publish()
        return Statistics.open(self.folder)

    def _check(self, domain: str, index: int, statistics: LayerStatistics | None, inputs) -> None:
        shape, record = self.record.layers.get(index), self.record
        sizes = {name: (size, size) for name, size in record.inputs.get(index, {}).items()}
        pairs: dict[str, tuple[Any, Any]] = {
            "shape": (None if statistics is None else statistics.shape, shape),
            "inputs": ({name: array.shape for name, array in inputs.items()}, sizes),
        }
        if shape is not None and statistics is not None:
            pairs |= {
                "tokens": (statistics.tokens, record.tokens(domain)),
                "sequences": (statistics.sequences, record.sequences(domain)),
                "arrays": (tuple(statistics.arrays()), layer_arrays(record, index)),
            }
        if wrong := [
            f"{name} {given}, not {announced}" for name, (given, announced) in pairs.items() if given != announced
        ]:
            raise JaxmoeError(f"layer {index} of {domain} does not fit the record of {self.folder}: {'; '.join(wrong)}")
        for name, array in {**({} if statistics is None else statistics.arrays()), **inputs}.items():
            # Row by row: the large ones are as large as memory allows.
            bad = [row for row, part in enumerate(array) if not _finite(part, stored_dtype(name))]
            if bad:
                of_experts = name in FIELDS and FIELDS[name].axes[0] == "experts"
                where = f", expert {', '.join(map(str, bad[:8]))}" if of_experts else ""
                raise JaxmoeError(
                    f"NaN or infinite {name} in layer {index}{where} on {domain}: the model's activations overflow;"
                    " check its weights, or compute in a wider dtype"
                )


def save(folder: str | Path, record: Record, statistics: Mapping[str, Mapping[int, LayerStatistics]]) -> Statistics:
    """Write statistics that lie in memory, such as those of `jaxmoe.torch.statistics`.

    Args:
        folder: to create.
        record: what they were gathered from.
        statistics: for each domain the record of each layer.
    """
    writer = StatisticsWriter(folder, record)
    with writer.opened(resume=False):
        for domain, index in writer.missing():
            writer.write(domain, index, statistics[domain][index])
        return writer.publish()


def _finite(array: np.ndarray, stored: str) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(stored)).all())
