"""What lies in files is compared with what each term demands: no edit is read as something else."""

import copy

import ml_dtypes
import numpy as np
import pytest
from test_terms import SHAPE, filled, terms

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape
from jaxmoe.factors.registry import KINDS

TERMS = terms(SHAPE)
OPTIONAL = {"widest"}
"""Keys that earlier versions did not write."""

STRANGE = (None, -1, 0, "3", 2.5, [], {}, True, 2**31, 2**63, 10**30, float("nan"))


def on_disk(name):
    """Return a term, its tensors and its record, as they are read back."""
    term = filled(TERMS[name])
    return term, {key: np.asarray(value) for key, value in term.tensors().items()}, term.spec()


def read(name, tensors, spec):
    return KINDS[TERMS[name].kind].from_tensors(tensors, spec, SHAPE)


@pytest.mark.parametrize("name", TERMS)
def test_every_key_of_the_record_is_checked(name):
    _, tensors, spec = on_disk(name)
    for key in spec.keys() - {"kind"}:
        without = {k: v for k, v in spec.items() if k != key}
        if key in OPTIONAL:
            assert read(name, tensors, without).spec() == spec
        else:
            with pytest.raises(JaxmoeError, match=key):
                read(name, tensors, without)
        for value in STRANGE:
            if key in OPTIONAL and value is None:
                continue
            # `balanced` says how to compute: the tensors do not tell.
            if type(value) is type(spec[key]) and (value == spec[key] or key == "balanced"):
                continue
            with pytest.raises(JaxmoeError):
                read(name, tensors, {**spec, key: value})
    with pytest.raises(JaxmoeError, match="surprise"):
        read(name, tensors, {**spec, "surprise": 1})


@pytest.mark.parametrize("name", TERMS)
def test_sizes_that_are_off_by_one(name):
    """All but `dynamic`, which says how to compute (the tensors do not tell), and `parts` where it says nothing."""
    _, tensors, spec = on_disk(name)
    for key, value in spec.items():
        if type(value) is int and key != "dynamic":
            if key == "parts" and (spec["kept"] is None or spec["axis"] == "in"):
                continue
            # Groups that are larger than all experts are one group of all.
            wrong = [value - 1] if (key, value) == ("size", SHAPE[0]) else [value - 1, value + 1]
            for other in wrong:
                with pytest.raises(JaxmoeError):
                    read(name, tensors, {**spec, key: other})


@pytest.mark.parametrize("name", TERMS)
def test_every_tensor_is_checked(name):
    _, tensors, spec = on_disk(name)
    for key, array in tensors.items():
        with pytest.raises(JaxmoeError, match=key):
            read(name, {k: v for k, v in tensors.items() if k != key}, spec)
        other = np.int32 if array.dtype.kind == "f" else np.float32
        changed = [array[:, :-1], array[None], array.reshape(-1), np.concatenate([array, array]), array.astype(other)]
        changed += [array.astype(np.int64)] if array.dtype.kind == "i" else [array.astype(ml_dtypes.float8_e4m3fn)]
        if array.shape[0] != array.shape[1]:
            # Just as many numbers in another order.
            changed.append(array.T)
        for wrong in changed:
            with pytest.raises(JaxmoeError, match=f"{key} is "):
                read(name, {**tensors, key: wrong}, spec)
    with pytest.raises(JaxmoeError, match="surplus belongs to nothing"):
        read(name, {**tensors, "surplus": np.zeros((1, 1))}, spec)


@pytest.mark.parametrize("name", TERMS)
def test_places_lie_within(name):
    """Whole numbers in tensors are ranks, orders, labels, places or counts; only a seed may be anything."""
    _, tensors, spec = on_disk(name)
    for key, array in tensors.items():
        if array.dtype.kind != "i" or key == "seed":
            continue
        for place in range(array.size):
            for value in (-1, -(2**31), 2**31 - 1, 1000):
                wrong = array.copy()
                wrong.flat[place] = value
                with pytest.raises(JaxmoeError):
                    read(name, {**tensors, key: wrong}, spec)


def test_an_order_names_each_expert_once():
    for name in ("grouped", "hashed groups"):
        _, tensors, spec = on_disk(name)
        with pytest.raises(JaxmoeError, match=r"order \[3, 3, 4, 2, 1\] does not name each"):
            read(name, {**tensors, "order": np.array([[3, 3, 4, 2, 1]], np.int32)}, spec)


def test_kept_channels_ascend():
    _, tensors, spec = on_disk("shared outputs")
    with pytest.raises(JaxmoeError, match=r"kept channels \[2, 0, 3\] are not ascending"):
        read("shared outputs", {**tensors, "kept": np.array([[2, 0, 3]], np.int32)}, spec)


def test_a_layer_names_the_term_and_leaves_nothing_over():
    sizes = LayerShape(experts=2, hidden=4, intermediate=3, gated=False)
    dense = {name: (Dense(weight=np.ones(sizes.of(name), np.float32)),) for name in sizes.projections}
    layer = CompressedLayer(terms=dense, sizes=sizes)
    tensors, spec = layer.tensors(), layer.spec()
    with pytest.raises(JaxmoeError, match=r"down\.0 \(dense\): there is no dense"):
        CompressedLayer.from_tensors({"up.0.dense": tensors["up.0.dense"]}, spec, sizes)
    with pytest.raises(JaxmoeError, match=r"down\.1\.left belong to no term"):
        CompressedLayer.from_tensors({**tensors, "down.1.left": np.ones((1, 1))}, spec, sizes)
    for value in STRANGE:
        for wrong in (value, {"down": value}, {**spec, "down": [value]}, {**spec, "down": [{"kind": value}]}):
            with pytest.raises(JaxmoeError):
                CompressedLayer.from_tensors(tensors, copy.deepcopy(wrong), sizes)
