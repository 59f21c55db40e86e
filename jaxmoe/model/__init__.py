"""The decoder in JAX: pure functions of arrays (`layer`, `forward`), told by a spec what to compute."""

from jaxmoe.model.configuration import decoder
from jaxmoe.model.decoder import embed, forward, head
from jaxmoe.model.layer import attended, finish, layer

__all__ = ["attended", "decoder", "embed", "finish", "forward", "head", "layer"]
