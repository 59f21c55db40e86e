"""What a stored model costs beside its quality: numbers and operations of a token, and memory while it is made."""

import sys
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint.stored_model import StoredModel
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


def forget_peak() -> None:
    """Let the peak memory of this process begin anew, where the system can do that (Linux)."""
    if sys.platform.startswith("linux"):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # Containers may forbid it: then the peak is that of everything so far, never too small.
            return
