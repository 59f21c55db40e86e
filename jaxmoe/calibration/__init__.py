"""Calibration: from text to what the routed experts of a model see and do.

`statistics` is the pure record of one layer; `record`, `folder`, `writer` and `merging` keep it on disk.
"""

from jaxmoe.calibration.statistics import FIELDS, LayerStatistics

__all__ = ["FIELDS", "LayerStatistics"]
