"""The forward pass: perplexity of a checkpoint, streamed in JAX against transformers' model in PyTorch, in float32.

    python scripts/benchmarks/forward.py CHECKPOINT [--text PATH] [--length 256] [--sequences 24] [--rounds 5]

Both sides turn the same windows of tokens into the summed loss of the tokens that follow. JAX reads every layer from
disk in every round, as `jaxmoe evaluate` does; PyTorch holds the whole model in memory. One core, CPU seconds,
contestants in turn, medians. "sgemm" is the time of the forward pass's multiplications alone, as large float32 products
of the same shapes, without attention's scores and without routing: a bound that neither can reach.
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import jaxmoe.torch  # noqa: E402, F401  registers the factored architectures
from jaxmoe.checkpoint.stored_model import StoredModel  # noqa: E402
from jaxmoe.data import demo_checkpoint, demo_texts  # noqa: E402
from jaxmoe.evaluation.windows import score_windows, walk  # noqa: E402
from jaxmoe.model.spec import ExpertBlock  # noqa: E402
from jaxmoe.texts import Tokenizer, text_windows  # noqa: E402

BATCH = 8
"""Windows that go through PyTorch together: the fastest of 1, 4, 8, 16 and 32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=demo_checkpoint(), metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, default=demo_texts()[0].parent)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=12, help="windows of each text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = text_windows(
        [arguments.text], Tokenizer.open(arguments.checkpoint), length=arguments.length, count=arguments.sequences
    )
    ids = np.concatenate([text.ids for text in texts])
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    stored = StoredModel(arguments.checkpoint)
    contestants = {
        "jaxmoe": lambda: float(np.sum(score_windows(walk(stored, ids), ids).nats, dtype=np.float64)),
        "PyTorch": lambda: torch_loss(model, ids),
        "sgemm": products(stored, ids.size),
    }
    losses = [contestants[name]() for name in ("jaxmoe", "PyTorch")]
    seconds = alternate(contestants, arguments.rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        [name, f"{ids.size / medians[name]:,.0f}", f"{medians['sgemm'] / medians[name]:.0%}"]
        for name in ("jaxmoe", "PyTorch")
    ]
    print(f"{arguments.checkpoint.name}, {len(ids)} windows of {ids.shape[1]} tokens\n")
    print(table(["", "tokens per second", "sgemm's share"], rows))
    print(f"\nPyTorch takes {ratio(seconds['PyTorch'], seconds['jaxmoe']):.2f} times as long; ", end="")
    print(f"the losses differ by {abs(losses[0] / losses[1] - 1):.1e}")


@torch.inference_mode()
def torch_loss(model, ids: np.ndarray) -> float:
    """Return the summed loss as users of transformers compute it."""
    total = 0.0
    for start in range(0, len(ids), BATCH):
        rows = torch.from_numpy(ids[start : start + BATCH].astype("int64"))
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total


def products(stored: StoredModel, tokens: int, rows: int = 1024):
    """Return a function that multiplies as much as the forward pass does, `rows` rows at a time."""
    multiply = jax.jit(lambda x, weight: x @ weight.T)
    work = [
        (jnp.ones((rows, in_)), jnp.ones((out, in_)), round(count * tokens / rows))
        for (out, in_), count in Counter(matrices(stored)).items()
    ]

    def run() -> None:
        for x, weight, times in work:
            for _ in range(times):
                jax.block_until_ready(multiply(x, weight))

    return run


def matrices(stored: StoredModel):
    """Yield the outputs and inputs of every matrix that a token meets."""
    yield stored.spec.vocabulary, stored.spec.hidden
    for index, spec in enumerate(stored.spec.layers):
        arrays = stored.layer(index)
        for name, array in arrays.items():
            if (
                name.startswith(("attention.", "feed_forward.", "shared.", "router."))
                and getattr(array, "ndim", 0) == 2
            ):
                yield array.shape
        if isinstance(spec.feed_forward, ExpertBlock):
            shape = stored.shapes[index]
            for projection in shape.projections:
                yield from [shape.of(projection)[1:]] * spec.feed_forward.router.top_k


if __name__ == "__main__":
    main()
