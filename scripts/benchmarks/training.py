"""A training step: next-token loss, gradients of every parameter and AdamW, in JAX against transformers in PyTorch.

    python scripts/benchmarks/training.py CHECKPOINT [--rows 8] [--length 256] [--rounds 5]

Both sides hold the whole model in float32, take the same rows of tokens and keep all activations. One core, CPU
seconds, contestants in turn, medians.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jaxmoe.checkpoint.stored_model import StoredModel  # noqa: E402
from jaxmoe.data import demo_checkpoint, demo_texts  # noqa: E402
from jaxmoe.recovery import Batch, Training, begin, merge, select, split, train_step  # noqa: E402
from jaxmoe.texts import Tokenizer, text_windows  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=demo_checkpoint(), metavar="CHECKPOINT")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.open(arguments.checkpoint)
    texts = text_windows([demo_texts()[0].parent], tokenizer, length=arguments.length)
    ids = np.concatenate([text.ids for text in texts])[: arguments.rows]
    sides = {"jaxmoe": Ours(arguments.checkpoint, ids), "PyTorch": Theirs(arguments.checkpoint, ids)}
    losses = [[side() for _ in range(2)] for side in sides.values()]
    seconds = alternate(sides, arguments.rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{arguments.checkpoint.name}, {len(ids)} rows of {arguments.length} tokens, every parameter\n")
    print(table(["", "tokens per second"], [[name, f"{ids.size / medians[name]:,.0f}"] for name in sides]))
    print(f"\nPyTorch takes {ratio(seconds['PyTorch'], seconds['jaxmoe']):.2f} times as long; ", end="")
    print(f"the losses of the second step differ by {abs(losses[0][1] / losses[1][1] - 1):.1e}")


class Ours:
    """A step of jaxmoe."""

    def __init__(self, checkpoint: Path, ids: np.ndarray):
        model = StoredModel(checkpoint)
        training = Training(rows=len(ids), learning_rate=1e-4, warmup=0.0, schedule="stable")
        parameters = model.parameters()
        chosen = select(parameters, ["all"])
        self.state = begin(split(parameters, chosen), training)
        self.frozen = merge(parameters, dict.fromkeys(chosen, jnp.zeros(0)))
        learned = np.ones(ids.shape, bool)
        learned[:, 0] = False
        self.batch = Batch(ids, np.ones_like(ids), learned)
        self.step = jax.jit(partial(train_step, specs=(model.spec, None), training=training), donate_argnums=0)

    def __call__(self) -> float:
        self.state, found = self.step(self.state, self.frozen, None, self.batch)
        jax.block_until_ready(self.state)
        return float(found["loss"])


class Theirs:
    """A step as users of transformers write it."""

    def __init__(self, checkpoint: Path, ids: np.ndarray):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
        self.ids = torch.from_numpy(ids.astype("int64"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)

    def __call__(self) -> float:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


if __name__ == "__main__":
    main()
