"""The architectures: where each keeps its experts, what its config means, and what its decoder computes."""

from jaxmoe.checkpoint.families.architectures import ARCHITECTURES, Architecture, architecture, exports
from jaxmoe.checkpoint.families.decoders import decoder_spec
from jaxmoe.checkpoint.families.family import GROUPS, KEPT_GROUPS, UNKNOWN, Family, decoder_config, lookup
from jaxmoe.checkpoint.families.registry import FAMILIES, find_family

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "GROUPS",
    "KEPT_GROUPS",
    "UNKNOWN",
    "Architecture",
    "Family",
    "architecture",
    "decoder_config",
    "decoder_spec",
    "exports",
    "find_family",
    "lookup",
]
