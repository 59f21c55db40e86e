"""Perplexity of a checkpoint, computed by transformers and PyTorch.

The text is tokenised as a whole and cut into windows of `length` tokens without overlap. Every window is predicted from
its own tokens only, so the first token of each is given; the tail that does not fill a window is left out and counted.
The geometric mean over texts gives every text the same say. This measures what users of the checkpoint will run,
factored checkpoints included; it holds the whole model in memory.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import jaxmoe.torch  # noqa: F401  registers the factored architectures
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation import Evaluation, TextEvaluation


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
        texts: UTF-8 text files, one domain each.
        length: tokens in a window, at least 2.
        windows: so many windows of each text, evenly spread over it, or None for all.
        dtype: what the model computes in, by PyTorch's name.
        batch: windows that go through the model together.

    Returns:
        The loss per text, over `windows * (length - 1)` predicted tokens each.

    Raises:
        JaxmoeError: a text is missing or shorter than one window, or the model's loss is not a number.
    """
    if length < 2 or (windows is not None and windows < 1) or not texts:
        raise JaxmoeError(f"length {length}, windows {windows}, {len(texts)} texts: give at least 2, 1 and 1 of them")
    if missing := [str(path) for path in texts if not Path(path).is_file()]:
        raise JaxmoeError(f"no such text file: {', '.join(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = {path: _tokenize(tokenizer, Path(path)) for path in texts}
    if short := [f"{path} ({len(ids)})" for path, ids in tokens.items() if len(ids) < length]:
        raise JaxmoeError(f"fewer than {length} tokens in {', '.join(short)}: give longer texts or a smaller length")

    model = _load(checkpoint, dtype)
    results, processed, seconds = [], 0, 0.0
    for path, ids in tokens.items():
        complete = len(ids) // length
        rows = ids[: complete * length].reshape(complete, length)
        if windows is not None and windows < complete:
            # Spread, not the first: neighbouring windows come from the same few documents.
            rows = rows[[(2 * i + 1) * complete // (2 * windows) for i in range(windows)]]
        started = time.perf_counter()
        loss = sum(_loss(model, rows[start : start + batch]) for start in range(0, len(rows), batch))
        seconds += time.perf_counter() - started
        processed += rows.numel()
        if not math.isfinite(loss):
            raise JaxmoeError(
                f"the loss of {checkpoint} on {path} is {loss}: its weights or {dtype} arithmetic overflow"
            )
        predicted = rows.numel() - len(rows)
        left_out = len(ids) - complete * length
        results.append(
            TextEvaluation(name=Path(path).stem, tokens=predicted, left_out=left_out, nats_per_token=loss / predicted)
        )
    return Evaluation(texts=tuple(results), tokens_per_second=processed / seconds)


def _load(checkpoint: str | Path, dtype: str):
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenize(tokenizer, path: Path) -> torch.Tensor:
    # verbose: a text longer than the model's context is no mistake here, it is cut into windows.
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


@torch.inference_mode()
def _loss(model, rows: torch.Tensor) -> float:
    """Return the summed negative log-likelihood, in nats, of all tokens but the first of each row."""
    rows = rows.to(model.device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
