"""Perplexity of a stored model on windows of text, and how far it is from its original, streamed layer by layer.

Every window is predicted from its own tokens only, so the first token of each is given. Sums over tokens are in
float64.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import ArrayLike

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation.clock import Clock
from jaxmoe.evaluation.windows import Walked, compare_windows, score_windows, walk
from jaxmoe.report.evaluation_records import Evaluation, Percentiles, TextEvaluation
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.texts import Windows


def evaluate_windows(
    model: StoredModel,
    texts: Sequence[Windows],
    *,
    against: StoredModel | Walked | None = None,
    work: Path | None = None,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure the perplexity of a model, and against its original also KL divergence and top-1 agreement.

    Args:
        model: original or compressed.
        texts: its windows, all of one length.
        against: the original, whose vocabulary the model has, or what `walk` made of it and these very windows; None
            for none.
        work: folder on whose disk the hidden states lie; that for temporary files if None.
        on_event: called with a small record after every layer.

    Returns:
        The loss per text. Tokens per second count the model's work, reading its weights included, compiling not; where
        two models' logits are compared, that time is shared alike; of an original that was walked before, it is all
        the time that counts.

    Raises:
        JaxmoeError: activations or logits are not finite, or the two vocabularies differ.

    Example:
        >>> from jaxmoe.data import demo_checkpoint, demo_texts
        >>> from jaxmoe.texts import Tokenizer, text_windows
        >>> texts = text_windows(demo_texts()[:2], Tokenizer.open(demo_checkpoint()), length=64, count=1)
        >>> [text.name for text in evaluate_windows(StoredModel(demo_checkpoint()), texts).texts]
        ['code', 'literature']
    """
    lengths = {text.ids.shape[1] for text in texts}
    if len(lengths) != 1:
        raise JaxmoeError(f"windows of {sorted(lengths)} tokens: cut all texts to windows of one length")
    ids = np.concatenate([text.ids for text in texts])
    clock = Clock()
    with clock.running():
        walked = walk(model, ids, work=work, on_event=on_event)
    if against is None:
        with clock.running():
            scores = score_windows(walked, ids)
        return replace(_evaluation(texts, scores.nats, clock.seconds), ignored=model.ignored)
    other, both = Clock(), Clock()
    with other.running():
        original = against if isinstance(against, Walked) else walk(against, ids, work=work, on_event=on_event)
    with both.running():
        scores, of_original, divergence = compare_windows(walked, original, ids)
    result = _evaluation(
        texts,
        scores.nats,
        clock.seconds + both.seconds / 2,
        # Rounding can make the divergence of equal models negative, which no divergence is.
        kl=[max(0.0, mean) for mean in _means(texts, divergence)],
        kl_percentiles=[percentiles(part) for part in _split(texts, divergence)],
        top1_agreement=_means(texts, scores.top == of_original.top),
        against=_evaluation(texts, of_original.nats, other.seconds + both.seconds / 2),
    )
    return replace(result, kl_percentiles=percentiles(np.asarray(divergence)), ignored=model.ignored)


def percentiles(divergence: np.ndarray) -> Percentiles:
    """Return the median, 99 % and 99.9 % of a divergence over all tokens.

    Example:
        >>> percentiles(np.repeat([0.0, 1.0, 4.0], [700, 295, 5]))
        Percentiles(median=0.0, p99=1.0, p999=4.0)
    """
    median, p99, p999 = np.maximum(np.percentile(divergence.astype(np.float64), (50, 99, 99.9)), 0).tolist()
    return Percentiles(median=median, p99=p99, p999=p999)


def _evaluation(
    texts: Sequence[Windows], nats: ArrayLike, seconds: float, against: Evaluation | None = None, **measured
) -> Evaluation:
    rows = []
    for position, (text, loss) in enumerate(zip(texts, _means(texts, nats), strict=True)):
        own = {name: values[position] for name, values in measured.items()}
        tokens = text.ids.size - len(text.ids)
        rows.append(TextEvaluation(name=text.name, tokens=tokens, left_out=text.left_out, nats_per_token=loss, **own))
    windows, predicted = np.shape(nats)
    return Evaluation(
        texts=tuple(rows),
        length=predicted + 1,
        tokens_per_second=windows * (predicted + 1) / seconds,
        against=against,
    )


def _means(texts: Sequence[Windows], values: ArrayLike) -> list[float]:
    return [float(np.mean(part, dtype=np.float64)) for part in _split(texts, values)]


def _split(texts: Sequence[Windows], values: ArrayLike) -> list[np.ndarray]:
    """Return each text's values: those of its windows, which follow each other."""
    return np.split(np.asarray(values), np.cumsum([len(text.ids) for text in texts])[:-1])
