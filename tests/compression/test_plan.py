"""What a ratio means: budgets met exactly over layers and projections, ranges named where they cannot be."""

import math
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_plan

from jaxmoe import methods
from jaxmoe.checkpoint.layout import Stack
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.methods.method import count
from jaxmoe.methods.mobe import MoBESettings
from jaxmoe.methods.svd import SVDSettings

BF16 = np.dtype(ml_dtypes.bfloat16)
DEMO = LayerShape(experts=16, hidden=128, intermediate=64)
WIDE = LayerShape(experts=8, hidden=128, intermediate=256)
QWEN = LayerShape(experts=128, hidden=2048, intermediate=768)


def checkpoint(*shapes, others=100_000):
    layers, matrices = [], {}
    for i, shape in enumerate(shapes):
        stacks = tuple(Stack(name=f"layers.{i}.{name}", target=name) for name in shape.projections)
        for stack in stacks:
            part = SimpleNamespace(bytes=2 * math.prod(shape.of(stack.target)))
            matrices[stack.name] = SimpleNamespace(parts=(part,))
        layers.append(SimpleNamespace(index=i, module=f"layers.{i}", shape=shape, dtype=BF16, layout=stacks))
    experts = sum(shape.numbers for shape in shapes)
    return SimpleNamespace(
        layers=tuple(layers),
        matrices=matrices,
        parameters=experts + others,
        bytes=2 * (experts + others),
        copied=lambda but=(): [SimpleNamespace(numbers=others, bytes=2 * others)],
    )


def settings_of(name, setting):
    recipe = methods.get(name)
    return recipe, recipe.settings(setting=setting)


def unit(plan):
    """The smallest number by which any slot could still grow."""
    steps = []
    for planned in plan.layers:
        source = planned.source
        for target in plan.method.targets(source.shape, plan.settings):
            stored = count(planned.template.terms[target]).numbers
            kept = stored / np.prod(source.shape.of(target))
            ladder = plan.method.slot(target, source.shape, source.dtype, plan.settings, kept).ladder()
            if stored < ladder.numbers(ladder.high):
                steps.append(ladder.step)
    return min(steps) if steps else float("inf")


@pytest.mark.parametrize("shapes", [(DEMO,) * 4, (QWEN,) * 3, (WIDE, WIDE), (DEMO, WIDE)])
@pytest.mark.parametrize(("name", "setting"), [("svd", "paper"), ("svd", "improved"), ("mobe", "improved")])
@pytest.mark.parametrize("ratio", [0.166, 0.25, 0.4, 0.6, 0.8])
def test_removes_what_was_asked_and_hardly_more(shapes, name, setting, ratio):
    source = checkpoint(*shapes)
    plan = make_plan(source, *settings_of(name, setting), ratio=ratio, of="experts")
    experts = sum(shape.numbers for shape in shapes)
    budget = int(experts - np.ceil(round(ratio * 1000) * experts / 1000))
    rest = budget - plan.sizes.after.touched.numbers
    assert 0 <= rest < unit(plan)
    assert plan.sizes.removed()["experts"] >= ratio
    counted = sum(planned.template.count().numbers for planned in plan.layers)
    assert plan.summary()["parameters"]["after"] == 100_000 + counted
    ranks = [x for p in plan.layers for x in jax.tree.leaves(p.template.terms) if x.dtype == np.int32]
    assert plan.summary()["bytes"]["after"] == 2 * plan.summary()["parameters"]["after"] + 2 * sum(
        x.size for x in ranks
    )


def test_paper_mobe_leaves_down_and_chooses_bases():
    source = checkpoint(*(DEMO,) * 4)
    plan = make_plan(source, *settings_of("mobe", "paper"), ratio=0.166, of="experts")
    terms = [planned.template.spec() for planned in plan.layers]
    assert all(spec["down"] == [{"kind": "dense"}] for spec in terms)
    assert {spec[p][0]["rank"] for spec in terms for p in ("gate", "up")} == {64}
    assert {spec[p][0]["bases"] for spec in terms for p in ("gate", "up")} <= {3, 4}
    assert plan.sizes.before.touched.numbers == 2 * plan.sizes.before.experts.numbers // 3


def test_paper_mobe_turns_wide_experts():
    plan = make_plan(checkpoint(WIDE, WIDE), *settings_of("mobe", "paper"), ratio=0.2, of="experts")
    spec = plan.layers[0].template.spec()["gate"][0]
    assert spec["transposed"]
    assert spec["rank"] == 128


@given(st.sampled_from(["touched", "experts", "model"]), st.floats(0.05, 0.9))
@settings(max_examples=60, deadline=None)
def test_every_scope_means_what_it_says(of, ratio):
    source = checkpoint(DEMO, WIDE, others=400_000)
    try:
        plan = make_plan(source, *settings_of("svd", "improved"), ratio=ratio, of=of)
    except JaxmoeError as error:
        if "out of reach" not in str(error):
            raise
        return
    removed = plan.sizes.removed()
    assert removed[of] >= ratio - 1e-12
    scope = getattr(plan.sizes.before, of).numbers
    assert (removed[of] - ratio) * scope < unit(plan) + 1


def test_out_of_reach_names_all_three_ranges_and_they_hold():
    source = checkpoint(*(DEMO,) * 4)
    recipe, chosen = settings_of("mobe", "paper")
    with pytest.raises(JaxmoeError) as caught:
        make_plan(source, recipe, chosen, ratio=0.6, of="experts")
    words = str(caught.value).split()
    low, high = (float(words[words.index("experts,") - 4 + i].rstrip(",")) for i in (0, 2))
    make_plan(source, recipe, chosen, ratio=round(high, 3) - 0.001, of="experts")
    make_plan(source, recipe, chosen, ratio=round(low, 3) + 0.002, of="experts")
    with pytest.raises(JaxmoeError):
        make_plan(source, recipe, chosen, ratio=high + 0.01, of="experts")


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.2, float("nan")])
def test_what_is_no_fraction_is_refused(ratio):
    with pytest.raises(JaxmoeError, match="not a removed fraction"):
        make_plan(checkpoint(DEMO), *settings_of("svd", "improved"), ratio=ratio)


def test_forced_rank_and_bases_are_kept():
    chosen = MoBESettings(bases=3)
    plan = make_plan(checkpoint(DEMO), methods.get("mobe"), chosen, ratio=0.5)
    bases = {term["bases"] for terms in plan.layers[0].template.spec().values() for term in terms}
    assert bases == {3}


def test_unknown_names_are_listed():
    with pytest.raises(
        JaxmoeError, match=r"camera, compressed_experts, d2moe, .*gptq, gptq4, .*rfid, rtn, rtn4, .*svd"
    ):
        methods.get("swd")
    with pytest.raises(JaxmoeError, match="touched, experts, model"):
        make_plan(checkpoint(DEMO), methods.get("svd"), SVDSettings(), ratio=0.4, of="layers")
