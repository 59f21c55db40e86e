"""A stored model as lm-evaluation-harness sees one, streamed: no PyTorch, and no need for the model to fit into memory.

    import lm_eval
    from jaxmoe.evaluation.lm_eval import JaxmoeLM
    lm_eval.simple_evaluate(model=JaxmoeLM("CHECKPOINT"), tasks=["hellaswag"])

All requests of similar length go through the layers together, padded at their ends to a few lengths, so that every
layer is read seldom and compiled for few shapes. Nothing is put before a text unless it is empty: then the end token
is. Generation is greedy and runs without a cache of keys and values, which is slow for long answers.

Needs `pip install 'jaxmoe[eval]'`; the rest of jaxmoe does not.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation.generation import continuations
from jaxmoe.evaluation.windows import score_windows, walk
from jaxmoe.texts import Tokenizer

PASS = 1 << 18
"""Tokens whose hidden states go through the layers together; they lie on disk."""

GENERATED, TOGETHER = 256, 8
"""Most tokens of an answer where the task does not say, and answers that are generated together."""


class Request(NamedTuple):
    """A continuation to be scored: the tokens of its context, at least one, and its own."""

    context: list[int]
    continuation: list[int]


class JaxmoeLM(TemplateLM):
    """A checkpoint, original or compressed, for lm-evaluation-harness.

    Args:
        checkpoint: a folder or a hub id.
        length: most tokens that the model is given at once; None for the context in its config, else 2048.
        revision: branch, tag or commit of a hub id.
        work: folder on whose disk hidden states lie; that for temporary files if None.
        ignore_config_keys: as for `StoredModel`; in lm-eval's `model_args` with `+` between them.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        length: int | None = None,
        revision: str | None = None,
        work: str | Path | None = None,
        ignore_config_keys: str | Collection[str] = (),
        **_: Any,
    ):
        super().__init__()
        ignored = ignore_config_keys.split("+") if isinstance(ignore_config_keys, str) else ignore_config_keys
        self.model = StoredModel(checkpoint, revision, ignore_config_keys=ignored)
        self.tokens = Tokenizer.open(checkpoint, revision)
        self.length = length or self.model.longest or 2048
        self.work = None if work is None else Path(work)
        if self.tokens.end is None:
            raise JaxmoeError(f"{self.model.folder}: config.json has no eos_token_id, which stands before empty texts")

    @property
    def eot_token_id(self) -> int:
        assert self.tokens.end is not None
        return self.tokens.end

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string).tolist()

    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether it is the greedy one.

        Raises:
            JaxmoeError: a continuation alone is longer than the model's context.
        """
        results: dict[int, tuple[float, bool]] = {}
        for positions, width in self._passes(requests):
            rows = [self._row(requests[position]) for position in positions]
            ids = padded(rows, width)
            scores = score_windows(walk(self.model, ids, work=self.work), ids)
            right = np.asarray(scores.top) == ids[:, 1:]
            for position, row, nats, same in zip(positions, rows, np.asarray(scores.nats), right, strict=True):
                # Scores at p are of the token at p + 1.
                own = slice(len(row) - 1 - len(requests[position].continuation), len(row) - 1)
                results[position] = -float(np.sum(nats[own], dtype=np.float64)), bool(same[own].all())
        return [results[position] for position in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        cut = [self._windows(request.args[0]) for request in requests]
        scored = iter(self.score([window for windows in cut for window in windows]))
        totals = [sum(next(scored)[0] for _ in windows) for windows in cut]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        # Prompts of similar length together, so that little is padded.
        order = sorted(range(len(requests)), key=lambda position: len(prompts[position]))
        answers: dict[int, str] = {}
        for begin in range(0, len(order), TOGETHER):
            chosen = order[begin : begin + TOGETHER]
            asked = [Asked.of(requests[position].args[1]) for position in chosen]
            found = self._answers([prompts[position] for position in chosen], asked)
            for position, answer in zip(chosen, found, strict=True):
                answers[position] = answer
                self.cache_hook.add_partial("generate_until", requests[position].args, answer)
        return [answers[position] for position in range(len(requests))]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        scored = self.score([Request(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return scored

    def _windows(self, text: str) -> list[Request]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.length, 1)
        return [Request(*make_disjoint_window(window)) for window in windows]

    def _row(self, request: Request) -> list[int]:
        """Return context and continuation, the context cut at its beginning to what the model takes."""
        if len(request.continuation) > self.length:
            raise JaxmoeError(f"a continuation of {len(request.continuation)} tokens: the model takes {self.length}")
        return (request.context + request.continuation)[-self.length - 1 :]

    def _passes(self, requests: Sequence[Request]) -> Iterable[tuple[list[int], int]]:
        """Yield which requests go through the layers together, and to what length they are padded."""
        by_width: dict[int, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            by_width[bucket(len(self._row(request)))].append(position)
        for width, positions in sorted(by_width.items()):
            most = max(1, PASS // width)
            for begin in range(0, len(positions), most):
                yield positions[begin : begin + most], width

    def _answers(self, prompts: list[list[int]], asked: list["Asked"]) -> list[str]:
        new = max(own.tokens for own in asked)
        if new >= self.length:
            raise JaxmoeError(f"{new} tokens to generate: the model takes {self.length}, prompt included")
        kept = [np.array(prompt[-(self.length - new) :], np.int32) for prompt in prompts]
        width = bucket(max(map(len, kept)) + new)
        rows: list[list[int]] = [[] for _ in prompts]
        answers: list[str | None] = [None] * len(prompts)
        for tokens in continuations(self.model, kept, new, width=width):
            for position, (own, token) in enumerate(zip(asked, tokens, strict=True)):
                if answers[position] is None:
                    rows[position].append(int(token))
                    answers[position] = self._finished(rows[position], own)
            if None not in answers:
                break
        return [answer or "" for answer in answers]

    def _finished(self, row: list[int], asked: "Asked") -> str | None:
        """Return the answer if it is complete, else None."""
        ended = row[-1] == self.eot_token_id
        text = self.tokens.decode(np.array(row[:-1] if ended else row))
        found = [text.index(stop) for stop in asked.until if stop in text]
        if found:
            return text[: min(found)]
        return text if ended or len(row) >= asked.tokens else None


class Asked(NamedTuple):
    """What a task asks of a generated answer: where it stops, and its most tokens."""

    until: tuple[str, ...]
    tokens: int

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Asked":
        """Read a task's generation options.

        Raises:
            JaxmoeError: it asks for sampling.
        """
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise JaxmoeError("the task asks for sampling: jaxmoe generates greedily; set do_sample: false")
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        return cls(tuple(filter(None, until)), int(options.get("max_gen_toks", GENERATED)))


def bucket(length: int) -> int:
    """Return the length to which a row is padded: a power of two, at least 32.

    Example:
        >>> bucket(5), bucket(32), bucket(33)
        (32, 32, 64)
    """
    return max(32, 1 << (length - 1).bit_length())


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return rows of tokens padded at their ends, `[row, width]`: what follows a token does not change it.

    Example:
        >>> padded([[1, 2], [3]], 3)
        array([[1, 2, 0],
               [3, 0, 0]], dtype=int32)
    """
    ids = np.zeros((len(rows), width), np.int32)
    for into, row in zip(ids, rows, strict=True):
        into[: len(row)] = row
    return ids
