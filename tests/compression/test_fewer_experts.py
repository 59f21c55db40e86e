"""What fewer active experts save and cost: the published numbers from published configs, and those of real files."""

from dataclasses import replace

import published
import pytest

import jaxmoe
from jaxmoe.checkpoint.decoder import end_pieces, layer_pieces
from jaxmoe.checkpoint.families import decoder_spec, find_family
from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank
from jaxmoe.model.compressed_experts import MainExperts, main_experts
from jaxmoe.model.spec import ExpertBlock, Router
from jaxmoe.model.work import Activity, activity, block_work


def counted(name: str, main: int | None, **changes) -> tuple[Activity, int]:
    """Return what a published config amounts to, and what of the active numbers lies outside of the experts."""
    config = {**published.config(name), **changes}
    shapes = published.shapes(config)
    spec, family = decoder_spec(config, shapes), find_family(config)
    if main is not None:
        spec = main_experts(spec, dict.fromkeys(shapes, MainExperts(main)))
    pieces = [*end_pieces(spec, family).values()]
    for index, layer in enumerate(spec.layers):
        pieces += layer_pieces(layer, f"model.layers.{index}.", family).values()
    other = 0
    for piece in pieces:
        numbers = 1
        for size in piece.shape:
            numbers *= size
        other += numbers

    def dense(shape: LayerShape) -> CompressedLayer:
        terms = {own: (Dense.abstract(shape.of(own), "bfloat16"),) for own in shape.projections}
        return CompressedLayer(terms=terms, sizes=shape)

    blocks = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, ExpertBlock)]
    return activity(other, [(block, dense(block.shape)) for block in blocks]), other


def test_published_numbers_of_olmoe():
    """805 M to 403 M active in the experts, 1.28 B to 878 M in all, 31.4 % less; 5.24 M numbers more in the files."""
    (before, other), (after, _) = counted("olmoe-1b-7b", None), counted("olmoe-1b-7b", 4)
    assert round((before.active - other) / 1e6) == 805
    assert round((after.active - other) / 1e6) == 403
    assert before.active == pytest.approx(1.28e9, rel=0.002)
    # The published total leaves out the routers, 2.1 M.
    assert after.active == pytest.approx(878e6, rel=0.002)
    assert round(1 - after.active / before.active, 3) == 0.314
    assert after.stored - before.stored == 16 * 64 * (2 * 2048 + 1024) == 5_242_880


def test_published_numbers_of_phi():
    """5.03 B to 2.52 B active in the experts; 7.45 B to 4.93 B in all where every head has keys of its own."""
    (before, other), (after, _) = counted("phi-3.5-moe", None), counted("phi-3.5-moe", 1)
    assert round((before.active - other) / 1e9, 2) == 5.03
    assert round((after.active - other) / 1e9, 2) == 2.52
    assert after.stored - before.stored == 32 * 16 * (2 * 4096 + 6400)
    heads = {"num_key_value_heads": published.config("phi-3.5-moe")["num_attention_heads"]}
    all_heads = [counted("phi-3.5-moe", main, **heads)[0].active for main in (None, 1)]
    assert [round(active / 1e9, 2) for active in all_heads] == [7.45, 4.93]
    assert round(1 - all_heads[1] / all_heads[0], 3) == 0.338
    # With the eight key and value heads that the config has, both are 0.8 B smaller.
    assert before.active == pytest.approx(all_heads[0] - 32 * 2 * 24 * 128 * 4096, rel=1e-3)


def test_operations_count_the_average_and_terms_of_gate_and_up_twice():
    sizes = LayerShape(experts=8, hidden=6, intermediate=4)
    block = ExpertBlock(shape=sizes, router=Router(experts=8, top_k=4), main=3)
    average = 2 * 8 * (6 + 6 + 4)
    dense = {name: (Dense.abstract(sizes.of(name), "float32"),) for name in sizes.projections}
    assert block_work(block, CompressedLayer(terms=dense, sizes=sizes)) == (3 * 72 + 16, 3 * 2 * 72 + average)
    pair = {target: (LowRank.abstract(sizes.of(target), "float32", rank=2),) for target in ("gate_up", "down")}
    once = 2 * 3 * 2 * (8 + 6)
    down = 2 * 3 * 2 * (6 + 4)
    found = block_work(block, CompressedLayer(terms=pair, sizes=sizes))
    assert found.operations == 2 * once + down + average
    everything = block_work(replace(block, main=None), CompressedLayer(terms=pair, sizes=sizes))
    assert everything.operations == (once + down) / 3 * 4


def test_plan_of_the_bundled_checkpoint():
    plan = jaxmoe.plan(demo_checkpoint(), "compressed_experts", main_experts=2).as_json()
    # 4 layers of 16 experts, top 4, of 128 x 64.
    assert plan["parameters"]["after"] - plan["parameters"]["before"] == 4 * 16 * (2 * 128 + 64)
    assert plan["active_parameters"]["before"] - plan["active_parameters"]["after"] == 4 * 2 * (3 * 128 * 64 - 320)
    assert plan["operations_per_token"]["before"] == 4 * 4 * 2 * 3 * 128 * 64
    assert plan["achieved"]["model"] < 0
    assert plan["experts_per_token"] == {"before": 4, "after": 2}


@pytest.mark.parametrize("main", [0, 4, 9])
def test_refuses_other_numbers(main):
    with pytest.raises(JaxmoeError, match="1 to 3"):
        jaxmoe.plan(demo_checkpoint(), "compressed_experts", main_experts=main)
