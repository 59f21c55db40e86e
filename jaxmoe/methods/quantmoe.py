"""QuantMoE-Bench: more bits for the experts that are used most, and for the first layers.

setting="paper": 2 or 4 bits for whole experts, in groups of 128. Of every layer those get 4 that most tokens choose, as
many as the budget has room for, or, with score="outlier", those of the model whose input columns stand out most,

    s_e = max_j  max_i |W_ij| / mean_i |W_ij|,        the largest over the matrices of an expert added up;

the experts of the first layers come before all others.
setting="improved": 2 to 6 bits for every single matrix, by what each width of it loses under the Fisher information.
What rounds is GPTQ in both. The paper finds that attention and shared experts should keep more bits than routed ones:
here they keep all.
Source: arXiv 2406.08155; https://github.com/UNITES-Lab/moe-quantization. Different from it: a budget of bytes, scales
and zeros included, takes the place of an average of bits; a column of zeros has no outliers (it divides by zero there).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import Evidence
from jaxmoe.methods.pruning import needs
from jaxmoe.methods.rounding import GPTQ, GPTQSettings

SCORES = ("frequency", "outlier")

FIRST = 2.0
"""Score of the experts of the first layers, above that of all others: frequencies count as ranks between 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class QuantMoESettings(GPTQSettings):
    """Settings of QuantMoE-Bench, beside those of `gptq`; None takes the setting's own default.

    Args:
        score: what more bits go by: "frequency", "outlier", or "loss" as measured.
        first_layers: so many layers with experts come before all others where a score decides.

    Example:
        >>> QuantMoESettings(setting="paper").score, QuantMoESettings().score
        ('frequency', 'loss')
    """

    score: str | None = None
    first_layers: int = 1

    OWN_BITS: ClassVar = {"paper": "expert", "improved": "matrix"}
    DEFAULTS: ClassVar = {
        "paper": {**GPTQSettings.DEFAULTS["paper"], "score": "frequency"},
        "improved": {**GPTQSettings.DEFAULTS["improved"], "score": "loss"},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.score not in (*SCORES, "loss"):
            raise JaxmoeError(f"score {self.score!r}: give {', '.join(SCORES)} or loss")
        if self.first_layers < 0:
            raise JaxmoeError(f"first_layers {self.first_layers}: give 0 or more")


def outlier_score(weight: AnyArray) -> np.ndarray:
    """Return how much the input column that does so most stands out in each matrix, `[expert]`.

    Example:
        >>> outlier_score(np.array([[[1, 0.1], [-3, 0.1], [1, 0.1], [1, 0.3]]])).round(6).tolist()
        [2.0]
    """
    sizes = np.abs(np.asarray(weight, np.float64))
    mean = sizes.mean(axis=1)
    return np.where(mean > 0, sizes.max(axis=1) / np.where(mean > 0, mean, 1), 0).max(axis=1)


def widths(settings: QuantMoESettings) -> tuple[int, ...]:
    """Return the bits among which a budget chooses."""
    return (2, 4) if settings.setting == "paper" else GPTQ.widths(settings)


def score(settings: QuantMoESettings, evidence: Evidence, *, position: int) -> np.ndarray | None:
    """Return what each expert of a target is worth by the paper's rules; None where measured losses decide."""
    if settings.score == "loss" or (settings.score == "frequency" and evidence.counts is None):
        return None
    if settings.score == "outlier":
        found = outlier_score(evidence.weight(evidence.target))
        return found * (1e6 if position < settings.first_layers else 1)
    assert evidence.counts is not None
    counts = np.asarray(evidence.counts)
    if position < settings.first_layers:
        return np.full(len(counts), FIRST)
    # The same number of every layer: those of equal rank are worth the same.
    return (1 + np.argsort(np.argsort(counts, kind="stable"), kind="stable")) / len(counts)


def requires(settings: QuantMoESettings) -> Mapping[str, str]:
    """Return what the rounding needs, and the counts where these decide."""
    own: Mapping[str, Any] = GPTQ.requires(settings)
    counted = settings.score == "frequency" and settings.bits is None
    return {**own, **(needs("counts")(settings) if counted else {})}


QUANTMOE = GPTQ._replace(
    name="quantmoe",
    summary="GPTQ with more bits for experts that are used more",
    settings=QuantMoESettings,
    widths=widths,
    requires=requires,
    score=score,
)
