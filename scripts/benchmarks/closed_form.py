"""Methods in closed form on one layer of Qwen3-30B-A3B, gate alone, against the eigen-decompositions that they need.

    python scripts/benchmarks/closed_form.py [--experts 8] [--rounds 3] [--methods rfid,d2moe]

RFID-MoE without mixing needs the spectrum and the leading eigenvectors of one Gram matrix of 2048 x 2048 for every
group of four experts, in float32: one decomposition with vectors gives both. D2-MoE needs the leading eigenvectors of
one matrix of 768 x 768 for every expert, in float64 because a second moment weighs it. What stands beside them are the
same decompositions, batched alike, of matrices formed beforehand, and those together with the products that form the
matrices. All else is the method's: reading bfloat16, ranks, coefficients for the bases as stored, the residual, the
merged base, packing. Random weights; 60 % of the numbers are kept. One core, CPU seconds, contestants in turn, medians.
Work is by group or expert, so that the ratios of a few experts are those of all 128 (`--experts 128`), which take an
hour and, for D2-MoE, about 35 MB of moments each.
"""

import argparse
import statistics
import sys
from functools import partial

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxmoe import methods  # noqa: E402
from jaxmoe.factors import LayerShape  # noqa: E402
from jaxmoe.methods import Evidence  # noqa: E402
from jaxmoe.solvers.decompositions import eigh  # noqa: E402

HIDDEN, INTERMEDIATE, GROUP, KEPT = 2048, 768, 4, 0.6
CASES = {
    "rfid": {
        "paper, residual hash": {"setting": "paper", "mixing": "none"},
        "paper, no residual": {"setting": "paper", "mixing": "none", "residual": "none"},
    },
    "d2moe": {
        "paper": {"setting": "paper", "merge": "freq", "sparsity": 0.0},
        "improved": {"setting": "improved", "merge": "freq", "sparsity": 0.0, "base": "always"},
    },
}


def contestant(name: str, given: dict, weight, counts, moments):
    """Return a function that fits the layer once."""
    recipe = methods.get(name)
    assert isinstance(recipe, methods.Method)
    chosen = recipe.settings(**given)
    sizes = LayerShape(weight.shape[0], HIDDEN, INTERMEDIATE)
    slot = recipe.slot("gate", sizes, weight.dtype, chosen, KEPT)
    template = slot.at(slot.ladder().floor(KEPT * weight.size))
    evidence = Evidence(
        target="gate",
        counts=counts,
        moment=None if name == "rfid" else moments,
        statistic=lambda wanted: {"input_moments": moments}.get(wanted),
    )

    def run():
        read = jnp.asarray(weight, jnp.float32)
        fit = recipe.fit(read, template, chosen, evidence=evidence, key=jax.random.key(0))
        return jax.block_until_ready(jax.tree.leaves(fit.terms))

    return run


def rivals(name: str, weight, counts, moments):
    """Return the decompositions alone, and with the products that form their matrices, by what they are called."""
    order = np.argsort(-counts, kind="stable")
    exact = np.asarray(weight, np.float32)
    if name == "rfid":
        given = (exact[order].reshape(-1, GROUP * INTERMEDIATE, HIDDEN),)
        form = lambda stacked: jnp.matmul(jnp.swapaxes(stacked, 1, 2), stacked, precision="highest")  # noqa: E731
        side, kind = HIDDEN, np.float32
    else:
        given = (exact - np.average(exact, axis=0, weights=counts).astype(np.float32), moments)
        form = lambda delta, moment: delta @ moment @ jnp.swapaxes(delta, 1, 2)  # noqa: E731
        side, kind = INTERMEDIATE, np.float64
    formed, decompose = jax.jit(form), jax.jit(partial(eigh, symmetrize_input=False))
    given = tuple(part.astype(kind) for part in given)
    with jax.enable_x64(kind == np.float64):
        grams = np.asarray(formed(*given))

    def run(both: bool):
        with jax.enable_x64(kind == np.float64):
            return jax.block_until_ready(decompose(formed(*given) if both else jnp.asarray(grams)))

    label = f"{len(grams)} eigh of {side} x {side}, {kind.__name__}"
    return {label: partial(run, False), "these with their matrices": partial(run, True)}


def measure(name: str, experts: int, rounds: int) -> list[list[str]]:
    rng = np.random.default_rng(0)
    decay = np.geomspace(1, 0.2, HIDDEN, dtype=np.float32)
    weight = 0.02 * rng.standard_normal((experts, INTERMEDIATE, HIDDEN), np.float32) * decay
    weight = np.asarray(jnp.asarray(weight, jnp.bfloat16))
    counts = np.sort(rng.integers(100, 9000, experts))
    moments = None
    if name == "d2moe":
        inputs = rng.standard_normal((experts, 2 * HIDDEN, HIDDEN), np.float32) * decay
        moments = np.stack([np.matmul(own.T, own).astype(np.float64) for own in inputs]) / (2 * HIDDEN)
        moments *= counts[:, None, None]
    contestants = rivals(name, weight, counts, moments)
    alone, formed = contestants
    contestants |= {case: contestant(name, given, weight, counts, moments) for case, given in CASES[name].items()}
    seconds = alternate(contestants, rounds)
    return [
        [
            name,
            case,
            f"{statistics.median(times):.2f}",
            *(f"{ratio(times, seconds[rival]):.2f}" for rival in (alone, formed)),
        ]
        for case, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8, help="a multiple of four")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(CASES))
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {arguments.experts} experts, {arguments.rounds} rounds")
    header = ["method", "", "CPU seconds", "of eigh alone", "of eigh with its matrices"]
    for name in arguments.methods.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        print("\n" + table(header, measure(name, arguments.experts, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
