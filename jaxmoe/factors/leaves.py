"""The arrays of a term: plain ones, abstract ones of which only shape and dtype are known, and held ones.

A held array stands for floats that lie in the file in another form, such as codes of few bits under scales: it has the
shape and the dtype of what it stands for, and knows its tensors. `values` gives the floats of any of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from math import prod
from typing import Any, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray

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


class Held(ABC):
    """An array of floats that is stored in another form: a dataclass of arrays, and a pytree of them."""

    shape: tuple[int, ...]

    dtype = np.dtype(np.float32)
    """Of what it stands for."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abstractmethod
    def values(self, experts: slice = EVERY) -> Float[Array, "..."]:
        """Return the floats, or those of some items of the first axis, in float32."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, Any]:
        """Return the two-dimensional tensors of the file layout, each by a name that begins with that of the array."""

    @abstractmethod
    def restored(self, tensors: Mapping[str, Any], name: str) -> Self:
        """Return the array with real tensors, by the names of `tensors`, in place of its own."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what a reader needs beside the tensors and the shape, as JSON."""

    def count(self) -> Count:
        """Count stored numbers and bytes, exactly as on disk."""
        return count_arrays(self.tensors("").values())


Leaf: Any = AnyArray | jax.ShapeDtypeStruct | Held
"""What a field of floats may hold."""


def values(array: Any, experts: slice = EVERY) -> Float[Array, "..."]:
    """Return the numbers of a plain or a held array, or those of some items of its first axis, in float32.

    Example:
        >>> values(np.ones((3, 2), np.float16), slice(2)).dtype, values(np.ones((3, 2)), slice(2)).shape
        (dtype('float32'), (2, 2))
    """
    return array.values(experts) if isinstance(array, Held) else jnp.asarray(array[experts], jnp.float32)


def plain(array: Any) -> Any:
    """Return a plain array as it is, a held one's values.

    Example:
        >>> plain(np.ones(2, np.float16)).dtype
        dtype('float16')
    """
    return array.values() if isinstance(array, Held) else array


def count_arrays(arrays) -> Count:
    """Count the elements and bytes of arrays, abstract, real or held.

    Example:
        >>> count_arrays([Abstract((2, 3), "float32")])
        Count(numbers=6, bytes=24)
    """
    total = Count(0, 0)
    for array in arrays:
        if isinstance(array, Held):
            total += array.count()
            continue
        numbers = prod(array.shape)
        total += (numbers, numbers * np.dtype(array.dtype).itemsize)
    return total
