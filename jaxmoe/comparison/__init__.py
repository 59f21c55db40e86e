"""Every method at every size on one checkpoint, measured alike: cells finished one by one, and their report."""

from jaxmoe.comparison.cells import Cell, cells
from jaxmoe.comparison.run import compare

__all__ = ["Cell", "cells", "compare"]
