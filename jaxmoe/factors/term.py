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
from math import comb
from typing import Any, ClassVar, NamedTuple, Self, cast

import jax.numpy as jnp
import msgspec
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Count, Held, count_arrays
from jaxmoe.factors.quantised import held_array
from jaxmoe.factors.spec import TermSpec, as_spec


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
        return _tensors(self.arrays(), self.named)

    def spec(self) -> dict[str, Any]:
        """Return what a reader needs beside the tensors, as JSON: `kind`, sizes, and `stores` of arrays in few bits."""
        arrays = {self.named.get(name, name): array for name, array in self.arrays().items()}
        held = {name: array.record() for name, array in arrays.items() if isinstance(array, Held)}
        return msgspec.to_builtins(self.described()) | ({"stores": held} if held else {})

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
        sizes = {name: value for name, value in spec.items() if name != "stores"}
        expected = cls.planned(as_spec(sizes, cls.Spec, "its record"), shape)
        wanted = expected.arrays()
        fields_by_name = {cls.named.get(name, name): name for name in wanted}
        for name, record in as_spec(spec.get("stores", {}), dict[str, dict[str, Any]], "its stores").items():
            field = fields_by_name.get(name)
            if field is None or not jnp.issubdtype(wanted[field].dtype, jnp.floating):
                raise JaxmoeError(f"{name!r} is no array that can be held in few bits")
            try:
                wanted[field] = held_array(record, wanted[field].shape)
            except JaxmoeError as error:
                raise JaxmoeError(f"{name}: {error}") from None
        files = _tensors(wanted, cls.named)
        faults = [f"there is no {name}" for name in files if name not in tensors]
        faults += [f"{name} belongs to nothing" for name in tensors if name not in files]
        for name, array in files.items():
            if name in tensors and (fault := _fault(tensors[name], array)):
                faults.append(f"{name} {fault}")
        if faults:
            raise JaxmoeError("; ".join(faults))
        found = {name: _restored(array, tensors, cls.named.get(name, name)) for name, array in wanted.items()}
        return replace(cast(Any, expected), **found).checked()


def _tensors(arrays: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, array in arrays.items():
        own = named.get(name, name)
        if isinstance(array, Held):
            found |= array.tensors(own)
        else:
            found[own] = stack_rows(array) if len(array.shape) == 3 else array
    return found


def _restored(array: Any, tensors: Mapping[str, Any], name: str) -> Any:
    return array.restored(tensors, name) if isinstance(array, Held) else tensors[name].reshape(array.shape)


def _fault(found: Any, wanted: Any) -> str | None:
    """Return what is wrong with a tensor, None if it is as wanted; floats may have any precision of two bytes or more.

    Example:
        >>> _fault(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
        'is float32 [2, 3], not float [2, 4]'
    """
    whole = not jnp.issubdtype(wanted.dtype, jnp.floating)
    wide = jnp.issubdtype(found.dtype, jnp.floating) and found.dtype.itemsize > 1
    right = found.dtype == wanted.dtype if whole else wide
    if right and tuple(found.shape) == tuple(wanted.shape):
        return None
    kind = wanted.dtype if whole else "float"
    return f"is {found.dtype} {list(found.shape)}, not {kind} {list(wanted.shape)}"
