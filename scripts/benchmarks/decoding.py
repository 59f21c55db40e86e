"""Tokens per second in PyTorch: experts in few bits against the dense model, in float32 and bfloat16.

    python scripts/benchmarks/decoding.py [--recipes rtn4,squeezellm3] [--hidden 1024] [--layers 4] [--rounds 5]

A random Qwen3-MoE (16 experts, 4 of them for a token, expert intermediate size hidden / 2) is written, compressed by
every recipe and loaded as a user would load it; then one token is decoded for each of 1 and of 64 sequences. One core,
CPU seconds, contestants in turn, medians. "unpacking" is the part of a decoding step in which weights are formed from
codes.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from one_core import alternate, pin, ratio, table

pin()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

import jaxmoe  # noqa: E402
import jaxmoe.torch  # noqa: E402  registers the factored architectures
from jaxmoe.torch.runtime.stores import StoredArray  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="rtn4,squeezellm3", help="names with bits, which need no text")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = {"dense": write(Path(folder) / "dense", arguments.hidden, arguments.layers)}
        for recipe in arguments.recipes.split(","):
            written[recipe] = Path(folder) / recipe
            jaxmoe.compress(written["dense"], written[recipe], recipe)
        for dtype in (torch.float32, torch.bfloat16):
            models = {
                name: AutoModelForCausalLM.from_pretrained(at, dtype=dtype).eval() for name, at in written.items()
            }
            for batch in (1, 64):
                ids = torch.randint(0, 512, (batch, 1))
                steps = {name: lambda model=model, ids=ids: decode(model, ids) for name, model in models.items()}
                seconds = alternate(steps, arguments.rounds)
                for name in steps:
                    rows.append(
                        [
                            str(dtype).removeprefix("torch."),
                            str(batch),
                            name,
                            f"{batch / statistics.median(seconds[name]):.1f}",
                            f"{ratio(seconds[name], seconds['dense']):.2f}",
                            f"{unpacking(steps[name]):.0%}",
                        ]
                    )
    print(table(["dtype", "sequences", "experts", "tokens per second", "time over dense", "unpacking"], rows))


def write(folder: Path, hidden: int, layers: int) -> Path:
    """Write a random model in bfloat16."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=128,
    )
    model = Qwen3MoeForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    return folder


@torch.inference_mode()
def decode(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Run one token of each sequence through the model."""
    model(input_ids=ids, use_cache=False)


def unpacking(step) -> float:
    """Return the part of a step that is spent where weights are formed from codes."""
    own, name = StoredArray._numbers, "jaxmoe: numbers from codes"

    def watched(*given, **options):
        with torch.profiler.record_function(name):
            return own(*given, **options)

    StoredArray._numbers = watched
    try:
        with torch.profiler.profile() as profile, torch.profiler.record_function("whole"):
            step()
    finally:
        StoredArray._numbers = own
    times = {event.key: event.cpu_time_total for event in profile.key_averages()}
    return times.get(name, 0.0) / times["whole"]


if __name__ == "__main__":
    main()
