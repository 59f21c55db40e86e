"""The decoder in JAX: pure functions of arrays (`layer`, `forward`), told by a spec what to compute.

`Decoder` is the same as a Flax NNX module; Flax is imported when it is first used.
"""

from typing import TYPE_CHECKING

from jaxmoe.model.decoder import embed, forward, head
from jaxmoe.model.layer import attended, finish, layer

if TYPE_CHECKING:
    from jaxmoe.model.nnx_decoder import Decoder

__all__ = ["Decoder", "attended", "embed", "finish", "forward", "head", "layer"]


def __getattr__(name: str):
    if name == "Decoder":
        from jaxmoe.model.nnx_decoder import Decoder

        return Decoder
    raise AttributeError(f"module 'jaxmoe.model' has no attribute {name!r}")
