"""Names, layouts and both ways between files and `[expert, out, in]`, without any model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.checkpoint import Stack, plan_dense, read_header, write_tensors
from jaxmoe.checkpoint.names import Grammar, layer_number
from jaxmoe.factors import TARGETS, LayerShape

NAMES = [
    (
        "model.layers.3.mlp.experts.12.gate_proj.weight",
        2,
        ("model.layers.3.", 3, "mlp", "per_expert", 12, "gate", False),
    ),
    (
        "model.layers.0.block_sparse_moe.experts.0.w2.weight",
        2,
        (..., 0, "block_sparse_moe", "per_expert", 0, "down", False),
    ),
    ("model.layers.0.feed_forward.experts.1.w3.weight", 2, (..., 0, "feed_forward", "per_expert", 1, "up", False)),
    ("model.layers.0.mlp.experts.1.up_proj.bias", 1, (..., 0, "mlp", "per_expert", 1, "up", True)),
    ("backbone.layers.7.mixer.experts.1.up_proj.weight", 2, ("backbone.layers.7.", 7, "mixer", ..., 1, "up", False)),
    ("model.language_model.layers.2.mlp.experts.gate_up_proj", 3, (..., 2, "mlp", "fused", None, "gate_up", False)),
    ("model.layers.2.mlp.experts.down_proj_bias", 2, (..., 2, "mlp", "fused", None, "down", True)),
    ("model.layers.2.experts.down_proj", 3, ("model.layers.2.", 2, "", "fused", None, "down", False)),
    ("model.layers.2.block_sparse_moe.input_linear.weight", 3, (..., 2, ..., "stacked", None, "gate_up", False)),
    ("model.layers.2.moe.down_proj.weight", 3, (..., 2, "moe", "stacked", None, "down", False)),
    ("transformer.blocks.4.ffn.experts.mlp.v1", 2, ("transformer.blocks.4.", 4, "ffn", "flat", None, "up", False)),
    ("model.layers.2.mlp.down_proj.weight", 2, None),
    ("model.layers.2.shared_mlp.input_linear.weight", 2, None),
    ("model.layers.2.mlp.shared_experts.gate_proj.weight", 2, None),
    ("model.layers.2.self_attention.experts.input_linear.weight", 3, None),
    ("model.layers.2.mlp.experts.0.gate_proj.weight_scale_inv", 2, None),
    ("model.layers.2.mlp.experts.x.gate_proj.weight", 2, None),
    ("experts.0.gate_proj.weight", 2, None),
]


@pytest.mark.parametrize(("name", "dimensions", "expected"), NAMES, ids=[name for name, *_ in NAMES])
def test_grammar(name, dimensions, expected):
    parsed = Grammar().classify(name, dimensions)
    if expected is None:
        assert parsed is None
        return
    assert all(want in (..., got) for got, want in zip(parsed[:7], expected, strict=True))
    assert parsed.template.replace("{expert}", str(parsed.expert)) == name


def test_layer_numbers_keep_their_root():
    assert layer_number("model.visual.blocks.61.norm.weight") == ("model.visual.blocks.", 61)
    assert layer_number("model.norm.weight") is None


def layouts(shape):
    """Return layouts of every kind."""

    def per(projection, **flags):
        return Stack(name=f"e.{{expert}}.{projection}", target=projection, **flags)

    def whole(target, **flags):
        return Stack(name=target, target=target, **flags)

    gate = ("gate",) if shape.gated else ()
    kinds = [
        [per(name) for name in shape.projections],
        [whole(name) for name in shape.projections],
        [whole(name, transposed=True) for name in shape.projections],
        [*(whole(name, flat=True) for name in (*gate, "up")), whole("down", flat=True, transposed=True)],
    ]
    if shape.gated:
        kinds += [
            [whole("gate_up", transposed=t, interleaved=i), whole("down", transposed=t)]
            for t in (False, True)
            for i in (False, True)
        ]
        kinds += [[per("gate_up", interleaved=True), whole("down")]]
    return kinds


@settings(max_examples=20, deadline=None)
@given(
    shape=st.builds(LayerShape, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans()),
    seed=st.integers(0, 99),
)
def test_every_layout_round_trips(shape, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=shape.of(name)).astype("float32") for name in shape.projections}
    for number, layout in enumerate(layouts(shape)):
        path = tmp_path_factory.mktemp("layout") / f"{number}.safetensors"
        write_tensors(path, plan_dense(layout, shape, np.dtype("float32"), weights.__getitem__))
        entries = read_header(path)
        for stack in layout:
            for name in TARGETS[stack.target]:
                for experts in (slice(None), slice(1, None), slice(0, 1)):
                    found = stack.read(entries, shape, name, experts)
                    np.testing.assert_array_equal(found, weights[name][experts])


def test_fused_tensors_hold_gate_above_up_or_alternating():
    shape = LayerShape(1, 2, 2)
    parts = {"gate": np.array([[[1, 2], [3, 4]]]), "up": np.array([[[5, 6], [7, 8]]])}

    def write(**flags):
        (planned,) = plan_dense([Stack(name="x", target="gate_up", **flags)], shape, np.dtype(int), parts.__getitem__)
        return planned.produce()[0].tolist()

    assert write() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert write(interleaved=True) == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert write(transposed=True) == [[1, 3, 5, 7], [2, 4, 6, 8]]
    assert write(transposed=True, interleaved=True) == [[1, 5, 3, 7], [2, 6, 4, 8]]


def test_projections_are_produced_once_and_let_go(tmp_path):
    import gc
    import weakref

    shape = LayerShape(3, 4, 5)
    asked, alive = [], []

    def produce(name):
        assert not [ref for ref in alive if ref() is not None], "an earlier projection is still held"
        asked.append(name)
        values = np.zeros(shape.of(name), "float32")
        alive.append(weakref.ref(values))
        return values

    layout = [Stack(name=f"{{expert}}.{name}", target=name) for name in shape.projections]
    write_tensors(tmp_path / "t", plan_dense(layout, shape, np.dtype("float16"), produce))
    gc.collect()
    assert asked == ["gate", "up", "down"]
    assert not [ref for ref in alive if ref() is not None]


def test_wide_values_are_rounded_to_the_dtype_on_disk():
    import ml_dtypes

    shape = LayerShape(1, 1, 1, gated=False)
    stack = Stack(name="{expert}", target="up")
    (planned,) = plan_dense(
        [stack], shape, np.dtype(ml_dtypes.bfloat16), lambda _: np.full((1, 1, 1), 1.00391, "float32")
    )
    assert planned.produce().astype(float).item() == 1.0078125
