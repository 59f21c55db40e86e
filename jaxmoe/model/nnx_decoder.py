"""The decoder as a Flax NNX module: the same parameters and the same functions, for programs of the Flax world.

Every floating-point array is an `nnx.Param`, the factors of the routed experts included, so that `nnx.split`,
`nnx.jit`, `nnx.grad` and optimisers treat it like any other module. Integers (ranks, orders, places) are plain
`nnx.Variable`s, which gradients and optimisers leave alone. What it computes is `forward`; nothing is copied.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.decoder import forward
from jaxmoe.model.spec import DecoderSpec


class Decoder(nnx.Module):
    """A decoder with its parameters.

    Args:
        spec: what it computes; static.
        parameters: as `forward` takes them.

    Example:
        >>> from jaxmoe.checkpoint.stored_model import StoredModel
        >>> from jaxmoe.data import demo_checkpoint
        >>> StoredModel(demo_checkpoint()).decoder()(jnp.array([[1, 2, 3]])).shape
        (1, 3, 4096)
    """

    def __init__(self, spec: DecoderSpec, parameters: Mapping[str, Any]):
        self.spec = spec
        wrapped = jax.tree.map(_wrapped, dict(parameters))
        self.layers = nnx.data(wrapped.pop("layers"))
        self.ends = nnx.data(wrapped)

    @property
    def parameters(self) -> dict[str, Any]:
        """The arrays as `forward` takes them."""
        held = {**self.ends, "layers": self.layers}
        return jax.tree.map(lambda variable: variable[...], held, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def __call__(self, tokens: Int[AnyArray, "sequence position"]) -> Float[Array, "sequence position vocabulary"]:
        """Return the logits of every position; see `forward`."""
        return forward(tokens, self.parameters, self.spec)


def _wrapped(array: Any) -> nnx.Variable:
    array = jnp.asarray(array)
    return (nnx.Param if jnp.issubdtype(array.dtype, jnp.floating) else nnx.Variable)(array)
