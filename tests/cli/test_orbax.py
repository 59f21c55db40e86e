"""`convert --to orbax` and back: every tensor bit for bit, every other file as it was, and nothing half-written."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from program import checksums, jaxmoe
from safetensors import safe_open

from jaxmoe.data import demo_checkpoint

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
    there = jaxmoe("convert", source, tmp_path / "orbax", "--to", "orbax", "--json")
    assert there.returncode == 0, there.stderr
    back = jaxmoe("convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors", "--json")
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
    done = jaxmoe("compress", demo_checkpoint(), source, "--method", "svd", "--ratio", "0.4")
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
    assert jaxmoe("convert", source, tmp_path / "orbax", "--to", "orbax").returncode == 0
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
    assert jaxmoe("convert", folder / "source", folder / "orbax", "--to", "orbax").returncode == 0
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


DAMAGE = {
    "no record": (lambda folder: (folder / "orbax.json").unlink(), "no Orbax checkpoint that jaxmoe wrote"),
    "no weights": (lambda folder: shutil.rmtree(folder / "weights"), "no Orbax checkpoint that jaxmoe wrote"),
    "newer": (lambda folder: damage_record(folder, lambda r: r.update(format_version=99)), "pip install --upgrade"),
    "damaged": (lambda folder: damage_record(folder, lambda r: r.update(files={"x.safetensors": 1})), "is damaged"),
    "outside": (lambda folder: damage_record(folder, outside), "../model.safetensors"),
    "checksum": (lambda folder: damage_record(folder, other_checksum), "lm_head.weight is not what was written"),
    "unknown": (lambda folder: damage_record(folder, unknown_tensor), "00000 cannot be read"),
    "part": (lambda folder: shutil.rmtree(folder / "weights" / "00000"), "00000 cannot be read"),
    "data": (lambda folder: shutil.rmtree(folder / "weights" / "00000" / "state" / "d"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(kind, converted, tmp_path):
    damage, message = DAMAGE[kind]
    shutil.copytree(converted / "orbax", tmp_path / "orbax")
    damage(tmp_path / "orbax")
    done = jaxmoe("convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "back").exists()


def test_wrong_ways(converted, tmp_path):
    source = converted / "source"
    plain = jaxmoe("convert", source, tmp_path / "out", "--to", "safetensors")
    assert plain.returncode == 1
    assert "no Orbax checkpoint that jaxmoe wrote" in plain.stderr
    again = jaxmoe("convert", converted / "orbax", tmp_path / "out", "--to", "orbax")
    assert again.returncode == 1
    assert "--to safetensors" in again.stderr
    taken = jaxmoe("convert", source, converted / "orbax", "--to", "orbax")
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
    done = jaxmoe("convert", converted / "source", tmp_path / "orbax", "--to", "orbax")
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    assert sorted(x.name for x in (tmp_path / "orbax").iterdir()) == ["config.json", "orbax.json", "weights"]
