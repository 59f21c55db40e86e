"""Where the arrays of a training lie on several devices: experts over one axis of a mesh, rows of text over the other.

The step is the same program; the compiler cuts it up. Every array with a leading expert axis, or with the rows of all
experts upon each other as numbers of few bits lie, is in parts over `expert`, with its part of the optimiser's memory;
everything else is on all devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DecoderSpec, ExpertBlock
from jaxmoe.recovery.losses import Batch
from jaxmoe.recovery.trainable import names


def training_mesh(data: int, expert: int) -> Mesh:
    """Return a mesh of `data * expert` devices with these axes.

    Raises:
        JaxmoeError: there are fewer devices.
    """
    devices = jax.devices()
    if min(data, expert) < 1 or data * expert > len(devices):
        raise JaxmoeError(f"a mesh of {data} x {expert} devices: there are {len(devices)}; give a smaller one")
    return Mesh(np.array(devices[: data * expert]).reshape(data, expert), ("data", "expert"))


def place_parameters(parameters: Any, spec: DecoderSpec, mesh: Mesh) -> Any:
    """Return a decoder's parameters on the devices of a mesh."""
    own = [shardings(name, array, spec, mesh) for name, array in zip(names(parameters), jax.tree.leaves(parameters))]
    return jax.device_put(parameters, jax.tree.unflatten(jax.tree.structure(parameters), own))


def shardings(name: str, array: Any, spec: DecoderSpec, mesh: Mesh) -> NamedSharding:
    """Return where an array of a decoder lies, by its name and size."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] in ("experts", "auxiliary"):
        block = spec.layers[int(parts[1])].feed_forward
        assert isinstance(block, ExpertBlock)
        experts = block.shape.experts
        if array.ndim and array.shape[0] and array.shape[0] % experts == 0 and experts % mesh.shape["expert"] == 0:
            return NamedSharding(mesh, PartitionSpec("expert"))
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: Batch, mesh: Mesh, accumulate: int = 1) -> Batch:
    """Return a batch with its rows spread over the devices.

    Raises:
        JaxmoeError: the rows that are worked on together cannot be spread evenly.
    """
    rows = batch.ids.shape[0] // accumulate
    if rows % mesh.shape["data"]:
        raise JaxmoeError(
            f"{rows} rows at a time cannot be spread over {mesh.shape['data']} devices: give a multiple as rows"
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
