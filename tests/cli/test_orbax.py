"""`convert --to orbax` and back: every tensor bit for bit, every other file as it was, and nothing half-written."""

import hashlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from program import call, checksums
from safetensors import safe_open

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.orbax import to_safetensors

# The dtypes that hub checkpoints hold, and shapes that Orbax may stumble over.
ODD = {
    "odd.float8": np.arange(12).astype(ml_dtypes.float8_e4m3fn).reshape(3, 4),
    "odd.float8.scale": np.full((1, 1), 0.5, np.float32),
    "odd.packed": np.arange(16, dtype=np.uint8).reshape(4, 4),
    "odd.long": np.array([2**62, -1]),
    "odd.double": np.array([np.pi, np.nan, -0.0]),
    "odd.half": np.array([np.inf, 6e-8], np.float16),
    "odd.flag": np.array([True, False]),
    "odd.scalar": np.array(3, np.int32),
    "odd.empty": np.zeros((0, 4), np.float32),
    "odd/slash %20": np.ones(3, np.int8),
}


def raw_tensors(folder):
    """Return (dtype, shape, sha256) of every tensor, read from the files' bytes without jaxmoe."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, own in header.items():
            begin, end = own["data_offsets"]
            digest = hashlib.sha256(content[8 + size + begin : 8 + size + end]).hexdigest()
            found[name] = (path.name, own["dtype"], tuple(own["shape"]), digest)
    return found


def odd_checkpoint(folder):
    """Write a sharded checkpoint with tensors of all kinds."""
    made = {**plain_checkpoint.tensors(), **ODD}
    plain_checkpoint.write(folder, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    from jaxmoe.checkpoint import Planned, write_tensors

    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        names = [name for name in made if index["weight_map"].get(name, path.name) == path.name]
        own = {name: made[name] for name in names if name in index["weight_map"] or number == 0}
        planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in own.items()]
        write_tensors(path, planned, {"format": "pt", "made": "by hand"})
        index["weight_map"].update(dict.fromkeys(own, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def round_trip(source, tmp_path):
    """Convert to Orbax and back, and check that both ways kept everything."""
    there = call("convert", source, tmp_path / "orbax", "--to", "orbax", "--json")
    assert there.returncode == 0, there.stderr
    back = call("convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors", "--json")
    assert back.returncode == 0, back.stderr
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    weights = ("model", ".safetensors.index.json")
    kept = {k: v for k, v in checksums(source, leave_out=()).items() if not k.startswith(weights[0])}
    assert kept.items() <= checksums(tmp_path / "back", leave_out=()).items()
    assert kept.items() <= checksums(tmp_path / "orbax", leave_out=()).items()
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()}
    assert json.loads(there.stdout)["stored"] == json.loads(back.stdout)["stored"]
    return tmp_path / "back"


def test_demo(tmp_path):
    back = round_trip(demo_checkpoint(), tmp_path)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    models = [transformers.AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in (demo_checkpoint(), back)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_factored(tmp_path):
    source = tmp_path / "factored"
    done = call("compress", demo_checkpoint(), source, "--method", "svd", "--ratio", "0.4")
    assert done.returncode == 0, done.stderr
    back = round_trip(source, tmp_path)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jaxmoe.torch")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        a, b = (transformers.AutoModelForCausalLM.from_pretrained(x)(ids).logits for x in (source, back))
    assert torch.equal(a, b)


def test_every_dtype_and_shard(tmp_path):
    source = odd_checkpoint(tmp_path / "source")
    back = round_trip(source, tmp_path)
    before, after = (json.loads((x / "model.safetensors.index.json").read_text()) for x in (source, back))
    assert before == after
    with safe_open(next(iter(sorted(back.glob("*.safetensors")))), framework="np") as file:
        assert file.metadata() == {"format": "pt", "made": "by hand"}


def test_orbax_alone_reads_it(tmp_path):
    """Programs without jaxmoe load the arrays under their names on disk."""
    from orbax.checkpoint import v1 as ocp

    source = plain_checkpoint.write(tmp_path / "source")
    assert call("convert", source, tmp_path / "orbax", "--to", "orbax").returncode == 0
    (part,) = (tmp_path / "orbax" / "weights").iterdir()
    loaded = ocp.load(part)
    assert loaded.keys() == plain_checkpoint.tensors().keys()
    for name, expected in plain_checkpoint.tensors().items():
        assert loaded[name].dtype == expected.dtype
        assert np.asarray(loaded[name]).tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    plain_checkpoint.write(folder / "source")
    assert call("convert", folder / "source", folder / "orbax", "--to", "orbax").returncode == 0
    return folder


def damage_record(folder, change):
    record = json.loads((folder / "orbax.json").read_text())
    change(record)
    (folder / "orbax.json").write_text(json.dumps(record))


def outside(record):
    record["files"]["../model.safetensors"] = record["files"].pop("model.safetensors")


def other_checksum(record):
    record["files"]["model.safetensors"]["tensors"]["lm_head.weight"]["sha256"] = "0" * 64


def unknown_tensor(record):
    tensors = record["files"]["model.safetensors"]["tensors"]
    tensors["lm_head.more"] = tensors["lm_head.weight"]


def metadata(record):
    record["files"]["model.safetensors"]["metadata"] = {"format": 1}


def edited(key, value):
    """Return a change of one key of one tensor's record."""
    return lambda record: record["files"]["model.safetensors"]["tensors"]["lm_head.weight"].update({key: value})


def twice(record):
    record["files"]["other.safetensors"] = record["files"]["model.safetensors"]


def pipe(folder):
    path = next(path for path in sorted((folder / "weights").rglob("*")) if path.is_file())
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "no record": (lambda folder: (folder / "orbax.json").unlink(), "no Orbax checkpoint that jaxmoe wrote"),
    "no weights": (lambda folder: shutil.rmtree(folder / "weights"), "no Orbax checkpoint that jaxmoe wrote"),
    "newer": (lambda folder: damage_record(folder, lambda r: r.update(format_version=99)), "pip install --upgrade"),
    "damaged": (lambda folder: damage_record(folder, lambda r: r.update(files={"x.safetensors": 1})), "does not hold"),
    "no json": (lambda folder: (folder / "orbax.json").write_bytes(b"\xff{"), "orbax.json is not JSON"),
    "no version": (lambda folder: damage_record(folder, lambda r: r.pop("format_version")), "format_version"),
    "no files": (lambda folder: damage_record(folder, lambda r: r.update(files={})), "length >= 1"),
    "index": (lambda folder: damage_record(folder, lambda r: r.update(index=3)), "$.index"),
    "metadata": (lambda folder: damage_record(folder, metadata), "metadata"),
    **{
        f"{key} {value!r:.20}": (lambda folder, k=key, v=value: damage_record(folder, edited(k, v)), message)
        for key, value, message in (
            ("shape", "[32, 16]", "shape"),
            ("shape", ["32", 16], "shape"),
            ("shape", [-32, -16], "shape"),
            ("shape", [1] * 65, "length <= 32"),
            ("shape", [16, 32], "holds lm_head.weight as bfloat16 [32, 16], not"),
            ("shape", [2**40, 2**20], "and its tensors take"),
            ("shape", [2**63], "shape"),
            ("shape", [0], "does not say where lm_head.weight lies"),
            ("dtype", "F99", "dtype"),
            ("dtype", "F32", "not as float32"),
            ("part", None, "does not say where lm_head.weight lies"),
            ("part", "0", "part"),
            ("part", -1, "part"),
            ("part", 7, "00007"),
            ("sha256", 3, "sha256"),
            ("sha256", "", "does not say where lm_head.weight lies"),
        )
    },
    "twice": (lambda folder: damage_record(folder, twice), "in several files"),
    "pipe": (lambda folder: pipe(folder), "not a regular file but a pipe"),
    "outside": (lambda folder: damage_record(folder, outside), "../model.safetensors"),
    "checksum": (lambda folder: damage_record(folder, other_checksum), "lm_head.weight is not what was written"),
    "unknown": (lambda folder: damage_record(folder, unknown_tensor), "00000 holds no lm_head.more"),
    "part": (lambda folder: shutil.rmtree(folder / "weights" / "00000"), "00000 is no folder"),
    "data": (lambda folder: shutil.rmtree(folder / "weights" / "00000" / "state" / "d"), "not what was written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(kind, converted, tmp_path):
    damage, message = DAMAGE[kind]
    shutil.copytree(converted / "orbax", tmp_path / "orbax")
    damage(tmp_path / "orbax")
    done = call("convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "defect of jaxmoe" not in done.stderr
    assert not (tmp_path / "back").exists()


def whatever_byte_changes(source, tmp_path):
    """Cut each file of the parts, and change a byte of it; yield the errors, None where all was still right."""
    rng = np.random.default_rng(0)
    right = raw_tensors(source / "source")
    originals = sorted(path for path in (source / "orbax" / "weights").rglob("*") if path.is_file())
    for number, original in enumerate([*originals, *originals]):
        content = bytearray(original.read_bytes())
        if not content:
            continue
        folder = tmp_path / f"{number}" / "orbax"
        shutil.copytree(source / "orbax", folder)
        place = int(rng.integers(len(content)))
        content[place] ^= 0x55
        path = folder / original.relative_to(source / "orbax")
        path.write_bytes(content[:place] if number < len(originals) else content)
        error = failure(folder, tmp_path / f"{number}" / "back")
        if error is None:
            assert raw_tensors(tmp_path / f"{number}" / "back") == right
        yield path, error


def failure(folder, output):
    try:
        to_safetensors(folder, output)
    except JaxmoeError as error:
        return str(error)
    return None


def test_every_byte_is_watched(converted, tmp_path):
    for path, error in whatever_byte_changes(converted, tmp_path):
        assert error is not None
        assert str(path) in error


def test_folders_without_checksums_of_files(converted, tmp_path):
    """As earlier versions wrote them: bytes that matter are noticed all the same."""
    shutil.copytree(converted, tmp_path / "older")
    damage_record(tmp_path / "older" / "orbax", lambda record: record.pop("parts"))
    errors = [error for _, error in whatever_byte_changes(tmp_path / "older", tmp_path) if error]
    assert len(errors) >= 4
    assert all(str(tmp_path) in error for error in errors)


def test_wrong_ways(converted, tmp_path):
    source = converted / "source"
    plain = call("convert", source, tmp_path / "out", "--to", "safetensors")
    assert plain.returncode == 1
    assert "no Orbax checkpoint that jaxmoe wrote" in plain.stderr
    again = call("convert", converted / "orbax", tmp_path / "out", "--to", "orbax")
    assert again.returncode == 1
    assert "--to safetensors" in again.stderr
    other = plain_checkpoint.write(tmp_path / "other", seed=1)
    taken = call("convert", other, converted / "orbax", "--to", "orbax")
    assert taken.returncode == 1
    assert "exists" in taken.stderr
    assert not (tmp_path / "out").exists()


def test_killed_run_is_repeated(converted, tmp_path):
    """What a killed run left behind does not disturb the next one."""
    left = tmp_path / "orbax.partial"
    (left / ".jaxmoe").mkdir(parents=True)
    run = {"convert": "orbax", "source": str(converted / "source")}
    (left / ".jaxmoe" / "run.json").write_text(json.dumps(run))
    shutil.copytree(converted / "orbax" / "weights", left / "weights")
    done = call("convert", converted / "source", tmp_path / "orbax", "--to", "orbax")
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    assert sorted(x.name for x in (tmp_path / "orbax").iterdir()) == ["config.json", "orbax.json", "weights"]
