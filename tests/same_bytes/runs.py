"""About thirty small runs of every method, and the checksums of the tensors that they write.

As a program, `python runs.py FOLDER [NAME...]`, it carries them out with whatever `jaxmoe` is on the path and prints
their checksums as JSON: `scripts/same_bytes.py` compares two versions of the code with that.
"""

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from program import call
from safetensors import safe_open
from small_checkpoints import write_checkpoint, write_text

DTYPES = {"qwen3_moe": "float32", "mixtral": "bfloat16", "deepseek_v3": "bfloat16", "gpt_oss": "float32"}
TEXT = ("--text", "{text}", "--sequences", 6, "--length", 32)
STATISTICS = ("--statistics", "{statistics}")


class Run(NamedTuple):
    """One command line.

    Args:
        architecture: of the checkpoint that it reads.
        words: of the command, but for checkpoint and output; {text} and {statistics} are filled in.
        command: what to run.
    """

    architecture: str
    words: tuple
    command: str = "compress"


def _run(architecture: str, method: str, *words, ratio=0.4) -> Run:
    sized = () if method == "compressed_experts" else ("--ratio", ratio)
    return Run(architecture, ("--method", method, *sized, *words))


def _set(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


PAPER = ("--setting", "paper")
RUNS: dict[str, Run] = {
    "statistics-pooled": Run("qwen3_moe", ("--moments", "pooled", *TEXT), "calibrate"),
    "statistics-token": Run("mixtral", ("--gradients", "token", "--moments", "expert", *TEXT), "calibrate"),
    "svd": _run("qwen3_moe", "svd"),
    "svd-paper": _run("mixtral", "svd", *PAPER, "--of", "model", ratio=0.2),
    "svd-statistics": _run("gpt_oss", "svd", *STATISTICS),
    "svd-spectral-dense": _run("deepseek_v3", "svd", *STATISTICS, "--allocation", "spectral", "--export", "dense"),
    "svd-importance-paper": _run("mixtral", "svd", *STATISTICS, *PAPER, "--allocation", "importance"),
    "svd-sequential": _run("qwen3_moe", "svd", *TEXT, "--sequential"),
    "svd-layers": _run("deepseek_v3", "svd", "--layers", "2:3", "--of", "touched"),
    "mobe": _run("qwen3_moe", "mobe", *STATISTICS, *_set("steps=8")),
    "mobe-seed": _run("mixtral", "mobe", "--seed", 7, *_set("steps=8", "activation=tanh")),
    "mobe-paper": _run("deepseek_v3", "mobe", *PAPER, *_set("steps=6", "bases=2"), ratio=0.2),
    "mobe-dense": _run(
        "gpt_oss", "mobe", "--export", "dense", "--allocation", "uniform", *STATISTICS, *_set("steps=4")
    ),
    "rfid": _run("deepseek_v3", "rfid", *STATISTICS, *_set("steps=8")),
    "rfid-paper": _run("qwen3_moe", "rfid", *PAPER, *STATISTICS, *_set("steps=6"), ratio=0.2),
    "rfid-closed-form": _run("mixtral", "rfid", *_set("mixing=none", "residual=topk", "group=3")),
    "d2moe": _run("qwen3_moe", "d2moe", *STATISTICS),
    "d2moe-paper": _run("deepseek_v3", "d2moe", *PAPER, *STATISTICS),
    "d2moe-ties": _run("mixtral", "d2moe", *_set("merge=ties", "share_v=true", "trim=0.25", "base=always")),
    "hc_smoe": _run("mixtral", "hc_smoe", *STATISTICS, ratio=0.5),
    "hc_smoe-paper": _run("qwen3_moe", "hc_smoe", *PAPER, *STATISTICS, ratio=0.25),
    "reap": _run("gpt_oss", "reap", *STATISTICS, ratio=0.5),
    "reap-paper": _run("deepseek_v3", "reap", *PAPER, *STATISTICS, ratio=0.5),
    "frequency": _run("mixtral", "frequency", *STATISTICS, "--export", "slim", ratio=0.25),
    "camera": _run("qwen3_moe", "camera", *STATISTICS, *_set("multiple=4")),
    "camera-paper": _run("mixtral", "camera", *PAPER, *STATISTICS),
    "nystrom": _run("mixtral", "nystrom", *STATISTICS, *_set("multiple=2")),
    "nystrom-paper": _run("gpt_oss", "nystrom", *PAPER, *STATISTICS),
    "compressed_experts": _run("qwen3_moe", "compressed_experts", "--main-experts", 1),
    "compressed_experts-text": _run("mixtral", "compressed_experts", "--main-experts", 1, *TEXT, *_set("steps=20")),
    "reap+mobe": _run("qwen3_moe", "reap+mobe", *TEXT, *_set("mobe.steps=6", "reap.share=2"), ratio=0.5),
    "nystrom+svd": _run("qwen3_moe", "nystrom+svd", *TEXT, ratio=0.5),
    "frequency+camera+d2moe": _run("mixtral", "frequency+camera+d2moe", *TEXT, *_set("camera.multiple=2"), ratio=0.5),
}


class Sources:
    """The checkpoints, texts and statistics of the runs below one folder, each made when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def checkpoint(self, architecture: str) -> Path:
        path = self.folder / architecture
        return path if path.is_dir() else write_checkpoint(path, architecture, DTYPES[architecture])

    def text(self) -> Path:
        path = self.folder / "text"
        return path if path.is_dir() else write_text(path)

    def statistics(self, architecture: str) -> Path:
        path = self.folder / f"{architecture}-statistics"
        if not path.is_dir():
            self._carry_out(Run(architecture, ("--gradients", "sequence", *TEXT), "calibrate"), path)
        return path

    def run(self, name: str) -> dict[str, list]:
        """Carry a run out and return the checksums of what it wrote."""
        output = self.folder / "out" / name
        self._carry_out(RUNS[name], output)
        return checksums(output)

    def _carry_out(self, run: Run, output: Path) -> None:
        needed = {"{text}": self.text, "{statistics}": lambda: self.statistics(run.architecture)}
        words = [needed[word]() if word in needed else word for word in run.words]
        output.parent.mkdir(parents=True, exist_ok=True)
        done = call(run.command, self.checkpoint(run.architecture), output, *words)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(done.args)}: {done.stderr}")


def checksums(folder: Path) -> dict[str, list]:
    """Return `[dtype, shape, SHA-256 of the bytes]` of every tensor of a folder by the file's folder and its name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        # The sharding of a checkpoint is none of its content.
        below = path.parent.relative_to(folder) if path.name.startswith("model") else path.relative_to(folder)
        with safe_open(path, "np") as file:
            header = file.keys()
        for name in header:
            dtype, shape, data = _stored(path, name)
            found[name if str(below) == "." else f"{below}:{name}"] = [dtype, shape, hashlib.sha256(data).hexdigest()]
    return dict(sorted(found.items()))


def _stored(path: Path, name: str) -> tuple[str, list[int], bytes]:
    """Read one tensor as it lies in its file, whatever its dtype."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        first, end = entry["data_offsets"]
        file.seek(8 + length + first)
        return entry["dtype"], entry["shape"], file.read(end - first)


def digest(tensors: dict[str, list]) -> str:
    """Return one checksum of all tensors of a run."""
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def here() -> dict[str, str]:
    """Return what decides the last bits of floating-point results on this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = sorted(next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), []))
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy", "scipy", "optax")}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_flags": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16],
        **packages,
    }


def main(folder: Path, names: Iterable[str]) -> None:
    """Carry runs out and print the checksums of their tensors."""
    sources = Sources(folder)
    results = {}
    for name in names:
        results[name] = sources.run(name)
        print(f"{name} {time.process_time():.1f}", file=sys.stderr, flush=True)
    print(json.dumps({"platform": here(), "runs": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or RUNS)
