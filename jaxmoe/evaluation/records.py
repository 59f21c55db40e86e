"""What an evaluation says: mean loss per text, and what follows from it."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextEvaluation:
    """The loss on one text.

    Args:
        name: the text's name, its file name without suffix.
        tokens: predicted tokens; the first of each window is given, not predicted.
        left_out: tokens at the end of the text that do not fill a window.
        nats_per_token: mean negative log-likelihood.

    Example:
        >>> TextEvaluation(name="code", tokens=255, left_out=3, nats_per_token=0.0).perplexity
        1.0
    """

    name: str
    tokens: int
    left_out: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        return exp(self.nats_per_token)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The losses on several texts, each text counting alike whatever its length.

    Args:
        texts: at least one.
        tokens_per_second: processed tokens over the seconds spent in the model.
    """

    texts: tuple[TextEvaluation, ...]
    tokens_per_second: float

    @property
    def geometric_mean_perplexity(self) -> float:
        return exp(sum(text.nats_per_token for text in self.texts) / len(self.texts))

    @property
    def worst(self) -> TextEvaluation:
        return max(self.texts, key=lambda text: text.nats_per_token)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `jaxmoe evaluate --json` prints."""
        return {
            "texts": [
                {
                    "name": text.name,
                    "tokens": text.tokens,
                    "left_out": text.left_out,
                    "nats_per_token": text.nats_per_token,
                    "perplexity": text.perplexity,
                }
                for text in self.texts
            ],
            "geometric_mean_perplexity": self.geometric_mean_perplexity,
            "worst": {"name": self.worst.name, "perplexity": self.worst.perplexity},
            "tokens_per_second": self.tokens_per_second,
        }


def exp(nats: float) -> float:
    """Return e to the power of `nats`, infinity where that is beyond a float."""
    return math.exp(nats) if nats < 709 else math.inf
