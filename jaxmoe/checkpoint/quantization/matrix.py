"""A matrix of a checkpoint, plain or quantised."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry


@runtime_checkable
class Matrix(Protocol):
    """What the reader asks of a tensor, plain or quantised: `TensorEntry` and `Quantized` both answer."""

    @property
    def name(self) -> str:
        """Under which transformers would save it without quantisation."""
        ...

    @property
    def dtype(self) -> str:
        """Code of the dtype that `read` returns."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements, as `read` returns it."""
        ...

    @property
    def numbers(self) -> int:
        """Elements."""
        ...

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The tensors on disk."""
        ...

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the values, or those at an index of the first axis."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix that several tensors stand for.

    Args:
        name: under which transformers would save it without quantisation.
        shape: of the matrix.
        parts: the tensors on disk.
        decode: computes the values from the parts' arrays.
        stacked: whether the first axis is that of the experts, so that one of them can be read alone.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]
    decode: Callable[..., np.ndarray]
    stacked: bool = False
    dtype: str = "BF16"

    @property
    def numbers(self) -> int:
        """Elements of the matrix; scales do not count."""
        return prod(self.shape)

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the values in bfloat16, or those at an index of the first axis.

        Raises:
            JaxmoeError: the tensors contradict one another.
        """
        if index is ...:
            return self.decode(*(part.read() for part in self.parts))
        if not self.stacked:
            return self.read()[index]
        # One scale may serve all experts.
        each = (part.shape[:1] == self.shape[:1] for part in self.parts)
        return self.decode(*(part.read(index if own else ...) for part, own in zip(self.parts, each, strict=True)))


def as_stored(matrix: Matrix) -> list[Planned]:
    """Plan the tensors of a matrix as they lie on disk; of several, the first stands for all its numbers."""
    first, *others = matrix.parts
    planned = [Planned(first.name, first.dtype, first.shape, first.read, matrix.numbers if others else None)]
    return planned + [Planned(part.name, part.dtype, part.shape, part.read, 0) for part in others]


class Faults(NamedTuple):
    """What is wrong with weights in a scheme that is read, and what is of another one; one line each."""

    damaged: list[str]
    unread: list[str]
