"""Streaming conversion of 1 GB with 5 and with 40 layers, `inspect` of 60,000 tensors, and the import.

    python scripts/benchmarks/conversion.py [--folder FOLDER] [--gigabytes 1]

Random bf16 checkpoints of Qwen3-MoE shape with equal experts (128 x 1024), 5 thick layers or 40 thin ones, are written
to a temporary folder and removed again. `jaxmoe compress --method svd --ratio 0.95` runs as its users run it, on all
cores; "arithmetic" is what the same decompositions alone take here. Memory is anonymous (RssAnon of /proc/PID/status,
polled every few milliseconds): mapped files are the page cache's and can be dropped at any time. The file system's
cache is warm.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from one_core import table

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the command line sets it, before JAX loads the library

import jax
import ml_dtypes
import numpy as np

from jaxmoe.checkpoint.tensor_file import Planned, write_tensors
from jaxmoe.data import demo_checkpoint
from jaxmoe.factors import LayerShape
from jaxmoe.solvers.weighted_svd import weighted_svd

PROGRAM = str(Path(sys.executable).with_name("jaxmoe"))
HIDDEN, INTERMEDIATE, RATIO = 1024, 128, "0.95"


class Run(NamedTuple):
    """A finished child process: wall and CPU seconds, peak anonymous bytes."""

    wall: float
    cpu: float
    anonymous: int


def run(*command: str) -> Run:
    """Run a command to its end while watching its memory; raise if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _anonymous(child.pid))
            time.sleep(0.003)
        wall = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{output.read()}")
        return Run(wall, usage.ru_utime + usage.ru_stime, peak)


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


def names_and_shapes(
    layers: int, experts: int, hidden: int, intermediate: int, vocabulary: int = 1024
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a Qwen3-MoE checkpoint with four small attention heads, in the hub's names and order."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, rows, columns in (("q", 64, hidden), ("k", 32, hidden), ("v", 32, hidden), ("o", hidden, 64)):
            yield f"{block}.self_attn.{name}_proj.weight", (rows, columns)
        yield f"{block}.self_attn.q_norm.weight", (16,)
        yield f"{block}.self_attn.k_norm.weight", (16,)
        yield f"{block}.mlp.gate.weight", (experts, hidden)
        for expert in range(experts):
            for name, shape in (
                ("gate", (intermediate, hidden)),
                ("up", (intermediate, hidden)),
                ("down", (hidden, intermediate)),
            ):
                yield f"{block}.mlp.experts.{expert}.{name}_proj.weight", shape
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def generate(
    folder: Path,
    *,
    layers: int,
    experts: int,
    hidden: int,
    intermediate: int,
    vocabulary: int = 1024,
    shard_bytes: int = 1 << 28,
) -> int:
    """Write a random sharded checkpoint and return the bytes of its tensors."""
    rng = np.random.default_rng(0)

    def produce(shape):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    shards: list[list[Planned]] = [[]]
    for name, shape in names_and_shapes(layers, experts, hidden, intermediate, vocabulary):
        # At most 8192 tensors in a file, as large checkpoints have it.
        if sum(t.bytes for t in shards[-1]) >= shard_bytes or len(shards[-1]) == 8192:
            shards.append([])
        shards[-1].append(Planned(name, "bfloat16", shape, partial(produce, shape)))
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, tensors)
        weight_map |= {tensor.name: file for tensor in tensors}
    total = sum(tensor.bytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((demo_checkpoint() / "config.json").read_text())
    sizes = {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "head_dim": 16,
    }
    (folder / "config.json").write_text(json.dumps(config | sizes, indent=2))
    return total


def arithmetic(report: dict, layers: int, experts: int) -> float:
    """Return the CPU seconds of the decompositions alone, from one layer's time."""
    sizes = LayerShape(experts=experts, hidden=HIDDEN, intermediate=INTERMEDIATE)
    terms = {t["target"]: t["rank"] for p in report["layers"][0]["projections"].values() for t in p["terms"]}
    seconds = 0.0
    for target, rank in terms.items():
        weight = jax.random.normal(jax.random.key(0), sizes.of(target))
        solve = jax.jit(partial(weighted_svd, rank=rank))
        jax.block_until_ready(solve(weight))
        begin = time.process_time()
        jax.block_until_ready(solve(weight))
        seconds += time.process_time() - begin
    return seconds * layers


def convert(folder: Path, layers: int, experts: int, idle: int) -> list[str]:
    source, output = folder / f"source-{layers}", folder / f"output-{layers}"
    size = generate(source, layers=layers, experts=experts, hidden=HIDDEN, intermediate=INTERMEDIATE)
    begin = time.perf_counter()
    shutil.copytree(source, folder / "copy")
    copied = size / (time.perf_counter() - begin)
    command = (PROGRAM, "compress", str(source), str(output), "--method", "svd", "--ratio", RATIO, "--of", "experts")
    result = run(*command, "--json")
    report = json.loads((output / "report.json").read_text())
    alone = arithmetic(report, layers, experts)
    for path in (source, output, folder / "copy"):
        shutil.rmtree(path)
    layer = 3 * experts * HIDDEN * INTERMEDIATE * 4
    return [
        f"{layers} x {experts}",
        f"{size / 1e6:.0f}",
        f"{result.wall:.1f}",
        f"{size / 1e6 / result.wall:.0f}",
        f"{result.cpu:.1f}",
        f"{alone:.1f}",
        f"{copied / 1e6:.0f}",
        f"{layer / 1e6:.0f}",
        f"{result.anonymous / 1e6:.0f}",
        f"{(result.anonymous - 1.5 * layer) / 1e6:.0f}",
        f"{idle / 1e6:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoints")
    arguments = parser.parse_args()
    thin = round(32 * arguments.gigabytes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        idle = run(sys.executable, "-c", "import jax; jax.numpy.zeros(1).block_until_ready()").anonymous
        rows = [convert(folder, layers, experts, idle) for layers, experts in ((5, 8 * thin), (40, thin))]
        print(
            table(
                [
                    "layers x experts",
                    "MB",
                    "seconds",
                    "MB/s",
                    "CPU s",
                    "arithmetic alone, CPU s",
                    "cp, MB/s",
                    "one layer in float32, MB",
                    "peak anonymous, MB",
                    "peak - 1.5 layers, MB",
                    "idle JAX, MB",
                ],
                rows,
            )
        )
        many = folder / "many"
        generate(many, layers=78, experts=256, hidden=16, intermediate=8)
        tensors = sum(1 for _ in names_and_shapes(78, 256, 16, 8))
        looks = [run(PROGRAM, "inspect", str(many), "--json") for _ in range(3)]
    bare = [run(sys.executable, "-c", "pass").wall for _ in range(7)]
    imports = [run(sys.executable, "-c", "import jaxmoe").wall for _ in range(7)]
    print()
    print(
        table(
            ["what", "seconds (median)"],
            [
                [f"`jaxmoe inspect` of {tensors} tensors", f"{statistics.median(x.wall for x in looks):.2f}"],
                ["`import jaxmoe`", f"{statistics.median(imports) - statistics.median(bare):.2f}"],
            ],
        )
    )


if __name__ == "__main__":
    main()
