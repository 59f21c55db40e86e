"""What is stored: the terms that stand for matrices, and the compressed layers and linear maps that hold them."""

from jaxmoe.factors.dense import Dense
from jaxmoe.factors.grouped import Grouped
from jaxmoe.factors.hashed import Hashed
from jaxmoe.factors.layer import PROJECTIONS, TARGETS, CompressedLayer, LayerShape, ShapeRecord, stack
from jaxmoe.factors.leaves import Count
from jaxmoe.factors.linear import CompressedLinear, LinearShape, LinearShapeRecord
from jaxmoe.factors.low_rank import LowRank
from jaxmoe.factors.merged import Merged
from jaxmoe.factors.registry import register
from jaxmoe.factors.shared import Shared
from jaxmoe.factors.shared_basis import SharedBasis
from jaxmoe.factors.sparse import Sparse
from jaxmoe.factors.term import Term, Work

__all__ = [
    "PROJECTIONS",
    "TARGETS",
    "CompressedLayer",
    "CompressedLinear",
    "Count",
    "Dense",
    "Grouped",
    "Hashed",
    "LayerShape",
    "LinearShape",
    "LinearShapeRecord",
    "LowRank",
    "Merged",
    "ShapeRecord",
    "Shared",
    "SharedBasis",
    "Sparse",
    "Term",
    "Work",
    "register",
    "stack",
]
