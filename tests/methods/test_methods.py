"""The registry of methods, and how a new one is added."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from small_fits import fitted, materialized

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LowRank
from jaxmoe.methods import Fit, Method, Slot
from jaxmoe.methods.svd import break_even


def test_a_method_is_added_in_ten_lines():
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        setting: str = "improved"

    def slot(target, shape, dtype, settings, kept, *, weighted=False):
        sizes = shape.of(target)
        return Slot(lambda rank: (LowRank.abstract(sizes, dtype, rank=rank),), 1, break_even(sizes))

    def fit(weight, template, settings, *, evidence, key=None):
        right = jnp.eye(template[0].rank, weight.shape[2])[None].repeat(6, 0)
        return Fit((LowRank(left=weight[:, :, : template[0].rank], right=right),))

    def targets(shape, settings):
        return dict.fromkeys(shape.projections, 1.0)

    mine = methods.register(
        Method("columns", "keep the first columns", Settings, targets, slot, fit, lambda template: 0)
    )
    try:
        result, weight = fitted("columns", "gate", level=3)
        np.testing.assert_array_equal(materialized(result)[:, :, :3], weight[:, :, :3])
        with pytest.raises(JaxmoeError, match="registered already"):
            methods.register(mine._replace(summary="another"))
    finally:
        methods.METHODS.pop("columns")
