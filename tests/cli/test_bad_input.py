"""What bad input gets: one message naming the offender and the mend, exit code 1 (2 for wrong usage), and no output."""

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plain_checkpoint
import pytest
from program import call, checksums, jaxmoe
from safetensors.numpy import load_file, save_file

from jaxmoe import StoredModel
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.texts import Windows

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
INDEX = "model.safetensors.index.json"


def weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return a change of the checkpoint's tensors."""

    def apply(folder: Path) -> None:
        made = plain_checkpoint.tensors()
        change(made)
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changes) -> Callable[[Path], None]:
    """Return a change of the checkpoint's config; None removes a key."""

    def apply(folder: Path) -> None:
        record = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))

    return apply


def header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return a change of the safetensors header, the data left as they are."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        record = json.loads(content[8 : 8 + length])
        change(record)
        text = json.dumps(record).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return a change of the index of the checkpoint, which then is sharded."""

    def apply(folder: Path) -> None:
        made = load_file(folder / "model.safetensors")
        names = sorted(made)
        weight_map = {}
        for number in range(2):
            own = names[number::2]
            save_file(
                {name: made[name] for name in own}, folder / f"part{number}.safetensors", metadata={"format": "pt"}
            )
            weight_map.update(dict.fromkeys(own, f"part{number}.safetensors"))
        (folder / "model.safetensors").unlink()
        change(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return apply


def raw(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return the replacement (None: the removal) of one file."""

    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return apply


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part0.safetensors")
    (folder / INDEX).write_bytes(b"{")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shift(name: str, by: int) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record[name]["data_offsets"] = [offset + by for offset in record[name]["data_offsets"]]

    return change


def poison(value: float) -> Callable[[dict], None]:
    def change(made: dict) -> None:
        made[EXPERT] = made[EXPERT].copy()
        made[EXPERT][3, 4] = value

    return change


def both_layouts(made: dict) -> None:
    made["model.layers.1.mlp.experts.down_proj"] = np.zeros((4, 16, 8), made[EXPERT].dtype)


def strange_names(made: dict) -> None:
    made["model.layers.1.mlp.experts.2.middle_proj.weight"] = made.pop(EXPERT)


class Case(NamedTuple):
    """`change` spoils the checkpoint; `arguments` are appended to a good command; stderr must hold all `words`."""

    name: str
    words: tuple[str, ...]
    change: Callable[[Path], None] = lambda folder: None
    arguments: tuple[str, ...] = ()
    code: int = 1


CHECKPOINTS = [
    Case("config missing", ("config.json",), raw("config.json", None)),
    Case("config not JSON", ("config.json", "JSON"), raw("config.json", b"{")),
    Case("config not an object", ("config.json",), raw("config.json", b"[1]")),
    Case("config without model_type", ("config.json", "model_type"), config(model_type=None)),
    Case("config with another number of experts", ("routed experts 4", "says 6"), config(num_experts=6)),
    Case("no weights", ("safetensors",), raw("model.safetensors", None)),
    Case("pickled weights only", ("pytorch_model.bin", "safetensors"), pickled),
    Case("truncated file", ("model.safetensors",), truncate),
    Case("empty file", ("model.safetensors",), raw("model.safetensors", b"")),
    Case("absurd header length", ("model.safetensors", "header"), raw("model.safetensors", b"\xff" * 64)),
    Case("header no JSON", ("model.safetensors", "JSON"), raw("model.safetensors", struct.pack("<Q", 8) + b"nonsense")),
    Case("git-lfs pointer", ("git-lfs", "model.safetensors"), raw("model.safetensors", b"version https://git-lfs\n")),
    Case("offsets beyond the file", ("model.safetensors", EXPERT), header(shift(EXPERT, 10**7))),
    Case("overlapping offsets", ("model.safetensors", "overlap"), header(shift(EXPERT, -64))),
    Case("unknown dtype", (EXPERT, "Q7"), header(lambda record: record[EXPERT].update(dtype="Q7"))),
    Case("shape that does not fit", (EXPERT,), header(lambda record: record[EXPERT].update(shape=[8, 17]))),
    Case("index not JSON", (INDEX,), bad_index),
    Case(
        "index names a missing file", ("part9.safetensors",), index(lambda m: m.update({EXPERT: "part9.safetensors"}))
    ),
    Case(
        "index leaves the folder",
        ("../part0.safetensors",),
        index(lambda m: m.update({EXPERT: "../part0.safetensors"})),
    ),
    Case("index with absolute path", ("/etc/passwd",), index(lambda m: m.update({EXPERT: "/etc/passwd"}))),
    Case("an expert is missing", ("layer", "up", "2"), weights(lambda made: made.__delitem__(EXPERT))),
    Case("experts in two layouts", ("model.layers.1.mlp.experts.down_proj",), weights(both_layouts)),
    Case("an expert of another shape", (EXPERT,), weights(lambda m: m.update({EXPERT: m[EXPERT][:4]}))),
    Case("integer experts", (EXPERT,), weights(lambda m: m.update({EXPERT: np.ones((8, 16), np.int32)}))),
    Case("unknown names near experts", ("middle_proj",), weights(strange_names)),
    Case("NaN", ("NaN", EXPERT, "model.safetensors"), weights(poison(float("nan")))),
    Case("infinity", ("infinite", EXPERT), weights(poison(float("inf")))),
    Case("no experts", ("expert",), weights(lambda m: [m.pop(n) for n in [*m] if ".experts." in n] and None)),
]

ARGUMENTS = [
    Case("unknown method", ("'swd'", "svd"), arguments=("--method", "swd")),
    Case("ratio zero", ("ratio 0", "between 0 and 1"), arguments=("--ratio", "0")),
    Case("ratio above one", ("ratio 1.5",), arguments=("--ratio", "1.5")),
    Case("ratio negative", ("ratio -0.2",), arguments=("--ratio", "-0.2")),
    Case("ratio not a number", ("nan",), arguments=("--ratio", "nan")),
    Case("ratio a word", ("--ratio", "number"), arguments=("--ratio", "half"), code=2),
    Case("ratio out of reach", ("out of reach", "of touched", "of experts", "of model"), arguments=("--ratio", "0.99")),
    Case("ratio out of reach of the model", ("out of reach",), arguments=("--ratio", "0.95", "--of", "model")),
    Case("scope unknown", ("everything",), arguments=("--of", "everything"), code=2),
    Case("setting unknown", ("best",), arguments=("--setting", "best"), code=2),
    Case("export unknown", ("thin",), arguments=("--export", "thin"), code=2),
    Case("layers without colon", ("--layers 3",), arguments=("--layers", "3")),
    Case("layers empty", ("--layers 2:2",), arguments=("--layers", "2:2")),
    Case("layers beyond the model", ("7:9", "0 to 1"), arguments=("--layers", "7:9")),
    Case("method setting unknown", ("speed=9",), arguments=("--set", "speed=9")),
    Case("method setting without value", ("steps",), arguments=("--method", "mobe", "--set", "steps")),
    Case(
        "method setting of another type", ("steps=many", "int"), arguments=("--method", "mobe", "--set", "steps=many")
    ),
    Case("option unknown", ("--fast",), arguments=("--fast",), code=2),
]

RFID = [
    Case(
        "published without statistics",
        ("no statistics", "--text", "--setting improved"),
        arguments=("--setting", "paper"),
    ),
    Case("xi above one", ("xi=1.5", "0 to 1"), arguments=("--set", "xi=1.5")),
    Case("xi a word", ("xi=much", "float"), arguments=("--set", "xi=much")),
    Case("no group", ("group=0", "at least 1"), arguments=("--set", "group=0")),
    Case("mixing unknown", ("mixing 'some'", "padded, none"), arguments=("--set", "mixing=some")),
    Case("residual unknown", ("residual 'all'", "hash, topk, none"), arguments=("--set", "residual=all")),
    Case("residual too large", ("residual_fraction=0.9", "0 to 0.5"), arguments=("--set", "residual_fraction=0.9")),
    Case("function without zero", ("'sigmoid'", "silu"), arguments=("--set", "activation=sigmoid")),
    Case("steps negative", ("steps=-1",), arguments=("--set", "steps=-1")),
    Case("exact ranks a number", ("paper_exact=2", "true or false"), arguments=("--set", "paper_exact=2")),
    Case("setting of another method", ("bases=4", "residual_fraction"), arguments=("--set", "bases=4")),
    Case(
        "ratio that the residual leaves no room for",
        ("out of reach for rfid", "of touched", "of experts", "of model"),
        arguments=("--set", "residual=hash", "--set", "residual_fraction=0.4", "--ratio", "0.7"),
    ),
    Case("several faults at once", ("xi=-1", "patience=0"), arguments=("--set", "xi=-1", "--set", "patience=0")),
    Case("NaN", ("NaN", EXPERT), weights(poison(float("nan"))), arguments=("--set", "steps=2")),
]

D2MOE = [
    Case(
        "no gradients for the published merge",
        ("no statistics", "--gradients sequence", "--set merge=freq", "--moments expert"),
        arguments=("--setting", "paper"),
    ),
    Case("no counts", ("no statistics", "--text", "--set merge=mean"), arguments=("--set", "merge=freq")),
    Case(
        "no moments",
        ("no statistics", "--moments expert", "--set delta=plain"),
        arguments=("--setting", "paper", "--set", "merge=mean"),
    ),
    Case("merge unknown", ("merge 'median'", "fisher_freq", "regmean"), arguments=("--set", "merge=median")),
    Case("delta unknown", ("delta 'half'", "whitened, asvd, plain"), arguments=("--set", "delta=half")),
    Case("mode unknown", ("mode 'row'", "column, neuron"), arguments=("--set", "mode=row")),
    Case("base unknown", ("base 'never'", "always, auto"), arguments=("--set", "base=never")),
    Case("sparsity one", ("sparsity=1.0", "fraction"), arguments=("--set", "sparsity=1")),
    Case("sparsity not a number", ("sparsity=much", "float"), arguments=("--set", "sparsity=much")),
    Case(
        "several at once",
        ("merge 'x'", "dynamic=2.0", "trim=-1.0"),
        arguments=("--set", "merge=x", "--set", "dynamic=2", "--set", "trim=-1"),
    ),
    Case("share_v no truth value", ("share_v=maybe", "true or false"), arguments=("--set", "share_v=maybe")),
    Case("setting of another method", ("bases=2", "d2moe", "sparsity"), arguments=("--set", "bases=2")),
    Case(
        "ratio below what a base leaves",
        ("ratio 0.01", "out of reach for d2moe", "of experts"),
        arguments=("-r", "0.01"),
    ),
    Case("ratio above", ("ratio 0.9", "out of reach for d2moe", "of experts"), arguments=("--ratio", "0.9")),
    Case("gradients without text", ("--gradients", "--text"), arguments=("--gradients", "sequence")),
]


def run(tmp_path, case: Case, method: str = "svd"):
    source = plain_checkpoint.write(tmp_path / "source")
    case.change(source)
    before = checksums(source, ())
    output = tmp_path / "output"
    good = ("compress", source, output, "--method", method, "--ratio", "0.4")
    done = call(*good, *case.arguments)
    assert done.returncode == case.code, done.stderr
    assert all(word in done.stderr for word in case.words), done.stderr
    assert "Traceback" not in done.stderr
    if case.code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert done.stderr.count("error: ") == 1
    assert not output.exists()
    assert checksums(source, ()) == before, "the source is never written to"


@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.name)
def test_checkpoint(tmp_path, case):
    run(tmp_path, case)


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.name)
def test_arguments(tmp_path, case):
    run(tmp_path, case)


@pytest.mark.parametrize("case", RFID, ids=lambda case: case.name)
def test_rfid(tmp_path, case):
    run(tmp_path, case, "rfid")


@pytest.mark.parametrize("case", D2MOE, ids=lambda case: case.name)
def test_d2moe(tmp_path, case):
    run(tmp_path, case, "d2moe")


def test_d2moe_with_statistics_that_lack_what_it_needs(tmp_path):
    source = plain_checkpoint.write(tmp_path / "source")
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) % 32
    text = Windows(name="text", fingerprint="x", ids=ids, counted=np.ones(ids.shape, bool), left_out=0)
    calibrate_windows(StoredModel(source), [text], tmp_path / "statistics", moments="pooled")
    before = checksums(source, ())
    options = ("--setting", "paper", "--statistics", tmp_path / "statistics")
    done = call("compress", source, tmp_path / "output", "--method", "d2moe", "--ratio", "0.4", *options)
    assert done.returncode == 1, done.stderr
    assert "lack fisher_up, fisher_down, input_moments, intermediate_moments" in done.stderr
    assert all(mend in done.stderr for mend in ("--gradients sequence", "--moments expert", "--set delta=plain"))
    assert not (tmp_path / "output").exists()
    assert checksums(source, ()) == before


def test_no_such_checkpoint(tmp_path):
    done = call("inspect", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_errors_are_objects(tmp_path):
    done = call("inspect", tmp_path / "nowhere", "--json")
    assert done.returncode == 1
    assert "nowhere" in json.loads(done.stdout)["error"]


def test_output_with_other_content_is_left_alone(tmp_path):
    source = plain_checkpoint.write(tmp_path / "source")
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    done = call("compress", source, output, "--method", "svd", "--ratio", "0.4")
    assert done.returncode == 1
    assert str(output) in done.stderr
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_foreign_work_folder_is_left_alone(tmp_path):
    source = plain_checkpoint.write(tmp_path / "source")
    partial = tmp_path / "output.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    done = call("compress", source, tmp_path / "output", "--method", "svd", "--ratio", "0.4")
    assert done.returncode == 1
    assert "output.partial" in done.stderr
    assert [path.name for path in partial.iterdir()] == ["thesis.txt"]


def test_no_space_left(tmp_path):
    source = plain_checkpoint.write(tmp_path / "source", vocab_size=4096)

    def limit():
        # No file may grow beyond 64 kB: the layers fit, the embedding does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    arguments = ("compress", source, tmp_path / "output", "--method", "svd", "--ratio", "0.4")
    done = jaxmoe(*arguments, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stderr
    assert not (tmp_path / "output").exists()
    assert not list((tmp_path / "output.partial").glob(".*.part"))
    again = call(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("kept from an earlier run") == 2


def test_compressed_checkpoints_where_originals_are_needed(tmp_path):
    source = plain_checkpoint.write(tmp_path / "source")
    small = tmp_path / "small"
    assert call("compress", source, small, "--method", "svd", "--ratio", "0.4").returncode == 0
    twice = call("compress", small, tmp_path / "twice", "--method", "svd", "--ratio", "0.4")
    assert twice.returncode == 1
    assert "--to dense" in twice.stderr
    stock = call("convert", source, tmp_path / "dense", "--to", "dense")
    assert stock.returncode == 1
    assert "factored" in stock.stderr
    config(jaxmoe={**json.loads((small / "config.json").read_text())["jaxmoe"], "format_version": 99})(small)
    newer = call("convert", small, tmp_path / "dense", "--to", "dense")
    assert newer.returncode == 1
    assert "99" in newer.stderr
    assert not (tmp_path / "dense").exists()
