"""Arrays in few bits: bit streams word by word, bytes as the table says, and terms that hold them, through files."""

import json
import re
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense, Grouped, LowRank, Merged, Shared, SharedBasis, Sparse
from jaxmoe.factors.leaves import values
from jaxmoe.factors.packing import pack, unpack, words
from jaxmoe.factors.quantised import MixedArray, QuantisedArray, held_scales, held_zeros
from jaxmoe.factors.store import Rounded, Store

SCALES = ("bfloat16", "float16", "float32", "quantised", "exponent")


def drawn(shape, store, seed=0):
    """Return codes, scales, zeros and tables of matrices as a rounding gives them."""
    rng = np.random.default_rng(seed)
    experts, out, in_ = shape
    groups = store.groups(in_)
    codes = rng.integers(0, 2**store.bits, shape).astype(np.uint8)
    scale = zero = table = None
    if groups:
        scale = held_scales(rng.exponential(size=(experts, out, groups)).astype(np.float32) * 0.1, store)
    if store.zero == "integer":
        zero = rng.integers(0, 2**store.bits, (experts, out, groups)).astype(np.int32)
    elif store.zero == "real":
        zero = held_zeros(rng.normal(size=(experts, out, groups)).astype(np.float32), store)
    if store.table in ("row", "matrix"):
        entries = experts * out if store.table == "row" else experts
        table = np.sort(rng.normal(size=(entries, 2**store.bits))).astype(ml_dtypes.bfloat16).astype(np.float32)
    return Rounded(codes, scale, zero, table)


STORES = [
    Store(bits=3, group=16),
    Store(bits=2, group=0, zero="none"),
    Store(bits=5, group=32, zero="real"),
    Store(bits=4, group=16, scale="quantised"),
    Store(bits=4, group=32, zero="none", scale="exponent", table="mxfp4"),
    Store(bits=4, group=16, zero="none", table="normal_float", scale="float16"),
    Store(bits=3, group=0, zero="none", table="row"),
    Store(bits=2, group=16, zero="none", table="matrix"),
    Store(bits=1, group=32, zero="real", scale="float32"),
]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, range(8), [0x76543210]),
        (4, range(15, 7, -1), [0x89ABCDEF]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (8, [1, 2, 3, 255], [0xFF030201]),
        (3, [*range(8)] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (5, range(8), [0x8A418820, 0x39]),
        (6, range(50, 58), [0xF6D74CF2, 0xE78D]),
    ],
)
def test_known_words(bits, codes, expected):
    assert np.asarray(pack(np.array([[*codes]]), bits)).view(np.uint32).tolist() == [expected]


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_are_those_of_single_bits(bits):
    """Bit i b + j of a row is bit j of code i, whatever the words."""
    for count in (1, 31, 45):
        codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count))
        packed = np.asarray(pack(codes, bits))
        assert packed.shape == (3, words(count, bits)) == (3, -(-count * bits // 32))
        stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
        expected = ((codes[..., None] >> np.arange(bits)) & 1).reshape(3, -1)
        np.testing.assert_array_equal(stream[:, : count * bits], expected)
        assert not stream[:, count * bits :].any()
        np.testing.assert_array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_what_is_packed_comes_back(store):
    shape = (3, 5, 64)
    rounded = drawn(shape, store)
    array = QuantisedArray.pack(rounded, store)
    again = array.unpack()
    for own, found in zip(rounded, again, strict=True):
        assert (own is None) == (found is None)
        if own is not None:
            np.testing.assert_array_equal(own, found)
    dense = np.asarray(rounded.values(store))
    np.testing.assert_array_equal(array.values(), dense)
    np.testing.assert_array_equal(jax.jit(lambda own: own.values(slice(1, 3)))(array), dense[1:])
    np.testing.assert_array_equal(values(array, slice(1)), dense[:1])
    # The abstract one has the same tensors, and counts their bytes.
    planned = QuantisedArray.abstract(shape, store).tensors("x")
    tensors = array.tensors("x")
    assert {name: (own.shape, own.dtype) for name, own in tensors.items()} == {
        name: (own.shape, np.dtype(own.dtype)) for name, own in planned.items()
    }
    assert array.count().bytes == sum(np.asarray(own).nbytes for own in tensors.values())
    assert all(own.ndim == 2 for own in tensors.values())


@pytest.mark.parametrize(
    ("store", "bits"),
    [
        (Store(bits=8, zero="none"), 8.25),
        (Store(bits=8), 8.375),
        (Store(bits=8, zero="real"), 8.5),
        (Store(bits=4, group=32), 4.625),
        (Store(bits=4), 4.3125),
        (Store(bits=3, zero="none"), 3.25),
        (Store(bits=2, group=32, zero="real"), 3.0),
        (Store(bits=2, scale="quantised"), 2.15625 + 16 / (256 * 64)),
        (Store(bits=4, group=32, zero="none", table="mxfp4", scale="exponent"), 4.25),
        (Store(bits=3, group=0, zero="none", table="row"), 3.0625),
        (Store(bits=3, zero="none", table="matrix"), 3.25 + 16 * 8 / (768 * 2048)),
    ],
)
def test_bits_of_a_number(store, bits):
    shape = (2, 768, 2048)
    assert 8 * QuantisedArray.abstract(shape, store).count().bytes / np.prod(shape) == bits


@pytest.mark.parametrize("kind", SCALES)
def test_scales_are_held_once_and_for_all(kind):
    store = Store(bits=4, scale=kind)
    scale = np.random.default_rng(1).exponential(size=(3, 40, 9)).astype(np.float32) + 0.01
    held = np.asarray(held_scales(scale, store))
    np.testing.assert_array_equal(held_scales(held, store), held)
    ratio = held / scale
    if kind == "exponent":
        assert (ratio >= 1).all()
        assert (ratio < 2).all()
    else:
        # 8 bits of the largest of a block: half a unit, and what the unit itself is cut by.
        allowed = scale.max() / 255 * 0.51 + scale * 2**-7 if kind == "quantised" else scale * 2**-8
        assert (np.abs(held - scale) <= allowed).all()
    extreme = np.asarray(held_scales(np.array([[[1e-45, 1e38]]], np.float32), store))
    assert (extreme > 0).all()
    assert np.isfinite(extreme).all()


def terms():
    """Return a term of every kind with an array in few bits, the same with plain ones, and its shape."""
    rng = np.random.default_rng(2)
    store, rows = Store(bits=4, group=16), Store(bits=3, group=0, zero="none", table="row")

    def pair(shape, store):
        three = shape if len(shape) == 3 else (1, *shape)
        array = QuantisedArray.pack(drawn(three, store), store, shape=shape)
        return array, array.values()

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    left, right, dense, bases, shared = (
        pair(shape, own)
        for shape, own in (
            ((3, 8, 4), rows),
            ((3, 4, 32), store),
            ((3, 8, 32), store),
            ((6, 32), store),
            ((8, 32), store),
        )
    )
    kinds = {
        "dense": lambda i: Dense(weight=dense[i]),
        "low_rank": lambda i: LowRank(left=left[i], right=right[i]),
        "shared_basis": lambda i: SharedBasis(
            coefficients=left[i], bases=right[i], mixing=np.eye(3, dtype=np.float32), activation="tanh"
        ),
        "merged": lambda i: Merged(weight=dense[i], labels=np.array([[2, 0, 0, 1]], np.int32)),
        "shared": lambda i: Shared(weight=shared[i], experts=3, out=8, in_=32),
        "grouped": lambda i: Grouped(
            coefficients=pair((6, 8), Store(bits=4, group=0))[i], bases=bases[i], ranks=np.array([[1, 3, 2]], np.int32),
            experts=3, widest=3,
        ),
        "sparse": lambda i: replace(
            Sparse.abstract((3, 8, 32), "float32", entries=64),
            values=pair((1, 64), store)[i], indices=np.arange(64, dtype=np.int32)[None],
            counts=np.array([[32, 0, 32]], np.int32),
        ),
    }  # fmt: skip
    return kinds, normal


@pytest.mark.parametrize("kind", terms()[0])
def test_terms_hold_them(kind):
    kinds, normal = terms()
    held, plain = kinds[kind](0), kinds[kind](1)
    np.testing.assert_array_equal(held.materialize(), plain.materialize())
    np.testing.assert_array_equal(held.materialize(slice(1, 3)), plain.materialize(slice(1, 3)))
    experts, _, in_ = held.shape
    rows = normal(experts, 5, in_)
    np.testing.assert_allclose(held.apply(rows), plain.apply(rows), atol=1e-5)
    assert held.count().bytes < plain.count().bytes
    # Through the file, and the record through JSON.
    tensors = {name: np.asarray(x) for name, x in held.tensors().items()}
    assert held.count().bytes == sum(x.nbytes for x in tensors.values())
    assert not any(name.endswith("weight") for name in tensors)
    spec = json.loads(json.dumps(held.spec()))
    again = type(held).from_tensors(tensors, spec, held.shape)
    assert again.spec() == held.spec()
    np.testing.assert_array_equal(again.materialize(), held.materialize())
    assert "stores" not in plain.spec()


def mixed(width=32):
    """Return blocks of 2, 3 and 4 bits, and the dense matrices."""
    stores = [Store(bits=bits, group=width, zero="none") for bits in (2, 3, 4)]
    order = np.random.default_rng(3).permutation(6).astype(np.int32)
    parts = [drawn((count, 8, width), store, seed=count) for count, store in zip((1, 3, 2), stores)]
    shape = (6 * width // 64, 8, 64)
    array = MixedArray(
        parts=tuple(QuantisedArray.pack(part, store) for part, store in zip(parts, stores)),
        order=order[None],
        width=width,
        shape=shape,
    )
    blocks = np.concatenate([part.values(store) for part, store in zip(parts, stores)])
    dense = np.empty((6, 8, width), np.float32)
    dense[order] = blocks
    dense = dense.reshape(shape[0], -1, 8, width).swapaxes(1, 2).reshape(shape)
    return array, dense


@pytest.mark.parametrize("width", [32, 64])
def test_mixed_widths(width):
    array, dense = mixed(width)
    np.testing.assert_array_equal(array.values(), dense)
    np.testing.assert_array_equal(jax.jit(lambda own: own.values(slice(1, None)))(array), dense[1:])
    term = Dense(weight=array)
    tensors = {name: np.asarray(x) for name, x in term.tensors().items()}
    again = Dense.from_tensors(tensors, json.loads(json.dumps(term.spec())), term.shape)
    np.testing.assert_array_equal(again.materialize(), dense)
    parts = [(part.store, part.shape[0]) for part in array.parts]
    planned = MixedArray.abstract(array.shape, parts, width=width)
    assert planned.count() == term.count()
    with pytest.raises(JaxmoeError, match="once"):
        Dense.from_tensors(tensors | {"dense_order": np.zeros((1, 6), np.int32)}, term.spec(), term.shape)
    with pytest.raises(JaxmoeError, match="there are"):
        MixedArray.abstract(array.shape, parts[1:], width=width)


@pytest.mark.parametrize("store", STORES)
def test_damaged_numbers_are_named(store):
    """Whatever scale, real zero or table entry is put out of order, the error names the tensor and the place."""
    array = QuantisedArray.pack(drawn((2, 16, 64), store), store)
    whole = {name: np.array(tensor) for name, tensor in array.tensors("up").items()}
    for name, tensor in whole.items():
        if tensor.dtype == np.int32:
            continue
        wrong = [0, 255] if store.scale == "exponent" else [0] if tensor.dtype == np.uint8 else [np.nan, np.inf]
        if tensor.dtype != np.uint8 and name in ("up_scale", "up_unit"):
            wrong += [0, -1]
        for value in wrong:
            damaged = tensor.copy()
            damaged[-1, -1] = value
            row, column = tensor.shape[0] - 1, tensor.shape[1] - 1
            with pytest.raises(JaxmoeError, match=re.escape(f"{name} [{row}, {column}] is {value:g}")):
                array.restored(whole | {name: damaged}, "up")
    assert np.array_equal(array.restored(whole, "up").values(), array.values())


def test_damaged_records_are_named():
    term = terms()[0]["dense"](0)
    tensors = {name: np.asarray(x) for name, x in term.tensors().items()}
    spec = term.spec()

    def refused(match, tensors=tensors, **store):
        broken = spec | {"stores": {"dense": spec["stores"]["dense"] | store}}
        with pytest.raises(JaxmoeError, match=match):
            Dense.from_tensors(tensors, broken, term.shape)

    refused("9 bits", bits=9)
    refused("do not divide", group=24)
    refused("dense_codes is int32", bits=3)
    refused("Invalid enum value", scale="bf16")
    refused("unknown field", colour=3)
    refused("dense_scale is int8", tensors | {"dense_scale": tensors["dense_scale"].astype(np.int8)})
    refused("no dense_zero", {name: x for name, x in tensors.items() if name != "dense_zero"})
    with pytest.raises(JaxmoeError, match="'colour' is no array"):
        Dense.from_tensors(tensors, {"kind": "dense", "stores": {"colour": {}}}, term.shape)
    with pytest.raises(JaxmoeError, match="do not stand for"):
        QuantisedArray.pack(drawn((2, 4, 16), Store(bits=4, group=16)), Store(bits=4, group=16), shape=(8, 16))
    with pytest.raises(JaxmoeError, match="no matrices to choose from"):
        QuantisedArray.pack(drawn((1, 4, 16), Store(bits=4, group=16)), Store(bits=4, group=16), shape=(4, 16))[:1]
