"""The routed experts of one layer where half of a token's experts run, against all of them and against half alone.

    python scripts/benchmarks/compressed_experts.py [--tokens 2048] [--rounds 7]

"half, others compensated for" averages the vectors of the auxiliary experts, scales what gate, up and down read, and
runs the main experts; "half" runs these alone, as a model with half as many experts per token would. Ordering a token's
experts by weight is counted, choosing them is not. Random numbers in float32, tokens routed at random, every expert
equally often. CPU time is that of one core, contestants in turn, medians; operations are those of `model.work`.
On Linux the process keeps its memory between calls: glibc would give every buffer above 32 MB back and fetch it again
page by page, which takes longer than the arithmetic that is compared here.
"""

import argparse
import ctypes
import statistics
import sys
from dataclasses import replace
from functools import partial

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxmoe.factors import CompressedLayer, Dense, LayerShape, Term  # noqa: E402
from jaxmoe.model.blocked import BlockShape, block_rows, blocks_needed  # noqa: E402
from jaxmoe.model.compressed_experts import by_weight, vector_shapes  # noqa: E402
from jaxmoe.model.layer import routed  # noqa: E402
from jaxmoe.model.routing import Routes  # noqa: E402
from jaxmoe.model.spec import ExpertBlock, Router  # noqa: E402
from jaxmoe.model.work import block_work  # noqa: E402

SHAPES = {
    "32 experts, top 4": (LayerShape(experts=32, hidden=256, intermediate=128), 4),
    # Hidden size, intermediate size and top-k of OLMoE and of Qwen3-30B-A3B, a quarter and an eighth of their experts.
    "OLMoE, 16 experts, top 8": (LayerShape(experts=16, hidden=2048, intermediate=1024), 8),
    "Qwen3-MoE, 16 experts, top 8": (LayerShape(experts=16, hidden=2048, intermediate=768), 8),
}
FULL, HALF, COMPENSATED = "all", "half", "half, others compensated for"


def keep_memory() -> None:
    """Tell glibc to map no buffers of their own and to give nothing back."""
    if sys.platform.startswith("linux"):
        mmap_max, trim_threshold = -4, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def routes(tokens: int, experts: int, top_k: int) -> Routes:
    """Return experts for every token, each equally often, with weights that fall."""
    random = np.random.default_rng(1)
    chosen = (random.permutation(tokens)[:, None] + np.arange(top_k) * (experts // top_k)) % experts
    weights = np.sort(random.random(chosen.shape, np.float32))[:, ::-1]
    return Routes(jnp.asarray(chosen), jnp.asarray(weights / weights.sum(1, keepdims=True)))


def program(block: ExpertBlock, chosen: Routes):
    """Return the jitted sum of a layer's experts."""
    used = np.asarray(chosen.experts)[:, : block.running]
    rows = block_rows(used.size, block.shape.experts)
    counts = np.bincount(used.reshape(-1), minlength=block.shape.experts)
    shape = BlockShape(rows, blocks_needed(counts, rows))

    def run(x, chosen, parameters):
        own = by_weight(chosen) if block.running < block.router.top_k else chosen
        return routed(x, own, parameters, block, shape=shape)[0].combined

    return jax.jit(run)


def report(name: str, sizes: LayerShape, top_k: int, tokens: int, rounds: int) -> None:
    """Measure the contestants of one shape and print a table."""
    draw = np.random.default_rng(0).standard_normal

    def array(*shape):
        return jnp.asarray(draw(shape, np.float32) / shape[-1] ** 0.5)

    terms: dict[str, tuple[Term, ...]] = {own: (Dense(weight=array(*sizes.of(own))),) for own in sizes.projections}
    vectors = {own: 1 + array(*shape) for own, shape in vector_shapes(sizes).items()}
    experts = CompressedLayer(terms=terms, sizes=sizes)
    parameters = {"experts": experts, **vectors}
    everything = routes(tokens, sizes.experts, top_k)
    half = Routes(*(part[:, : top_k // 2] for part in everything))
    x = array(tokens, sizes.hidden)
    block = ExpertBlock(shape=sizes, router=Router(experts=sizes.experts, top_k=top_k))
    alone = replace(block, router=Router(experts=sizes.experts, top_k=top_k // 2))
    contestants = {
        FULL: (block, everything),
        HALF: (alone, half),
        COMPENSATED: (replace(block, main=top_k // 2), everything),
    }

    def outputs(run, chosen):
        return jax.block_until_ready(run(x, chosen, parameters))

    runs = {own: partial(outputs, program(spec, chosen), chosen) for own, (spec, chosen) in contestants.items()}
    seconds = alternate(runs, rounds)
    rows = [
        [
            own,
            f"{block_work(spec, parameters['experts']).operations / 1e6:.2f}",
            f"{statistics.median(seconds[own]) / tokens * 1e6:.1f}",
            f"{ratio(seconds[own], seconds[FULL]):.2f}",
            f"{ratio(seconds[own], seconds[HALF]):.2f}",
        ]
        for own, (spec, _) in contestants.items()
    ]
    print(f"\n{name}: {sizes.hidden} x {sizes.intermediate}, {tokens} tokens\n")
    header = ["experts that run", "million operations per token", "CPU microseconds per token", "time of all"]
    print(table([*header, "time of half"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_memory()
    for name, (sizes, top_k) in SHAPES.items():
        report(name, sizes, top_k, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
