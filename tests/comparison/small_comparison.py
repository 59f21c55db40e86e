"""What the small comparison is of, and what it is asked."""

from pathlib import Path
from typing import NamedTuple

from jaxmoe.compression.recipe import Recipe, find
from jaxmoe.data import demo_texts
from jaxmoe.report.comparison_records import CellResult, Comparison, Row, RowMeasured

RATIO = 0.8
ASKED = {
    "ratios": [RATIO],
    "unit": "parameters",
    "text": demo_texts()[:2],
    "calibration_text": [demo_texts()[2]],
    "sequences": 2,
    "windows": 2,
    "length": 64,
}
OPTIONS = (
    "--ratios",
    RATIO,
    "--unit",
    "parameters",
    "--text",
    demo_texts()[0],
    "--text",
    demo_texts()[1],
    "--windows",
    2,
    "--length",
    64,
)
CALIBRATION = ("--calibration-text", demo_texts()[2], "--sequences", 2)


class Compared(NamedTuple):
    source: Path
    folder: Path
    result: Comparison

    def cell(self, method: str, setting: str) -> CellResult:
        (cell,) = (c for c in self.result.cells if (c.method, c.setting) == (method, setting))
        return cell

    def row(self, method: str, setting: str = "") -> Row:
        (row,) = (r for r in self.result.rows if (r.method, r.setting) == (method, setting))
        return row

    def measured(self, method: str, setting: str = "") -> RowMeasured:
        found = self.row(method, setting).measured
        assert found is not None
        return found


def contenders() -> list[Recipe]:
    """Return two that can run, and one that cannot remove so much; plain SVD as published joins them by itself."""
    return [find("svd"), find("mobe", setting="paper", options={"steps": 5})]
