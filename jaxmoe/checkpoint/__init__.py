"""Hugging Face checkpoints on disk: reading them, and writing tensors.

Names on disk are the truth; transformers is never needed to read or to write.
"""

from jaxmoe.checkpoint.experts import MoELayer
from jaxmoe.checkpoint.families import FAMILIES, Family
from jaxmoe.checkpoint.layout import Stack, plan_dense
from jaxmoe.checkpoint.reader import Checkpoint
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry, read_header, write_tensors

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "MoELayer",
    "Planned",
    "Stack",
    "TensorEntry",
    "plan_dense",
    "read_header",
    "write_tensors",
]
