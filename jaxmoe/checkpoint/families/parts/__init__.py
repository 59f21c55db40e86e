"""What records of architectures are made of: keys of configs, defaults, rules, attention, routers, decoders."""

from jaxmoe.checkpoint.families.parts.attention import grouped_query, head_size, latent
from jaxmoe.checkpoint.families.parts.building import Shapes, build, shared_experts
from jaxmoe.checkpoint.families.parts.defaults import USUAL, sizes
from jaxmoe.checkpoint.families.parts.harmless import HARMLESS, NEUTRAL
from jaxmoe.checkpoint.families.parts.keys import (
    COUNT,
    COUNTS,
    EPSILON,
    FEW,
    FLAG,
    KINDS,
    LAYER,
    LAYERS,
    MAPPING,
    NUMBER,
    PERIOD,
    POSITIVE,
    SIZE,
    SIZES,
    WINDOW,
    WORD,
    ZERO_OR_ONE,
    Kind,
)
from jaxmoe.checkpoint.families.parts.moe_layers import ALL, FIRST_DENSE, MLP_LAYER_TYPES, NUM_DENSE_LAYERS, Rule
from jaxmoe.checkpoint.families.parts.rotary import rope_parameters, rope_type
from jaxmoe.checkpoint.families.parts.routers import EXPERTS, TOP_K, deepseek_v3_router, sigmoid, softmax
from jaxmoe.checkpoint.families.parts.settings import Settings
from jaxmoe.checkpoint.families.parts.transformers_classes import TransformersClasses, stock
from jaxmoe.checkpoint.families.parts.windows import (
    ATTENTION_KINDS,
    by_kind,
    derive_kinds,
    everywhere,
    rotary_where_sliding,
    where_used,
)

__all__ = [
    "ALL",
    "ATTENTION_KINDS",
    "COUNT",
    "COUNTS",
    "EPSILON",
    "EXPERTS",
    "FEW",
    "FIRST_DENSE",
    "FLAG",
    "HARMLESS",
    "KINDS",
    "LAYER",
    "LAYERS",
    "MAPPING",
    "MLP_LAYER_TYPES",
    "NEUTRAL",
    "NUMBER",
    "NUM_DENSE_LAYERS",
    "PERIOD",
    "POSITIVE",
    "SIZE",
    "SIZES",
    "TOP_K",
    "USUAL",
    "WINDOW",
    "WORD",
    "ZERO_OR_ONE",
    "Kind",
    "Rule",
    "Settings",
    "Shapes",
    "TransformersClasses",
    "build",
    "by_kind",
    "deepseek_v3_router",
    "derive_kinds",
    "everywhere",
    "grouped_query",
    "head_size",
    "latent",
    "rope_parameters",
    "rope_type",
    "rotary_where_sliding",
    "shared_experts",
    "sigmoid",
    "sizes",
    "softmax",
    "stock",
    "where_used",
]
