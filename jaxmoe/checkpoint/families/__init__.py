"""The architectures: where each keeps its experts, what its config means, what its decoder computes, who runs it.

One file per lineage, each with the records of its `model_type`s; `registry.py` lists them. `family.py` says what a
record holds, and `parts/` is what records are made of.
"""

from jaxmoe.checkpoint.families.family import GROUPS, KEPT_GROUPS, UNKNOWN, Family
from jaxmoe.checkpoint.families.parts import TransformersClasses
from jaxmoe.checkpoint.families.parts.keys import decoder_config, lookup
from jaxmoe.checkpoint.families.registry import (
    FAMILIES,
    architecture,
    decoder_spec,
    exports,
    find_family,
    get,
    known,
    register,
    runs,
)

__all__ = [
    "FAMILIES",
    "GROUPS",
    "KEPT_GROUPS",
    "UNKNOWN",
    "Family",
    "TransformersClasses",
    "architecture",
    "decoder_config",
    "decoder_spec",
    "exports",
    "find_family",
    "get",
    "known",
    "lookup",
    "register",
    "runs",
]
