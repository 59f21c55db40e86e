"""The linear maps of a decoder layer beside its routed experts: to which target each belongs, and what it reads.

A role is a map's name in the parameters, such as `attention.query`; a target is what a user asks for. Maps that read
the same activations share them under one name, so that whoever sums them up does so once. Routers and the gate of
shared experts have few rows and decide much: they have no role.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from jaxmoe.errors import JaxmoeError

LINEAR_TARGETS = ("attention", "shared", "dense")
"""What can be replaced beside the routed experts: attention, shared experts, feed-forward blocks without experts."""

BLOCK_INPUT = "block.input"
"""What the feed-forward block of a layer reads; in a layer with routed experts that is what the router sees."""


class Role(NamedTuple):
    """A linear map's part in a layer.

    Args:
        target: that it belongs to, one of `LINEAR_TARGETS`.
        reads: the name of the activations that it is applied to, one row for every token.
    """

    target: str
    reads: str


ROLES: dict[str, Role] = {
    "attention.query": Role("attention", "attention.input"),
    "attention.key": Role("attention", "attention.input"),
    "attention.value": Role("attention", "attention.input"),
    "attention.gate": Role("attention", "attention.input"),
    "attention.query_down": Role("attention", "attention.input"),
    "attention.query_up": Role("attention", "attention.query_latent"),
    "attention.kv_down": Role("attention", "attention.input"),
    "attention.kv_up": Role("attention", "attention.kv_latent"),
    "attention.output": Role("attention", "attention.mixed"),
    "shared.gate": Role("shared", BLOCK_INPUT),
    "shared.up": Role("shared", BLOCK_INPUT),
    "shared.down": Role("shared", "shared.intermediate"),
    "feed_forward.gate": Role("dense", BLOCK_INPUT),
    "feed_forward.up": Role("dense", BLOCK_INPUT),
    "feed_forward.down": Role("dense", "feed_forward.intermediate"),
}
"""The roles by the names that the maps have in a layer's parameters, without `.weight`."""


def role_sizes(arrays: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    """Return `(out, in)` of the linear maps among a layer's arrays, by role.

    Args:
        arrays: names and shapes of a layer's arrays.

    Example:
        >>> role_sizes([("attention.query.weight", (8, 4)), ("attention.query.bias", (8,)), ("router.weight", (2, 4))])
        {'attention.query': (8, 4)}
    """
    found = {}
    for name, shape in arrays:
        role, _, leaf = name.rpartition(".")
        if leaf == "weight" and role in ROLES:
            out, in_ = shape
            found[role] = (out, in_)
    return found


def check_targets(asked: str | Iterable[str]) -> tuple[str, ...]:
    """Return targets in one order, each once: "experts", then those of `LINEAR_TARGETS`.

    Args:
        asked: their names, or text with commas between them.

    Raises:
        JaxmoeError: one of them is unknown, or there is none.

    Example:
        >>> check_targets("shared, experts,attention")
        ('experts', 'attention', 'shared')
    """
    asked = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
    known = ("experts", *LINEAR_TARGETS)
    if not asked or (unknown := [name for name in asked if name not in known]):
        given = ", ".join(map(repr, unknown)) if asked else "none"
        raise JaxmoeError(f"targets {given}: give one or more of {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def offered_targets(targets: Collection[str], offered: Collection[str]) -> tuple[str, ...]:
    """Return those of some targets that a model has.

    Args:
        targets: as `check_targets` returns them.
        offered: what the model has, of `LINEAR_TARGETS`.

    Raises:
        JaxmoeError: it has none of them.

    Example:
        >>> offered_targets(("experts", "attention", "shared"), ("attention",))
        ('experts', 'attention')
    """
    known = ("experts", *offered)
    if not (found := tuple(name for name in targets if name in known)):
        raise JaxmoeError(f"targets {', '.join(targets)}: this model has {', '.join(known)}")
    return found
