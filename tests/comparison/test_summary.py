"""Rows of several seeds, and the cells and commands of a comparison."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxmoe import Checkpoint
from jaxmoe.comparison.cells import cells
from jaxmoe.comparison.contenders import able, contenders, with_baselines
from jaxmoe.comparison.summary import Original, rows
from jaxmoe.compression.recipe import KINDS, Recipe, find
from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import Fit
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.report.comparison import comparison_csv, comparison_markdown, comparison_table, size_text
from jaxmoe.report.comparison_records import CellMeasured, CellResult, Comparison, Text, Worst
from jaxmoe.report.evaluation_records import Evaluation, Percentiles, TextEvaluation
from jaxmoe.report.records import Change, Layer, Outcome, Projection, Requested

SPREAD = Percentiles(median=0.001, p99=0.2, p999=0.9)


def evaluation(*nats):
    common = {"tokens": 10, "left_out": 0, "top1_agreement": 0.5}
    texts = tuple(
        TextEvaluation(name=name, nats_per_token=own, kl=nats[0] / 10, **common) for name, own in zip("ab", nats)
    )
    return Evaluation(texts=texts, length=6, tokens_per_second=1.0, kl_percentiles=SPREAD)


def cell(seed, *nats, reason=None):
    up = Projection(terms=[], ranks=[1], parameters=1, kept=0.5, error=0.1 * (seed + 1), weighted_error=None)
    behind = Outcome(layer=None, kind="behind_svd", target=None, detail="")
    achieved = {"touched": 0.5, "experts": 0.4, "model": 0.2}
    measured = None
    if nats:
        measured = CellMeasured(
            output="small",
            requested=Requested(ratio=0.4, of="experts", unit="bytes"),
            achieved=achieved,
            removed={"parameters": achieved, "bytes": achieved},
            bits_per_weight={"touched": 8.0, "experts": 9.6, "model": 12.8},
            allocation="uniform",
            parameters=Change(before=100, after=80),
            bytes=Change(before=200, after=160),
            loaded_bytes=160,
            seconds=1.0 + seed,
            peak_bytes=1_000_000,
            active_parameters=10,
            operations_per_token=20,
            outcomes=[behind] * seed,
            layers=[Layer(layer=0, projections={"up": up})],
            evaluation=evaluation(*nats),
        )
    return CellResult(
        context="same",
        method="mobe",
        setting="paper",
        settings={},
        changed={},
        calibrated=False,
        ratio=0.4,
        of="experts",
        unit="bytes",
        seed=seed,
        name=f"mobe-{seed}",
        command=f"jaxmoe compress --seed {seed}",
        reason=reason,
        measured=measured,
    )


ORIGINAL = Original(
    parameters=100,
    bytes=200,
    loaded_bytes=200,
    bits_per_weight={"touched": 16.0, "experts": 16.0, "model": 16.0},
    active_parameters=30,
    operations_per_token=60,
    evaluation=evaluation(1.0, 2.0),
)


def comparison(*cells):
    texts = [Text(name=name, windows=1, left_out=0) for name in "ab"]
    about = {"jaxmoe": "0", "source": "model", "model_type": "mixtral", "length": 6, "calibration": None}
    found = {"rows": rows(ORIGINAL, cells), "cells": [*cells], "routing": None, "spectra": []}
    return Comparison(**about, texts=texts, **found)


def test_seeds_become_mean_and_standard_deviation():
    losses = [(1.5, 2.0), (1.1, 2.8), (1.2, 2.4)]
    _, row = rows(ORIGINAL, [cell(seed, *nats) for seed, nats in enumerate(losses)])
    perplexities = np.exp(np.mean(losses, axis=1))
    found = row.measured
    assert row.seeds == [0, 1, 2]
    assert found.geometric_mean_perplexity == pytest.approx(perplexities.mean())
    assert found.spread["geometric_mean_perplexity"] == pytest.approx(perplexities.std(ddof=1))
    assert found.nats_lost == pytest.approx(np.mean(losses) - 1.5)
    assert found.perplexity["b"] == pytest.approx(np.exp([2.0, 2.8, 2.4]).mean())
    # The worst of all seeds, not of their mean.
    assert found.worst == Worst(name="b", growth=pytest.approx(np.exp(0.8)))
    assert found.weighted_error is None
    assert "weighted_error" not in found.spread
    assert found.outcomes == {"behind_svd": 3}
    assert (found.kl_median, found.kl_p99, found.kl_p999) == pytest.approx((0.001, 0.2, 0.9))
    data = comparison(cell(0, 1.5, 2.0), cell(1, 1.1, 2.8))
    mean, deviation = np.mean(perplexities[:2]), np.std(perplexities[:2], ddof=1)
    assert f"| {mean:.2f} ± {deviation:.2f} |" in comparison_markdown(data)
    assert "geometric_mean_perplexity_sd" in comparison_csv(data).splitlines()[0]


def test_a_comparison_reads_what_it_writes():
    data = comparison(cell(0, 1.5, 2.0), cell(1, reason="out of reach"))
    said = json.loads(json.dumps(data.as_json()))
    assert Comparison.read(said) == data
    # What was measured stands beside the other keys, and not at all where nothing was.
    assert said["rows"][1]["kl_p999"] == 0.9
    assert said["cells"][0]["bytes"] == {"before": 200, "after": 160}
    assert not {"measured", "bytes", "evaluation"} & said["cells"][1].keys()
    with pytest.raises(JaxmoeError, match="no record of the kind"):
        Comparison.read([])


@pytest.mark.parametrize("width", [200, 80, 72])
def test_a_narrow_terminal_shows_fewer_columns_but_whole_numbers(width):
    data = comparison(cell(0, 1.5, 2.0), cell(1, 1.1, 2.8))
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(data, width))
    shown = console.file.getvalue()
    found = data.rows[1].measured
    assert max(map(len, shown.splitlines())) <= width
    assert f"{found.geometric_mean_perplexity:.2f} ± {found.spread['geometric_mean_perplexity']:.2f}" in shown
    assert "9.600" in shown
    assert "…" not in shown
    assert ("seconds" in shown) == (width == 200)


def test_a_seed_that_failed_is_told():
    _, row = rows(ORIGINAL, [cell(0, 1.5, 2.0), cell(1, reason="not finite")])
    assert row.seeds == [0]
    assert row.reason == "not finite"
    assert row.measured.spread == {}
    assert len(row.commands) == 2


def test_a_recipe_may_have_a_size_of_its_own():
    """Bits in a name say how large the result is: one point, whatever ratios others are asked for."""
    method = QuantisingMethod("half", "", QuantisingSettings, lambda _: (16,), lambda terms, *_: terms, fit=Fit)
    recipe = Recipe(steps=(KINDS["quantise"](method=method, settings=QuantisingSettings()),))
    (made,) = cells([recipe], [0.2, 0.4])
    assert made.size == {}
    assert made.name == "half-improved-seed0"
    assert made.command("CKPT", "OUT", []).endswith("compress CKPT OUT --method half --setting improved")
    assert size_text(Requested()) == "size of its own"


def test_targets_are_part_of_a_cell():
    (made,) = cells([find("svd")], [0.4], targets=("experts", "attention"))
    assert made.name == "svd-improved-0.4-experts-bytes-experts-attention-seed0"
    assert made.decided()["targets"] == ["experts", "attention"]
    assert "--unit bytes --targets experts,attention" in made.command("CKPT", "OUT", [])


def test_cells_are_every_combination_in_order():
    both = [find("svd", setting="paper"), find("mobe", options={"steps": 7})]
    made = cells(both, [0.6, 0.2, 0.6], of="model", seeds=2)
    assert [(c.recipe.name, c.size["ratio"], c.seed) for c in made] == [
        (name, ratio, seed) for name in ("svd", "mobe") for ratio in (0.2, 0.6) for seed in (0, 1)
    ]
    assert len({c.name for c in made}) == 8
    assert made[-1].command("CKPT", "OUT", []) == (
        "jaxmoe compress CKPT OUT --method mobe --setting improved --set steps=7 --ratio 0.6 --of model --unit bytes"
        " --seed 1"
    )


def test_baselines_join():
    def joined(asked, able=lambda recipe: True, wanted="svd,frequency,reap"):
        return [(own.name, own.setting) for own in with_baselines(asked, able, wanted)]

    asked = [find("mobe"), find("mobe", setting="paper"), find("svd", setting="paper")]
    given = [("mobe", "improved"), ("mobe", "paper"), ("svd", "paper")]
    assert joined(asked, lambda recipe: recipe.name == "svd", None) == [("svd", "improved"), *given]
    assert [name for name, _ in joined(asked, bool, None)[:5]] == ["svd", "frequency", "reap", "rtn", "gptq"]
    assert joined([find("reap"), find("svd")]) == [
        ("frequency", "improved"),
        ("reap", "improved"),
        ("svd", "improved"),
    ]
    assert joined([]) == []


@pytest.mark.parametrize("none", ["none", "", ()])
def test_baselines_are_named_or_dropped(none):
    asked = [find("mobe")]
    assert with_baselines(asked, bool, none) == asked
    assert [own.name for own in with_baselines(asked, bool, ["gptq", "svd"])] == ["svd", "gptq", "mobe"]
    with pytest.raises(JaxmoeError, match="no baselines: mobe; give some of svd, frequency, reap, rtn, gptq, or none"):
        with_baselines(asked, bool, "svd,mobe")
    with pytest.raises(JaxmoeError, match="cannot be carried out here: reap; leave them out"):
        with_baselines(asked, lambda own: own.name == "svd", "svd,reap")


def test_baselines_that_cannot_run_stay_away():
    checkpoint = Checkpoint.open(demo_checkpoint())

    def can(name, *, texts=True, **sizes):
        recipe = find(name)
        return able(recipe, checkpoint, cells([recipe], [0.4], **sizes), texts=texts)

    assert can("svd")
    assert can("svd", texts=False, targets=("experts", "attention"))
    assert can("reap")
    # A ratio of numbers says nothing of bits.
    assert can("rtn", unit="bytes")
    assert not can("rtn", unit="parameters")
    assert not can("reap", texts=False)
    assert not can("reap", targets=("experts", "attention"))


def test_names_and_recipe_files_become_recipes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{method: reap+svd, ratio: 0.9, setting: paper, set: {svd.share: 2}}")
    found = contenders(f"mobe, {path}", setting="both", set={"mobe:paper:steps": "7", "mobe:bases": 2})
    assert [(own.name, own.setting, own.changed) for own in found] == [
        ("mobe", "paper", {"steps": 7, "bases": 2}),
        ("mobe", "improved", {"bases": 2}),
        ("reap+svd", "paper", {"reap.share": 1.0, "svd.share": 2.0}),
    ]
    path.write_text("ratio: 0.4")
    with pytest.raises(JaxmoeError, match="names no method"):
        contenders([str(path)])


@pytest.mark.parametrize("key", ["steps", "", ":", "svd:steps", "mobe:best:steps", "mobe:paper:steps:more"])
def test_settings_of_no_contender_are_named(key):
    with pytest.raises(JaxmoeError, match=rf"--set {key}=2: give METHOD:NAME=VALUE .* of mobe:improved"):
        contenders("mobe", set={key: 2})


def test_recipes_that_take_both_sizes_get_every_pair():
    made = cells([find("svd+compressed_experts")], [0.2, 0.4], main_experts=[1, 2])
    assert [dict(cell.size) for cell in made] == [
        {"ratio": ratio, "of": "experts", "unit": "bytes", "main_experts": count}
        for ratio in (0.2, 0.4)
        for count in (2, 1)
    ]
