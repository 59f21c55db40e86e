"""Scales that lie in files as codes of 8 bits, as the floats that training needs, and back.

A scale that is a float is trained as it is, and rounded to its type when it is written. One of 8 bits counts units that
a block of scales shares: no gradient reaches it, and while it is trained it is a float32. When it is written, units and
counts are found again; codes, zeros and tables stay, and so do all sizes.
"""

from dataclasses import replace
from typing import Any

import jax

from jaxmoe.factors.quantised import QuantisedArray


def floating_scales(parameters: Any) -> Any:
    """Return the parameters with scales of 8 bits as float32, standing for the same numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmoe.factors.store import Rounded, Store
        >>> store = Store(bits=2, group=2, zero="none", scale="quantised")
        >>> array = QuantisedArray.pack(Rounded(jnp.array([[[3, 0]]]), jnp.array([[[0.51]]])), store)
        >>> array.scale.tolist(), floating_scales({"weight": array})["weight"].scale.tolist()
        ([[255]], [[0.509...]])
    """

    def floating(array: Any) -> Any:
        if not _counted(array):
            return array
        scale = array.unpack().scale
        assert scale is not None
        scale = scale.reshape(array.scale.shape)
        return replace(array, store=replace(array.store, scale="float32"), scale=scale, unit=None)

    return jax.tree.map(floating, parameters, is_leaf=_held)


def stored_scales(parameters: Any, stored: Any) -> Any:
    """Return the parameters with scales held as those of others are, from which `floating_scales` made them."""

    def held(array: Any, before: Any) -> Any:
        if not _counted(before):
            return array
        return QuantisedArray.pack(array.unpack(), before.store, shape=before.shape)

    return jax.tree.map(held, parameters, stored, is_leaf=_held)


def _held(node: Any) -> bool:
    return isinstance(node, QuantisedArray)


def _counted(node: Any) -> bool:
    return _held(node) and node.store.scale == "quantised"
