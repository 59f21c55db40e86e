"""How a term lies in a file, and back: what is read is compared with what the term demands, before anything uses it.

What stands in `config.json` beside the tensors is a term's `Spec`, a msgspec type: kinds, ranges and unknown keys are
checked while it is read. From it follows the abstract term (`planned`), and from that the names, shapes and kinds of
numbers of all tensors. Values that are places, ranks or orders are checked by the term (`checked`); a term that stores
no such numbers needs no more than `Spec` and `planned`.

On disk every tensor of a term is two-dimensional: the experts (or bases) are stacked along the rows. Serving engines
take a module whose parameters are all three-dimensional for a stock expert layer and replace it.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Self, cast

import msgspec
import numpy as np
from jax import numpy as jnp

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.term import Count, count_arrays, stack_rows

LARGEST = 2**31 - 1
"""Of any size or place: both are int32 in files."""

Size = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
"""A number of things of which there is at least one."""

Number = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
"""A number of things of which there may be none."""


def as_spec(value: Any, kind: type, where: str) -> Any:
    """Return a record of decoded JSON as a type, for the core, which knows no files.

    Args:
        value: dictionaries, lists, text and numbers.
        kind: a type that msgspec converts to.
        where: what holds the value, for the message.

    Raises:
        JaxmoeError: the value does not fit; the message names the place.

    Example:
        >>> as_spec({"rank": -1}, dict[str, Size], "down.0")
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: down.0: Expected `int` >= 1 - at `$[...]`
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise JaxmoeError(f"{where}: {error}") from None


class TermSpec(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True):
    """What a reader needs beside a term's tensors; the tag of a term's own `Spec` is its kind."""


class Stored:
    """The file layout of a term: a dataclass of arrays, each in a tensor of its own, and the sizes of `Spec`.

    kind: the name that stands in files; Spec: what stands beside the tensors; named: the tensors that have another name
    than the field.
    """

    kind: ClassVar[str]
    Spec: ClassVar[type[TermSpec]]
    named: ClassVar[Mapping[str, str]] = {}

    def described(self) -> TermSpec:
        """Return the `Spec` of this term, abstract or real."""
        raise NotImplementedError

    @classmethod
    def planned(cls, spec: Any, shape: tuple[int, int, int]) -> Self:
        """Return the abstract term that a `Spec` describes; its float dtypes are of no account.

        Args:
            spec: a `Spec` of this term.
            shape: `(experts, out, in)`.

        Raises:
            JaxmoeError: sizes do not fit together.
        """
        raise NotImplementedError

    def checked(self) -> Self:
        """Return the term that was read, or raise a `JaxmoeError` if its whole numbers are not what they must be."""
        return self

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


def check_order(order: Any, experts: int) -> None:
    """Raise unless an order names each expert once.

    Example:
        >>> check_order(np.array([[0, 2, 2]]), 3)
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: order [0, 2, 2] does not name each of the experts 0 to 2 once
    """
    own = np.asarray(order).reshape(-1)
    if not np.array_equal(np.sort(own), np.arange(experts)):
        raise JaxmoeError(f"order {shortened(own)} does not name each of the experts 0 to {experts - 1} once")


def shortened(numbers: np.ndarray, most: int = 32) -> str:
    """Return a list of numbers for a message.

    Example:
        >>> shortened(np.arange(9), most=2)
        '[0, 1, ...]'
    """
    first = ", ".join(map(str, numbers[:most].tolist()))
    return f"[{first}{', ...' if len(numbers) > most else ''}]"
