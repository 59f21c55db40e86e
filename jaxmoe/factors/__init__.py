"""What is stored: the terms that stand for the experts' matrices, and the compressed layer that holds them."""

from jaxmoe.factors.dense import Dense
from jaxmoe.factors.grouped import Grouped
from jaxmoe.factors.hashed import Hashed
from jaxmoe.factors.layer import PROJECTIONS, TARGETS, CompressedLayer, LayerShape, ShapeRecord, stack
from jaxmoe.factors.low_rank import LowRank
from jaxmoe.factors.merged import Merged
from jaxmoe.factors.shared import Shared
from jaxmoe.factors.shared_basis import SharedBasis
from jaxmoe.factors.sparse import Sparse
from jaxmoe.factors.term import Count, Term

__all__ = [
    "PROJECTIONS",
    "TARGETS",
    "CompressedLayer",
    "Count",
    "Dense",
    "Grouped",
    "Hashed",
    "LayerShape",
    "LowRank",
    "Merged",
    "ShapeRecord",
    "Shared",
    "SharedBasis",
    "Sparse",
    "Term",
    "stack",
]
