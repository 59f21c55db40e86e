"""The experts of one layer as D2-MoE stores them, the base applied once for every token, against the original ones.

    python scripts/benchmarks/base_once.py [--tokens 2048] [--rounds 5]

A base for all experts and a pair of low-rank factors for each, all of random numbers, store 60 % of what the original
matrices do. "Once for every expert" multiplies by the same base for every expert of a token, as a dense term of each
expert would. Operations are those of the compiled program (JAX's cost analysis) without loops, so that every product
counts; most of what exceeds the products themselves pads rows to blocks. CPU time is that of one core, contestants in
turn, medians. Float32, rows routed at random, every expert equally often.
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank, Shared, Term  # noqa: E402
from jaxmoe.factors.leaves import pytree  # noqa: E402
from jaxmoe.model import blocked  # noqa: E402
from jaxmoe.model.blocked import BlockShape, block_rows, blocks_needed  # noqa: E402
from jaxmoe.model.experts import run_experts  # noqa: E402
from jaxmoe.model.spec import Gate  # noqa: E402

KEPT = 0.6
SHAPES = {
    "16 experts, top 4": (LayerShape(experts=16, hidden=256, intermediate=512), 4),
    # Hidden size, intermediate size and top-k of Qwen3-30B-A3B, an eighth of its experts.
    "Qwen3-MoE, 16 experts, top 8": (LayerShape(experts=16, hidden=2048, intermediate=768), 8),
}


@pytree(static=("experts", "out", "in_", "axis", "parts", "dynamic"))
@dataclass(frozen=True, kw_only=True)
class Repeated(Shared):
    """A base that is taken for a matrix of each expert."""

    for_all = False


def layers(sizes: LayerShape) -> tuple[dict[str, CompressedLayer], int]:
    """Return the contestants, and the rank that the size asks for."""
    draw = np.random.default_rng(0).standard_normal

    def array(*shape):
        return jnp.asarray(draw(shape, np.float32) / shape[-1] ** 0.5)

    shapes = {target: sizes.of(target) for target in ("gate_up", "down")}
    base = sum(out * in_ for _, out, in_ in shapes.values())
    rank = int((KEPT * sizes.numbers - base) / sum(experts * (out + in_) for experts, out, in_ in shapes.values()))
    pairs = {
        target: LowRank(left=array(experts, out, rank), right=array(experts, rank, in_))
        for target, (experts, out, in_) in shapes.items()
    }

    bases = {target: array(out, in_) for target, (_, out, in_) in shapes.items()}

    def with_base(kind) -> CompressedLayer:
        terms: dict[str, tuple[Term, ...]] = {
            target: (kind.build(bases[target], experts=sizes.experts), pairs[target]) for target in shapes
        }
        return CompressedLayer(terms=terms, sizes=sizes).check()

    original: dict[str, tuple[Term, ...]] = {target: (Dense(weight=array(*shape)),) for target, shape in shapes.items()}
    return {
        "original": CompressedLayer(terms=original, sizes=sizes),
        "base once for every expert": with_base(Repeated),
        "base once for every token": with_base(Shared),
    }, rank


def routed(tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Return experts for every token, each equally often."""
    starts = np.random.default_rng(1).permutation(tokens)
    return (starts[:, None] + np.arange(top_k) * (experts // top_k)) % experts


def program(tokens: int, chosen: np.ndarray, sizes: LayerShape):
    """Return the jitted weighted sum of a layer's experts, and its inputs beside the layer."""
    rows = block_rows(chosen.size, sizes.experts)
    shape = BlockShape(rows, blocks_needed(np.bincount(chosen.reshape(-1), minlength=sizes.experts), rows))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((tokens, sizes.hidden), np.float32))
    weights = jnp.full(chosen.shape, 1 / chosen.shape[1])

    def run(layer, x, weights):
        return run_experts(x, jnp.asarray(chosen), layer, Gate(), {}, shape, weights=weights).combined

    return run, (x, weights)


def operations(run, layer, inputs) -> float:
    """Count the operations of the compiled program with all blocks in one product: the analysis counts a loop once."""
    limit, blocked._COPIES = blocked._COPIES, 1 << 62
    try:
        # A function of its own: what was traced under another limit must not serve.
        analysis = jax.jit(lambda *arguments: run(*arguments)).lower(layer, *inputs).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]
    finally:
        blocked._COPIES = limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name, (sizes, top_k) in SHAPES.items():
        report(name, sizes, top_k, arguments.tokens, arguments.rounds)


def report(name: str, sizes: LayerShape, top_k: int, tokens: int, rounds: int) -> None:
    """Measure the contestants of one shape and print a table."""
    contestants, rank = layers(sizes)
    run, inputs = program(tokens, routed(tokens, sizes.experts, top_k), sizes)
    compiled = jax.jit(run)

    def outputs(layer: CompressedLayer):
        return jax.block_until_ready(compiled(layer, *inputs))

    seconds = alternate({key: partial(outputs, layer) for key, layer in contestants.items()}, rounds)
    rows = [
        [
            key,
            f"{layer.count().numbers / sizes.numbers:.0%}",
            f"{operations(run, layer, inputs) / tokens / 1e6:.1f}",
            f"{statistics.median(seconds[key]) / tokens * 1e6:.0f}",
            f"{ratio(seconds[key], seconds['original']):.2f}",
        ]
        for key, layer in contestants.items()
    ]
    repeated, once = (np.asarray(outputs(layer)) for layer in list(contestants.values())[1:])
    spread = np.abs(once - repeated).max() / np.abs(repeated).max()
    print(f"\n{name}: {sizes.hidden} x {sizes.intermediate}, rank {rank}, {tokens} tokens")
    print(f"the two ways of applying the base differ by {spread:.0e}\n")
    print(table(["", "stored", "million operations per token", "CPU microseconds per token", "time of original"], rows))


if __name__ == "__main__":
    main()
