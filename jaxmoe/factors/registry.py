"""The terms that files may hold, by the name of their kind, and how they are rebuilt from there.

A term outside of this package registers itself in the same way, and names the module of its PyTorch twin:

    @register
    @pytree()
    @dataclass(frozen=True, kw_only=True)
    class Diagonal(Term):
        kind, twin = "diagonal", "my_package.diagonal_twin"
        ...

From when its file is imported everything that reads, counts, runs and writes terms knows it. The twin's file imports
nothing but torch, transformers and `jaxmoe.torch.runtime`: it travels inside of the checkpoints that need it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.term import Term

KINDS: dict[str, type[Term]] = {}
"""The registered terms by the name that stands in files."""

T = TypeVar("T", bound=Term)


def register(term: type[T]) -> type[T]:
    """Register a term under its kind and return it.

    Raises:
        JaxmoeError: another term has that kind.
    """
    if (other := KINDS.get(term.kind)) is not None and other.__qualname__ != term.__qualname__:
        raise JaxmoeError(f"two terms of kind {term.kind!r}, {other.__module__} and {term.__module__}: rename one")
    KINDS[term.kind] = term
    return term


def twin(kind: str) -> str:
    """Return the module of a term's PyTorch twin.

    Example:
        >>> twin("low_rank")
        'jaxmoe.torch.runtime.low_rank'
    """
    return KINDS[kind].twin or f"jaxmoe.torch.runtime.{kind}"


def read_terms(
    tensors: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], target: str = ""
) -> tuple[tuple[Term, ...], set[str]]:
    """Rebuild the terms of one target from their file layout.

    Args:
        tensors: by `{target}.{position}.{tensor}`, those of other targets among them; without a target by
            `{position}.{tensor}`.
        entries: what `Term.spec` gave of each, as decoded JSON.
        shape: `(experts, out, in)` of the target.
        target: its name.

    Returns:
        The terms, and the names of the tensors that they took.

    Raises:
        JaxmoeError: a term is unknown, or its tensors are not what it demands; the message names target and position.
    """
    terms, taken = [], set()
    for position, entry in enumerate(entries):
        where = f"{target}.{position}" if target else str(position)
        # A list: whatever stands there may not be hashable.
        if (kind := entry.get("kind")) not in list(KINDS):
            raise JaxmoeError(f"unknown term {kind!r} in {where}: this version knows {', '.join(sorted(KINDS))}")
        own = {name.removeprefix(f"{where}."): x for name, x in tensors.items() if name.startswith(f"{where}.")}
        taken |= {f"{where}.{name}" for name in own}
        try:
            terms.append(KINDS[kind].from_tensors(own, entry, shape))
        except JaxmoeError as error:
            raise JaxmoeError(f"{where} ({kind}): {error}") from None
    return tuple(terms), taken


def check_taken(tensors: Mapping[str, Any], taken: set[str]) -> None:
    """Raise if tensors are left over that no term took."""
    if left := set(tensors) - taken:
        raise JaxmoeError(f"{', '.join(sorted(left)[:8])} belong to no term that the record names")
