"""What every factor type has in common: a term of the sum that stands for the experts' matrices.

A term is a pytree of arrays with a leading expert axis (or of shared arrays), and knows four things: how to
materialise, how to multiply activations, how many numbers and bytes it stores, and how it lies in a file (`stored`).
The arrays may also be `jax.ShapeDtypeStruct`: such an abstract term is what a plan holds, and counts exactly like the
real one.
"""

from collections.abc import Mapping
from dataclasses import fields
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Any to type checkers: a term's arrays may be JAX's, numpy's or abstract, and only real ones are computed with.
Abstract: Any = jax.ShapeDtypeStruct
"""An array of which only shape and dtype are known."""


EVERY = slice(None)
"""All experts."""


class Count(NamedTuple):
    """What is stored: `numbers` (elements of the saved tensors) and `bytes` (their size on disk).

    Example:
        >>> Count(3, 6) + Count(1, 4)
        Count(numbers=4, bytes=10)
    """

    numbers: int
    bytes: int

    def __add__(self, other: tuple) -> "Count":
        return Count(self.numbers + other[0], self.bytes + other[1])


def per_expert(rows: Float[Array, "expert row in"], matrices: Float[Array, "expert out in"]):
    """Multiply every expert's own rows by its matrix.

    Example:
        >>> per_expert(jnp.ones((2, 1, 3)), jnp.ones((2, 4, 3))).shape
        (2, 1, 4)
    """
    return jnp.einsum("eti,eoi->eto", rows, matrices.astype(rows.dtype), precision=lax.Precision.HIGHEST)


class Term(Protocol):
    """One structured summand of the experts' matrices.

    kind: the name that stands in files; for_all: whether the matrix is the same for all experts, so that a row need not
    know its expert: `apply` then takes rows in any order, `[..., in]`.
    """

    kind: ClassVar[str]
    for_all: ClassVar[bool]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(experts, out, in)` of the dense matrices that the term stands for."""
        ...

    def materialize(self, experts: slice = EVERY) -> Float[Array, "expert out in"]:
        """Return the dense matrices of all experts, or of some, in float32."""
        ...

    def apply(self, rows: Float[Array, "expert row in"], product=per_expert) -> Float[Array, "expert row out"]:
        """Multiply each expert's rows of activations without forming the dense matrices.

        `product(rows, matrices)` multiplies rows by the matrices `[expert, out, in]` of their experts; another one than
        `per_expert` has the rows in another order.
        """
        ...

    def count(self) -> Count:
        """Count stored numbers and bytes, exactly as on disk."""
        ...

    def tensors(self) -> dict[str, Any]:
        """Return the two-dimensional tensors of the file layout by name."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return what a reader needs beside the tensors, as JSON: `kind` and sizes."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], spec: Mapping[str, Any], shape: tuple[int, int, int]) -> Self:
        """Rebuild the term from its file layout."""
        ...


T = TypeVar("T")


def pytree(*, static: tuple[str, ...] = ()):
    """Register a frozen dataclass as a pytree; `static` names the fields that are not arrays.

    Unflattening bypasses `__init__`: transformations put placeholders where arrays are declared, and a run-time check
    of the declared shapes must not see them.
    """

    def register(cls: type[T]) -> type[T]:
        data = tuple(f.name for f in fields(cast(Any, cls)) if f.name not in static)

        def flatten(record):
            children = tuple((jax.tree_util.GetAttrKey(name), getattr(record, name)) for name in data)
            return children, tuple(getattr(record, name) for name in static)

        def unflatten(aux, children):
            record = object.__new__(cls)
            for name, value in zip(data + static, tuple(children) + aux, strict=True):
                object.__setattr__(record, name, value)
            return record

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


def count_arrays(arrays) -> Count:
    """Count the elements and bytes of arrays, abstract or real.

    Example:
        >>> count_arrays([Abstract((2, 3), "float32")])
        Count(numbers=6, bytes=24)
    """
    total = Count(0, 0)
    for array in arrays:
        numbers = prod(array.shape)
        total += (numbers, numbers * np.dtype(array.dtype).itemsize)
    return total


def stack_rows(array):
    """Reshape `[item, row, column]` to the file layout `[item * row, column]`, abstract or real."""
    items, rows, columns = array.shape
    if isinstance(array, Abstract):
        return Abstract((items * rows, columns), array.dtype)
    return array.reshape(items * rows, columns)
