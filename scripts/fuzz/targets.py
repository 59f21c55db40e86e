"""What the fuzzers run: each takes any bytes, and may raise nothing but `JaxmoeError`.

The first byte says how the rest is meant: as the input itself, or as a list of choices that edit a valid one (see
`tests/hostile/edits.py`), which gets deeper than bytes that a parser refuses at once.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import plain_checkpoint
import tiny_models
from hostile.edits import edit_json, edit_safetensors

from jaxmoe.checkpoint import files
from jaxmoe.checkpoint.factored_format import (
    ExpertsModule,
    LinearLayout,
    LinearModule,
    Module,
    factored_config,
    read_record,
)
from jaxmoe.checkpoint.families import decoder_config, decoder_spec, find_family
from jaxmoe.checkpoint.inspection import inspect
from jaxmoe.checkpoint.tensor_file import file_metadata, read_header
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import (
    CompressedLayer,
    CompressedLinear,
    Dense,
    Grouped,
    Hashed,
    LayerShape,
    LinearShape,
    LowRank,
    Merged,
    Shared,
    SharedBasis,
    Sparse,
)

MEMORY = Path("/dev/shm")
"""A disk in memory, where there is one."""


def choices(data: bytes) -> Callable[[int], int]:
    """Return a function that takes its choices from bytes, two at a time; zeros when they are used up."""
    numbers: Iterator[int] = (int.from_bytes(data[place : place + 2], "little") for place in range(0, len(data), 2))
    return lambda count: next(numbers, 0) % max(1, count)


class Safetensors:
    """A safetensors file: its header, and the values of every tensor that the header admits."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.path = self.folder / "model.safetensors"
        plain_checkpoint.write(self.folder / "plain")
        self.valid = (self.folder / "plain" / "model.safetensors").read_bytes()

    def seeds(self) -> Iterator[bytes]:
        """Yield inputs to begin with."""
        header = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
        text = json.dumps(header).encode()
        yield b"\0" + len(text).to_bytes(8, "little") + text + bytes(8)
        yield from (b"\1" + bytes(range(start, start + 24)) for start in range(0, 200, 25))

    def __call__(self, data: bytes) -> None:
        """Read one."""
        raw = data[1:] if data[:1] == b"\0" else edit_safetensors(self.valid, choices(data[1:]))
        self.path.write_bytes(raw)
        for entry in read_header(self.path).values():
            assert entry.read().nbytes == entry.bytes or not entry.bytes
            file_metadata(entry.shard)


class Config:
    """A `config.json`: what is read of it, the decoder that it describes, and the checkpoint that it belongs to."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None)) / "plain"
        plain_checkpoint.write(self.folder)
        own = tiny_models._CONFIGS
        self.valid: list[dict[str, Any]] = [plain_checkpoint.CONFIG]
        self.valid += [{**tiny_models._COMMON, **own[family], "model_type": family} for family in own]
        self.shapes = {index: LayerShape(experts=8, hidden=64, intermediate=24) for index in (0, 1)}

    def seeds(self) -> Iterator[bytes]:
        """Yield inputs to begin with."""
        yield b"\0" + json.dumps(plain_checkpoint.CONFIG).encode()
        yield from (b"\1" + number.to_bytes(2, "little") + bytes(range(number, number + 16)) for number in range(45))

    def __call__(self, data: bytes) -> None:
        """Read one."""
        path = self.folder / "config.json"
        if data[:1] == b"\0":
            path.write_bytes(data[1:])
        else:
            choose = choices(data[1:])
            valid = self.valid[choose(len(self.valid))]
            path.write_text(json.dumps(edit_json(valid, choose, edits=1 + choose(3))))
        config = files.read_config(self.folder)
        with suppress(JaxmoeError):
            inspect(self.folder)
        if find_family(config) is not None:
            decoder_spec(decoder_config(config), self.shapes)


class Record:
    """The record of a factored checkpoint, and the tensors that go with it."""

    def __init__(self) -> None:
        self.sizes = LayerShape(experts=5, hidden=7, intermediate=4)
        up, down = self.sizes.of("up"), self.sizes.of("down")
        abstract = (
            {"gate_up": (LowRank.abstract(self.sizes.of("gate_up"), "float32", rank=2),)},
            {"gate": (Dense.abstract(up, "float32"),), "up": (Merged.abstract(up, "float32", clusters=2),)},
            {
                "gate": (SharedBasis.abstract(up, "float32", bases=2, rank=3, activation="tanh", mean=True),),
                "up": (Grouped.abstract(up, "float32", total=10, size=1, ordered=True, mixed=True),),
            },
            {
                "gate": (Shared.abstract(up, "float32", kept=3), Sparse.abstract(up, "float32", entries=0)),
                "up": (Hashed.abstract(up, "float32", buckets=9, size=2, ordered=True),),
            },
        )
        rest: dict[str, Any] = {"down": (LowRank.abstract(down, "float32", rank=1),)}
        layers = [CompressedLayer(terms={**terms, **rest}, sizes=self.sizes) for terms in abstract]
        self.modules: list[tuple[CompressedLayer | CompressedLinear, Module]] = [
            (layer, ExpertsModule(self.sizes, layer.spec())) for layer in layers
        ]
        sizes = LinearShape(4, 7)
        terms = (LowRank.abstract(sizes.terms, "float32", rank=2), Sparse.abstract(sizes.terms, "float32", entries=0))
        linear = CompressedLinear(sizes=sizes, terms=terms)
        self.modules.append((linear, LinearModule(sizes, linear.spec(), LinearLayout("float32", "a.weight"))))

    def seeds(self) -> Iterator[bytes]:
        """Yield inputs to begin with."""
        yield from (bytes([number]) + bytes(range(number, number + 20)) for number in range(0, 60, 3))

    def __call__(self, data: bytes) -> None:
        """Read one."""
        choose = choices(data)
        stored, module = self.modules[choose(len(self.modules))]
        config = factored_config({"model_type": "qwen3_moe", "hidden_size": 7}, {"model.layers.0.mlp.experts": module})
        config = edit_json(json.loads(json.dumps(config)), choose, edits=choose(4))
        if not isinstance(config, dict):
            return
        tensors: dict[str, Any] = {name: np.zeros(x.shape, x.dtype) for name, x in stored.tensors().items()}
        for name in tensors:
            # The same places in tensors that hold ranks, orders and labels, so that whole inputs exist.
            if tensors[name].dtype.kind == "i":
                tensors[name] = np.arange(tensors[name].size, dtype=np.int32).reshape(tensors[name].shape) % (
                    5 if name.endswith("order") else 2 + choose(3)
                )
        if choose(2):
            name = list(tensors)[choose(len(tensors))]
            rows, columns = tensors[name].shape
            shapes = ((columns, rows), (rows + 1, columns), (rows * columns,), (0, columns), (rows, columns, 1))
            dtype = ("float32", "int32", "int64", "float16", "bool")[choose(5)]
            tensors[name] = np.full(shapes[choose(5)], choose(300) - 100).astype(dtype)
        for found in read_record(config)[1].values():
            read = found.read(tensors)
            assert read.count().numbers == sum(x.size for x in tensors.values())


TARGETS: dict[str, Callable[[], Safetensors | Config | Record]] = {
    "safetensors": Safetensors,
    "config": Config,
    "record": Record,
}
