"""Rows of several seeds, and the cells and commands of a comparison."""

import io

import numpy as np
import pytest
from rich.console import Console

from jaxmoe.comparison.cells import cells
from jaxmoe.comparison.contenders import contenders, with_baselines
from jaxmoe.comparison.summary import rows
from jaxmoe.compression.recipe import find
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.comparison import comparison_csv, comparison_markdown, comparison_table


def evaluation(*nats):
    texts = [{"name": name, "nats_per_token": own, "perplexity": float(np.exp(own))} for name, own in zip("ab", nats)]
    return {
        "texts": texts,
        "geometric_mean_perplexity": float(np.exp(np.mean(nats))),
        "kl": nats[0] / 10,
        "top1_agreement": 0.5,
    }


def cell(seed, *nats, **more):
    projections = {"up": {"error": 0.1 * (seed + 1), "weighted_error": None}}
    record = {
        "method": "mobe",
        "setting": "paper",
        "changed": {},
        "calibrated": False,
        "ratio": 0.4,
        "of": "experts",
        "seed": seed,
        "command": f"jaxmoe compress --seed {seed}",
    }
    if not nats:
        return {**record, **more}
    return {
        **record,
        "achieved": {"touched": 0.5, "experts": 0.4, "model": 0.2},
        "allocation": "uniform",
        "parameters": {"before": 100, "after": 80},
        "bytes": {"before": 200, "after": 160},
        "seconds": 1.0 + seed,
        "peak_bytes": 1e6,
        "active_parameters": 10,
        "operations_per_token": 20,
        "outcomes": [{"kind": "behind_svd"}] * seed,
        "layers": [{"layer": 0, "projections": projections}],
        "evaluation": evaluation(*nats),
        **more,
    }


ORIGINAL = {
    "parameters": 100,
    "bytes": 200,
    "active_parameters": 30,
    "operations_per_token": 60,
    "evaluation": evaluation(1.0, 2.0),
}


def test_seeds_become_mean_and_standard_deviation():
    losses = [(1.5, 2.0), (1.1, 2.8), (1.2, 2.4)]
    _, row = rows(ORIGINAL, [cell(seed, *nats) for seed, nats in enumerate(losses)])
    perplexities = np.exp(np.mean(losses, axis=1))
    assert row["seeds"] == [0, 1, 2]
    assert row["geometric_mean_perplexity"] == pytest.approx(perplexities.mean())
    assert row["spread"]["geometric_mean_perplexity"] == pytest.approx(perplexities.std(ddof=1))
    assert row["nats_lost"] == pytest.approx(np.mean(losses) - 1.5)
    assert row["perplexity"]["b"] == pytest.approx(np.exp([2.0, 2.8, 2.4]).mean())
    # The worst of all seeds, not of their mean.
    assert row["worst"] == {"name": "b", "growth": pytest.approx(np.exp(0.8))}
    assert row["weighted_error"] is None
    assert "weighted_error" not in row["spread"]
    assert row["outcomes"] == {"behind_svd": 3}
    data = {"rows": rows(ORIGINAL, [cell(0, 1.5, 2.0), cell(1, 1.1, 2.8)]), "texts": [{"name": "a"}, {"name": "b"}]}
    mean, deviation = np.mean(perplexities[:2]), np.std(perplexities[:2], ddof=1)
    assert f"| {mean:.2f} ± {deviation:.2f} |" in comparison_markdown(data)
    assert "geometric_mean_perplexity_sd" in comparison_csv(data).splitlines()[0]


@pytest.mark.parametrize("width", [200, 80, 72])
def test_a_narrow_terminal_shows_fewer_columns_but_whole_numbers(width):
    data = {"rows": rows(ORIGINAL, [cell(0, 1.5, 2.0), cell(1, 1.1, 2.8)]), "texts": [{"name": "a"}, {"name": "b"}]}
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(data, width))
    shown = console.file.getvalue()
    row = data["rows"][1]
    assert f"{row['geometric_mean_perplexity']:.2f} ± {row['spread']['geometric_mean_perplexity']:.2f}" in shown
    assert f"{row['worst']['growth']:.3f}" in shown
    assert "…" not in shown
    assert ("seconds" in shown) == (width == 200)


def test_a_seed_that_failed_is_told():
    _, row = rows(ORIGINAL, [cell(0, 1.5, 2.0), cell(1, reason="not finite")])
    assert row["seeds"] == [0]
    assert row["reason"] == "not finite"
    assert row["spread"] == {}
    assert len(row["commands"]) == 2


def test_cells_are_every_combination_in_order():
    both = [find("svd", setting="paper"), find("mobe", options={"steps": 7})]
    made = cells(both, [0.6, 0.2, 0.6], of="model", seeds=2)
    assert [(c.recipe.name, c.size["ratio"], c.seed) for c in made] == [
        (name, ratio, seed) for name in ("svd", "mobe") for ratio in (0.2, 0.6) for seed in (0, 1)
    ]
    assert len({c.name for c in made}) == 8
    assert made[-1].command("CKPT", "OUT", []) == (
        "jaxmoe compress CKPT OUT --method mobe --setting improved --set steps=7 --ratio 0.6 --of model --seed 1"
    )


def test_baselines_join():
    asked = [find("mobe"), find("mobe", setting="paper"), find("svd", setting="paper")]
    joined = with_baselines(asked, calibrated=False)
    assert [(own.name, own.setting) for own in joined] == [
        ("svd", "improved"),
        ("mobe", "improved"),
        ("mobe", "paper"),
        ("svd", "paper"),
    ]
    calibrated = with_baselines([find("reap"), find("svd")], calibrated=True)
    assert [(own.name, own.setting) for own in calibrated] == [
        ("frequency", "improved"),
        ("reap", "improved"),
        ("svd", "improved"),
    ]


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


def test_recipes_that_take_both_sizes_get_every_pair():
    made = cells([find("svd+compressed_experts")], [0.2, 0.4], main_experts=[1, 2])
    assert [dict(cell.size) for cell in made] == [
        {"ratio": ratio, "of": "experts", "main_experts": count} for ratio in (0.2, 0.4) for count in (2, 1)
    ]
