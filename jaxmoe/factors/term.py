"""What every term has in common: a summand of the sum that stands for the experts' matrices.

A term is a pytree of arrays with a leading expert axis (or of shared arrays), and knows how to materialise, how to
multiply activations, how many numbers and bytes it stores, what a token costs in it, and how it lies in a file. The
arrays may also be `jax.ShapeDtypeStruct`: such an abstract term is what a plan holds, and counts exactly like the real
one.

A new term is one file: a class with these methods, named in `registry.register`, and a file with its PyTorch twin.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from math import comb, prod
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.spec import TermSpec, as_spec

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


class Work(NamedTuple):
    """The expected cost of one token: stored numbers that it uses, and operations of its matrix products.

    Example:
        >>> Work(3.0, 6.0) + Work(1.0, 2.0)
        Work(numbers=4.0, operations=8.0)
    """

    numbers: float
    operations: float

    def __add__(self, other: tuple) -> "Work":
        return Work(self.numbers + other[0], self.operations + other[1])


def chance(experts: int, chosen: int, size: int) -> float:
    """Return the chance that at least one of a group's experts is among those that a token chooses.

    Every choice is as likely as any other.

    Args:
        experts: how many there are.
        chosen: experts of a token.
        size: experts of the group.

    Example:
        >>> chance(4, 2, 1), chance(4, 2, 3)
        (0.5, 1.0)
    """
    return 1 - comb(experts - size, chosen) / comb(experts, chosen)


def per_expert(rows: Float[AnyArray, "expert row in"], matrices: Float[AnyArray, "expert out in"]):
    """Multiply every expert's own rows by its matrix.

    Example:
        >>> per_expert(jnp.ones((2, 1, 3)), jnp.ones((2, 4, 3))).shape
        (2, 1, 4)
    """
    return jnp.einsum("eti,eoi->eto", rows, matrices.astype(rows.dtype), precision=lax.Precision.HIGHEST)


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


class Term(ABC):
    """One structured summand of the experts' matrices: a dataclass of arrays, each in a tensor of its own.

    From its `Spec`, what stands in files beside the tensors, follows the abstract term (`planned`), and from that the
    names, shapes and dtypes of all tensors. Values that are places, ranks or orders are checked by the term
    (`checked`). On disk every tensor is two-dimensional, experts or bases stacked along the rows: serving engines take
    a module whose parameters are all three-dimensional for a stock expert layer and replace it.

    kind: the name that stands in files; Spec: the type of what stands beside the tensors; named: the tensors that have
    another name than the field; for_all: whether the matrix is the same for all experts, so that a row need not know
    its expert: `apply` then takes rows in any order, `[..., in]`; twin: the module of the PyTorch twin, None for that
    of the kind's name in `jaxmoe.torch.runtime`.
    """

    kind: ClassVar[str]
    Spec: ClassVar[type[TermSpec]]
    named: ClassVar[Mapping[str, str]] = {}
    for_all: ClassVar[bool] = False
    twin: ClassVar[str | None] = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """`(experts, out, in)` of the dense matrices that the term stands for."""

    @abstractmethod
    def materialize(self, experts: slice = EVERY) -> Float[Array, "expert out in"]:
        """Return the dense matrices of all experts, or of some, in float32."""

    @abstractmethod
    def apply(self, rows: Float[AnyArray, "expert row in"], product=per_expert) -> Float[Array, "expert row out"]:
        """Multiply each expert's rows of activations without forming the dense matrices.

        `product(rows, matrices)` multiplies rows by the matrices `[expert, out, in]` of their experts; another one than
        `per_expert` has the rows in another order.
        """

    @abstractmethod
    def described(self) -> TermSpec:
        """Return the `Spec` of this term, abstract or real."""

    @classmethod
    @abstractmethod
    def planned(cls, spec: Any, shape: tuple[int, int, int]) -> Self:
        """Return the abstract term that a `Spec` describes; its float dtypes are of no account.

        Args:
            spec: a `Spec` of this term.
            shape: `(experts, out, in)`.

        Raises:
            JaxmoeError: sizes do not fit together.
        """

    def checked(self) -> Self:
        """Return the term that was read, or raise a `JaxmoeError` if its whole numbers are not what they must be."""
        return self

    def masked(self, rows: Float[AnyArray, "*row in"]) -> Self:
        """Return the term with the choices made that it makes from the rows of a call: itself where it makes none."""
        return self

    @property
    def rank(self) -> int:
        """The rank of the matrices, the mean one where it differs: at most the smaller side of a matrix."""
        return min(self.shape[1:])

    @property
    def known_ranks(self) -> tuple[int, ...] | None:
        """The ranks of its groups of experts, where these have ranks of their own and the values are there."""
        return None

    def work(self, chosen: int) -> Work:
        """Return what a token costs in this term, in the mean over all choices of experts.

        A token that chooses k of E experts uses k / E of what each expert has for itself, all of what all experts
        share, and of what a group shares the `chance` that it chooses one of them. A product of a row with a matrix
        `[out, in]` takes 2 out in operations. What is formed once in every call, however many tokens it has, is not in
        these numbers. Here: all numbers belong to single experts, and matrices are dense where they are used.

        Args:
            chosen: experts of a token.
        """
        experts, out, in_ = self.shape
        return Work(self.count().numbers * chosen / experts, 2.0 * chosen * out * in_)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by the names of their fields; without those that are None."""
        own = ((field.name, getattr(self, field.name)) for field in fields(cast(Any, self)))
        return {name: value for name, value in own if hasattr(value, "dtype")}

    def tensors(self) -> dict[str, Any]:
        """Return the two-dimensional tensors of the file layout by name."""
        return {
            self.named.get(name, name): stack_rows(array) if len(array.shape) == 3 else array
            for name, array in self.arrays().items()
        }

    def spec(self) -> dict[str, Any]:
        """Return what a reader needs beside the tensors, as JSON: `kind` and sizes."""
        return msgspec.to_builtins(self.described())

    def count(self) -> Count:
        """Count stored numbers and bytes, exactly as on disk."""
        return count_arrays(self.arrays().values())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], spec: Mapping[str, Any], shape: tuple[int, int, int]) -> Self:
        """Rebuild the term from its file layout.

        Args:
            tensors: what `tensors` gave, read back.
            spec: what `spec` gave, as decoded JSON.
            shape: `(experts, out, in)`.

        Raises:
            JaxmoeError: the spec, a tensor's name, shape or dtype, or a whole number among them is not what it must be.
        """
        expected = cls.planned(as_spec(spec, cls.Spec, "its record"), shape)
        wanted = expected.arrays()
        names = {name: cls.named.get(name, name) for name in wanted}
        faults = [f"there is no {names[name]}" for name in wanted if names[name] not in tensors]
        faults += [f"{name} belongs to nothing" for name in tensors if name not in names.values()]
        for name, array in expected.tensors().items():
            if name in tensors and (fault := _fault(tensors[name], array)):
                faults.append(f"{name} {fault}")
        if faults:
            raise JaxmoeError("; ".join(faults))
        return replace(
            cast(Any, expected), **{name: tensors[names[name]].reshape(x.shape) for name, x in wanted.items()}
        ).checked()


def _fault(found: Any, wanted: Any) -> str | None:
    """Return what is wrong with a tensor, None if it is as wanted; floats may have any precision of two bytes or more.

    Example:
        >>> _fault(np.zeros((2, 3)), np.zeros((2, 4)))
        'is float64 [2, 3], not float [2, 4]'
    """
    whole = not jnp.issubdtype(wanted.dtype, jnp.floating)
    right = found.dtype == wanted.dtype if whole else jnp.issubdtype(found.dtype, jnp.floating)
    if right and tuple(found.shape) == tuple(wanted.shape) and found.dtype.itemsize > 1:
        return None
    kind = wanted.dtype if whole else "float"
    return f"is {found.dtype} {list(found.shape)}, not {kind} {list(wanted.shape)}"
