"""Which of a decoder's arrays are trained: parameters split by name, and put together again.

Every array has a name, such as `layers.3.router.weight` or `layers.3.experts.terms.down.0.left`. What is trained is
kept in float32, whatever the model computes in; everything else stays as it is stored. Whole numbers (codes, ranks,
places, orders) are never trained, nor are biases that only choose experts: no gradient reaches them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmoe.errors import JaxmoeError

SETS: Mapping[str, str] = {
    "router": r"layers\.\d+\.router\.",
    "factors": r"layers\.\d+\.(experts|\w+\.\w+\.weight)\.terms\.",
    "scales": r"layers\.\d+\.(experts|\w+\.\w+\.weight)\.terms\..*\.(scale|zero|table)$",
    "norms": r"(layers\.\d+\.)?(attention\.)?\w*norm(_after)?\.",
    "expert_vectors": r"layers\.\d+\.auxiliary\.",
    "all": "",
}
"""What can be trained by name, as regular expressions of the names' beginnings: routers, the routed experts as they are
stored and the factors of other maps; of these only the scales, real zeros and codebooks of what is held in few bits;
normalisations, the vectors of compressed experts, everything."""

_EARLIER = {"theta": "expert_vectors"}
"""Names of sets in earlier versions, which are still understood."""

# Of maps that are stored as one, such as gate and up of a shared expert, each would train the whole by itself.
_NEVER = re.compile(r"layers\.\d+\.(router\.selection_bias$|\w+\.\w+\.weight\.whole\.)")


def names(parameters: Any) -> list[str]:
    """Return the names of all arrays, in the order of `jax.tree.leaves`.

    Example:
        >>> names({"norm.weight": 1, "layers": [{"router.weight": 2}]})
        ['layers.0.router.weight', 'norm.weight']
    """
    paths = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return [".".join(_key(part) for part in path) for path, _ in paths]


def is_scale(name: str) -> bool:
    """Tell whether an array holds scales, zeros or codebooks of numbers in few bits, by its name.

    Example:
        >>> is_scale("layers.0.experts.terms.up.0.weight.scale"), is_scale("layers.0.router.scale")
        (True, False)
    """
    return re.match(SETS["scales"], name) is not None


def _key(part: Any) -> str:
    return str(next(getattr(part, kind) for kind in ("key", "idx", "name") if hasattr(part, kind)))


def select(parameters: Any, sets: Sequence[str]) -> list[str]:
    """Return the names of the arrays that some sets hold.

    Args:
        parameters: as `jaxmoe.model.forward` takes them.
        sets: names of `SETS`.

    Raises:
        JaxmoeError: a set is unknown, or holds nothing of this model.
    """
    arrays = dict(zip(names(parameters), jax.tree.leaves(parameters), strict=True))
    floating = [n for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating) and not _NEVER.match(n)]
    chosen: set[str] = set()
    for own in (_EARLIER.get(name, name) for name in sets):
        if own not in SETS:
            raise JaxmoeError(f"cannot train {own!r}: give some of {', '.join(SETS)}")
        found = [name for name in floating if re.match(SETS[own], name)]
        if not found:
            raise JaxmoeError(f"cannot train {own!r}: the model has none; it has {', '.join(_present(floating))}")
        chosen.update(found)
    return [name for name in floating if name in chosen]


def _present(floating: Sequence[str]) -> list[str]:
    return [own for own, pattern in SETS.items() if any(re.match(pattern, name) for name in floating)]


def split(parameters: Any, chosen: Sequence[str]) -> dict[str, Array]:
    """Return copies of the chosen arrays in float32, by name: what an optimiser works on."""
    arrays = dict(zip(names(parameters), jax.tree.leaves(parameters), strict=True))
    return {name: jnp.array(arrays[name], jnp.float32) for name in chosen}


def merge(parameters: Any, trained: Mapping[str, Any]) -> Any:
    """Return the parameters with the trained arrays in the place of those of the same names.

    Example:
        >>> merge({"a": 1, "b": [2, 3]}, {"b.1": 5})
        {'a': 1, 'b': [2, 5]}
    """
    leaves, structure = jax.tree.flatten(parameters)
    own = names(parameters)
    if unknown := trained.keys() - set(own):
        raise KeyError(f"no arrays of these names: {sorted(unknown)}")
    return jax.tree.unflatten(structure, [trained.get(name, leaf) for name, leaf in zip(own, leaves, strict=True)])
