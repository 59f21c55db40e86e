"""What the small comparison is of, and what it is asked."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.compression.recipe import Recipe, find
from jaxmoe.data import demo_texts

RATIO = 0.8
ASKED = {
    "ratios": [RATIO],
    "text": demo_texts()[:2],
    "calibration_text": [demo_texts()[2]],
    "sequences": 2,
    "windows": 2,
    "length": 64,
}
OPTIONS = ("--ratios", RATIO, "--text", demo_texts()[0], "--text", demo_texts()[1], "--windows", 2, "--length", 64)
CALIBRATION = ("--calibration-text", demo_texts()[2], "--sequences", 2)


class Compared(NamedTuple):
    source: Path
    folder: Path
    result: dict[str, Any]

    def cell(self, method: str, setting: str) -> dict[str, Any]:
        (cell,) = (c for c in self.result["cells"] if (c["method"], c["setting"]) == (method, setting))
        return cell

    def row(self, method: str, setting: str = "") -> dict[str, Any]:
        (row,) = (r for r in self.result["rows"] if (r["method"], r["setting"]) == (method, setting))
        return row


def contenders() -> list[Recipe]:
    """Return two that can run, and one that cannot remove so much; plain SVD as published joins them by itself."""
    return [find("svd"), find("mobe", setting="paper", options={"steps": 5})]
