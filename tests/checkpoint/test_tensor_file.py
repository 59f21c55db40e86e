"""The safetensors reader and writer against the format's own library."""

import hashlib
import json
import os
import stat
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoint.tensor_file import CODES, DTYPES, Planned, read_header, write_tensors
from jaxmoe.errors import JaxmoeError


def planned(arrays):
    return [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "half": rng.normal(size=(3, 5)).astype("float16"),
        "brain": rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        "byte": np.arange(7, dtype="uint8"),
        "single": rng.normal(size=(2, 3, 4)).astype("float32"),
        "scalar": np.array(3.5, "float32"),
        "empty": np.zeros((0, 4), "float32"),
        "flags": np.array([True, False, True]),
        "double": rng.normal(size=3),
        "long": np.arange(5),
    }


def test_writes_what_the_library_reads(tmp_path):
    arrays = some_arrays()
    write_tensors(tmp_path / "t.safetensors", planned(arrays))
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, values in arrays.items():
        assert loaded[name].dtype == values.dtype
        np.testing.assert_array_equal(loaded[name], values)


def test_reads_what_the_library_writes(tmp_path):
    arrays = some_arrays()
    save_file(arrays, tmp_path / "t.safetensors", metadata={"any": "thing"})
    entries = read_header(tmp_path / "t.safetensors")
    assert entries.keys() == arrays.keys()
    for name, values in arrays.items():
        entry = entries[name]
        assert entry.dtype == CODES[values.dtype]
        assert (entry.shape, entry.numbers, entry.bytes) == (values.shape, values.size, values.nbytes)
        np.testing.assert_array_equal(entry.read(), values)
        assert not entry.read().flags.writeable or not values.size


@pytest.mark.parametrize("code", [code for code in DTYPES if code.startswith("F8")])
def test_float8_round_trip(code, tmp_path):
    values = np.arange(256, dtype=np.uint8).view(DTYPES[code]).reshape(16, 16)
    write_tensors(tmp_path / "t.safetensors", planned({"a": values}))
    entry = read_header(tmp_path / "t.safetensors")["a"]
    assert entry.dtype == code
    np.testing.assert_array_equal(entry.read().view(np.uint8), values.view(np.uint8))


def test_packed_elements_stay_bytes(tmp_path):
    packed = np.arange(6, dtype=np.uint8)
    write_tensors(tmp_path / "t.safetensors", [Planned("a", "F4", (3, 4), lambda: packed)])
    entry = read_header(tmp_path / "t.safetensors")["a"]
    assert (entry.shape, entry.numbers, entry.bytes) == ((3, 4), 12, 6)
    np.testing.assert_array_equal(entry.read(), packed)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["float32", "float16", "uint8", "int64"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_any_tensors_round_trip(shapes, random):
    import tempfile
    from pathlib import Path

    rng = np.random.default_rng(random.randrange(2**32))
    arrays = {f"t{i}": (100 * rng.random(shape)).astype(dtype) for i, (dtype, shape) in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        write_tensors(path, planned(arrays))
        loaded, entries = load_file(path), read_header(path)
        for name, values in arrays.items():
            np.testing.assert_array_equal(loaded[name], values)
            np.testing.assert_array_equal(entries[name].read(), values)


def test_arrays_in_any_memory_order_are_written_right(tmp_path):
    values = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"t": values.T, "strided": values[:, ::2], "swapped": values.swapaxes(0, 1), "reversed": values[::-1]}
    write_tensors(tmp_path / "t.safetensors", planned(arrays))
    loaded = load_file(tmp_path / "t.safetensors")
    for name, expected in arrays.items():
        np.testing.assert_array_equal(loaded[name], expected)


def test_same_tensors_same_bytes_and_digest(tmp_path):
    first = write_tensors(tmp_path / "a.safetensors", planned(some_arrays()))
    second = write_tensors(tmp_path / "b.safetensors", planned(some_arrays()))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert first == second == hashlib.sha256(content).hexdigest()


def test_header_is_padded_and_tensors_aligned(tmp_path):
    write_tensors(tmp_path / "t.safetensors", planned(some_arrays()))
    content = (tmp_path / "t.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    assert {entry.shard.data for entry in read_header(tmp_path / "t.safetensors").values()} == {8 + length}
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    for entry in read_header(tmp_path / "t.safetensors").values():
        assert entry.begin % DTYPES[entry.dtype].itemsize == 0


def test_one_tensor_at_a_time_in_the_given_order(tmp_path):
    alive = []

    def make(name):
        alive.append(name)
        return np.zeros(4, "float32")

    names = ["c", "a", "b"]
    write_tensors(tmp_path / "t", [Planned(n, "float32", (4,), lambda n=n: make(n)) for n in names])
    assert alive == names
    assert list(read_header(tmp_path / "t")) == names


def test_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "t", planned({"a": np.zeros(3)}))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o640


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), "float32"), np.zeros((3, 2), "float64")])
def test_a_tensor_other_than_planned_leaves_nothing(wrong, tmp_path):
    (tmp_path / "kept").write_bytes(b"before")
    tensors = [Planned("a", "float32", (3, 2), lambda: wrong)]
    with pytest.raises(ValueError, match="a: produced"):
        write_tensors(tmp_path / "kept", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"before"


def test_failing_producer_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_tensors(tmp_path / "t", [*planned({"a": np.zeros(9)}), Planned("b", "float64", (1,), fail)])
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JaxmoeError, match=r"no space left.*t\.safetensors.*free some"):
        write_tensors(tmp_path / "t.safetensors", planned({"a": np.zeros(9)}))
    assert not list(tmp_path.iterdir())


def test_refuses_two_tensors_of_one_name(tmp_path):
    with pytest.raises(JaxmoeError, match="written twice: a"):
        write_tensors(tmp_path / "t", [*planned({"a": np.zeros(3)}), *planned({"a": np.ones(3)})])


def test_refuses_dtypes_that_the_format_lacks(tmp_path):
    with pytest.raises(JaxmoeError, match="a: dtype complex128 cannot be stored"):
        write_tensors(tmp_path / "t", planned({"a": np.zeros(3, complex)}))


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ZEROS = bytes(8)
MALFORMED = {
    "empty file": (b"", "truncated: 0 bytes"),
    "shorter than the length field": (b"abc", "truncated: 3 bytes"),
    "header longer than the file": (file({}, length=50), "names a header of 50 bytes"),
    "absurd length": (struct.pack("<Q", 2**63) + b"{}", "truncated or not a safetensors file"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "no JSON": (file(b"{not json"), "its header is no JSON object"),
    "not UTF-8": (file(b'{"\xff\xfe": 1}'), "its header is no JSON object"),
    "a number": (file(7), "its header is no JSON object (a"),
    "a list": (file([1, 2]), "its header is no JSON object (a"),
    "nested too deep": (file(b"[" * 100_000), "its header is no JSON object"),
    "one name twice": (
        file(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2), ZEROS),
        "names occur twice: a",
    ),
    "no record": (file({"a": 3}), "a: its record lacks"),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, ZEROS), "a: its record lacks"),
    "unknown dtype": (file({"a": tensor("F31")}, ZEROS), "a: unknown dtype 'F31'"),
    "dtype no string": (file({"a": tensor(["F32"])}, ZEROS), "a: unknown dtype"),
    "negative size": (file({"a": tensor(shape=(-2,))}, ZEROS), "a: shape"),
    "fractional size": (file({"a": tensor(shape=(2.0,))}, ZEROS), "a: shape"),
    "one offset": (file({"a": tensor(offsets=(0,))}, ZEROS), "a: data_offsets"),
    "offsets reversed": (file({"a": tensor(offsets=(8, 0))}, ZEROS), "lie outside the 8 bytes"),
    "offset behind the end": (file({"a": tensor(offsets=(8, 16))}, ZEROS), "lie outside the 8 bytes"),
    "negative offset": (file({"a": tensor(offsets=(-8, 0))}, ZEROS), "lie outside the 8 bytes"),
    "size does not fit": (file({"a": tensor(shape=(3,))}, ZEROS), "8 bytes do not fit dtype F32 and shape [3]"),
    "overflowing size": (file({"a": tensor(shape=(2**62, 2**62))}, ZEROS), "8 bytes do not fit"),
    "overlap": (file({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "b: its bytes overlap at offset 4"),
    "hole": (file({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "b: its bytes leave a hole at offset 8"),
    "bytes left over": (file({"a": tensor()}, bytes(9)), "1 bytes behind the last tensor"),
    "truncated data": (file({"a": tensor(shape=(4,), offsets=(0, 16))}, bytes(15)), "lie outside the 15 bytes"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_name_file_and_reason(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(JaxmoeError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(JaxmoeError, match=r"gone\.safetensors does not exist"):
        read_header(tmp_path / "gone.safetensors")


def test_all_wrong_tensors_are_listed(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file({"a": tensor("F31"), "b": tensor(), "c": tensor(shape=(9,))}, ZEROS))
    with pytest.raises(JaxmoeError, match=r"a: unknown dtype.*; c: 8 bytes do not fit"):
        read_header(path)
