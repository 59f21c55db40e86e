"""What a stored model costs beside its quality: of a token, of memory when it is loaded, and while it is made."""

import sys
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.files import read_config
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.compression.budget import disk_counts
from jaxmoe.model.spec import ExpertBlock
from jaxmoe.model.work import activity


def token_costs(model: StoredModel) -> dict[str, Any]:
    """Return what one token uses, in the mean over all choices of experts, each as likely as any other.

    Returns:
        `active_parameters`: stored numbers of the whole model without those of experts that are not chosen;
        `operations_per_token`: operations of the matrix products of the routed experts of all layers.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> costs = token_costs(StoredModel(demo_checkpoint()))
        >>> costs["operations_per_token"] == 4 * 4 * 3 * 2 * 128 * 64  # layers, experts, matrices
        True
    """
    blocks = [
        (layer.feed_forward, model.abstract_experts(index))
        for index, layer in enumerate(model.spec.layers)
        if isinstance(layer.feed_forward, ExpertBlock)
    ]
    found = activity(0, blocks)
    return {
        "active_parameters": model.checkpoint.parameters - found.stored + found.active,
        "operations_per_token": found.operations,
    }


def loaded_bytes(model: StoredModel) -> int:
    """Return the bytes of the weights that PyTorch holds when the checkpoint is loaded as it is.

    Tensors keep the size that they have in the files, packed codes of factored checkpoints included; of matrices in
    the format compressed-tensors, transformers forms bfloat16.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> loaded_bytes(StoredModel(demo_checkpoint())) == StoredModel(demo_checkpoint()).checkpoint.bytes
        True
    """
    scheme = read_config(model.folder).get("quantization_config") or {}
    expanded = scheme.get("quant_method") == "compressed-tensors"
    return sum(
        2 * matrix.numbers if expanded and len(matrix.parts) > 1 else sum(part.bytes for part in matrix.parts)
        for matrix in model.matrices.values()
    )


def bits_per_weight(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the stored bits of each number of an original's experts and of all of it; scales are bytes, not numbers.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> bits_per_weight(Checkpoint.open(demo_checkpoint()))
        {'touched': 16.0, 'experts': 16.0, 'model': 16.0}
    """
    counts = [own for layer in checkpoint.layers for own in disk_counts(checkpoint, layer).values()]
    experts = 8 * sum(own.bytes for own in counts) / sum(own.numbers for own in counts)
    return {"touched": experts, "experts": experts, "model": 8 * checkpoint.bytes / checkpoint.parameters}


def forget_peak() -> None:
    """Let the peak memory of this process begin anew, where the system can do that (Linux)."""
    if sys.platform.startswith("linux"):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # Containers may forbid it: then the peak is that of everything so far, never too small.
            return
