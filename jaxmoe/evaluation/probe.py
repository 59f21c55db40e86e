"""The generation probe: greedy continuations of the beginning of each text, and whether they fall into repetition."""

from collections.abc import Sequence

import numpy as np

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.evaluation.generation import continuations
from jaxmoe.evaluation.repetition import degenerate, period, repetition
from jaxmoe.report.evaluation_records import Continuation
from jaxmoe.texts import Tokenizer, Windows

PROMPT = 32
"""Tokens of a window that a model continues, or half of a shorter window."""


def probe(model: StoredModel, texts: Sequence[Windows], tokenizer: Tokenizer, new: int) -> tuple[Continuation, ...]:
    """Continue the first window of each text, and compare with the rest of the window itself.

    Args:
        model: on disk.
        texts: in windows of one length.
        tokenizer: of the model; a continuation ends before its end token.
        new: tokens to generate, at least 1.

    Raises:
        JaxmoeError: logits are not finite.
    """
    prompt = min(PROMPT, texts[0].ids.shape[1] // 2)
    prompts = [text.ids[0, :prompt] for text in texts]
    rows = np.stack(list(continuations(model, prompts, new)), axis=1)
    results = []
    for text, row in zip(texts, rows, strict=True):
        ended = np.flatnonzero(row == tokenizer.end)
        own, real = row[: ended[0]] if ended.size else row, text.ids[0, prompt : prompt + new]
        results.append(
            Continuation(
                prompt=tokenizer.decode(text.ids[0, :prompt]),
                continuation=tokenizer.decode(own),
                repetition=repetition(own),
                repetition_of_text=repetition(real),
                period=period(own),
                degenerate=degenerate(own, real),
            )
        )
    return tuple(results)
