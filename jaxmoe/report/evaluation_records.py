"""What an evaluation says, as typed records: mean loss per text, distance from the original, and what follows."""

import math
from typing import Any

import msgspec

from jaxmoe.report.records import Record


class Continuation(Record, frozen=True, kw_only=True):
    """The greedy continuation of the beginning of a window: the likeliest token each time.

    Args:
        prompt: the beginning.
        continuation: what the model made of it.
        repetition: share of its n-grams that have occurred in it before, in [0, 1].
        repetition_of_text: the same of what really follows in the text.
        period: tokens after which its end repeats itself; null where it does not.
        degenerate: whether it repeats itself as the text does not.
    """

    prompt: str
    continuation: str
    repetition: float
    repetition_of_text: float
    period: int | None
    degenerate: bool


class Percentiles(Record, frozen=True, kw_only=True):
    """How a value is spread over tokens: half of them, 99 % and 99.9 % of them have at most that.

    Between two tokens' values it is interpolated; of fewer than 1,000 tokens the last lies between the two largest.

    Example:
        >>> Percentiles(median=0.001, p99=0.02, p999=0.4).as_json()
        {'median': 0.001, 'p99': 0.02, 'p999': 0.4}
    """

    median: float
    p99: float
    p999: float


class TextEvaluation(Record, frozen=True, kw_only=True):
    """The loss on one text.

    Args:
        name: the text's name, its file name without suffix.
        tokens: predicted tokens; the first of each window is given, not predicted.
        left_out: tokens at the end of the text that do not fill a window.
        nats_per_token: mean negative log-likelihood.
        kl: mean KL(original || model) in nats per token, None without an original.
        kl_percentiles: of the divergence over the tokens.
        top1_agreement: fraction of the tokens at which both hold the same token for most likely.
        generation: the greedy continuations, None where they were not asked for.

    Example:
        >>> TextEvaluation(name="code", tokens=255, left_out=3, nats_per_token=0.0).perplexity
        1.0
    """

    name: str
    tokens: int
    left_out: int
    nats_per_token: float
    kl: float | None = None
    kl_percentiles: Percentiles | None = None
    top1_agreement: float | None = None
    generation: Continuation | None = None

    @property
    def perplexity(self) -> float:
        return exp(self.nats_per_token)

    def as_json(self) -> dict[str, Any]:
        """Return the object that stands for the text; what was not measured is not in it."""
        return {**super().as_json(), "perplexity": self.perplexity}


class Evaluation(Record, frozen=True, kw_only=True):
    """The losses on several texts, each text counting alike whatever its length.

    Args:
        texts: at least one.
        length: tokens in a window.
        tokens_per_second: processed tokens over the seconds spent in the model.
        kl_percentiles: of KL(original || model) over the tokens of all texts together; None without an original.
        against: the evaluation of the original, None without one.
        ignored: keys of the model's config that were left out of account.
    """

    texts: tuple[TextEvaluation, ...]
    length: int
    tokens_per_second: float
    kl_percentiles: Percentiles | None = None
    against: "Evaluation | None" = None
    ignored: tuple[str, ...] = msgspec.field(default=(), name="ignored_config_keys")

    @property
    def geometric_mean_perplexity(self) -> float:
        return exp(sum(text.nats_per_token for text in self.texts) / len(self.texts))

    @property
    def worst(self) -> TextEvaluation:
        return max(self.texts, key=lambda text: text.nats_per_token)

    @property
    def kl(self) -> float | None:
        """Mean over the texts of KL(original || model), nats per token."""
        return _mean([text.kl for text in self.texts])

    @property
    def top1_agreement(self) -> float | None:
        """Mean over the texts of the agreement on the most likely token."""
        return _mean([text.top1_agreement for text in self.texts])

    def as_json(self) -> dict[str, Any]:
        """Return the object that `jaxmoe evaluate --json` prints."""
        record = {
            **super().as_json(),
            "texts": [text.as_json() for text in self.texts],
            **({"ignored_config_keys": list(self.ignored)} if self.ignored else {}),
            "geometric_mean_perplexity": self.geometric_mean_perplexity,
            "worst": {"name": self.worst.name, "perplexity": self.worst.perplexity},
        }
        means = {"kl": self.kl, "top1_agreement": self.top1_agreement}
        record |= {name: value for name, value in means.items() if value is not None}
        return record if self.against is None else {**record, "against": self.against.as_json()}


def exp(nats: float) -> float:
    """Return e to the power of `nats`, infinity where that is beyond a float."""
    return math.exp(nats) if nats < 709 else math.inf


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
