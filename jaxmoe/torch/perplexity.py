"""Perplexity of a checkpoint, computed by transformers and PyTorch.

The text is cut into windows of `length` tokens without overlap (`jaxmoe.texts`). Every window is predicted from its own
tokens only, so the first token of each is given; the tail that does not fill a window is left out and counted.
The geometric mean over texts gives every text the same say. This measures what users of the checkpoint will run,
factored checkpoints included; it holds the whole model in memory.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import jaxmoe.torch  # noqa: F401  registers the factored architectures
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation import Evaluation, TextEvaluation
from jaxmoe.texts import Tokenizer, text_windows


def perplexity(
    checkpoint: str | Path,
    texts: Sequence[Path],
    *,
    length: int = 256,
    windows: int | None = None,
    dtype: str = "float32",
    batch: int = 8,
) -> Evaluation:
    """Measure the perplexity of a checkpoint on text files.

    Args:
        checkpoint: a folder or a hub id, original or written by jaxmoe.
        texts: text files, folders of them or JSON-lines files, as `jaxmoe.texts.read_texts` takes them.
        length: tokens in a window, at least 2.
        windows: so many windows of each text, evenly spread over it, or None for all.
        dtype: what the model computes in, by PyTorch's name.
        batch: windows that go through the model together.

    Returns:
        The loss per text, over `windows * (length - 1)` predicted tokens each.

    Raises:
        JaxmoeError: a text is missing, no text or shorter than one window, the tokenizer does not match the model, or
            the model's loss is not a number.
    """
    cut = text_windows(texts, Tokenizer.open(checkpoint), length=length, count=windows)
    model = _load(checkpoint, dtype)
    results, processed, seconds = [], 0, 0.0
    for text in cut:
        rows = torch.from_numpy(text.ids.astype("int64"))
        started = time.perf_counter()
        loss = sum(_loss(model, rows[start : start + batch]) for start in range(0, len(rows), batch))
        seconds += time.perf_counter() - started
        processed += rows.numel()
        if not math.isfinite(loss):
            raise JaxmoeError(
                f"the loss of {checkpoint} on {text.name} is {loss}: its weights or {dtype} arithmetic overflow"
            )
        predicted = rows.numel() - len(rows)
        results.append(
            TextEvaluation(name=text.name, tokens=predicted, left_out=text.left_out, nats_per_token=loss / predicted)
        )
    return Evaluation(texts=tuple(results), length=length, tokens_per_second=processed / seconds)


def _load(checkpoint: str | Path, dtype: str):
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def _loss(model, rows: torch.Tensor) -> float:
    """Return the summed negative log-likelihood, in nats, of all tokens but the first of each row."""
    rows = rows.to(model.device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
