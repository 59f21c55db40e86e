"""Whole checkpoints whose config.json holds hostile values: opened, planned and run, or refused in one message."""

import json
import math
import random

import plain_checkpoint
import pytest
from planned import make_plan, prune_plan

from jaxmoe import Checkpoint, StoredModel, inspect, methods
from jaxmoe.checkpoint.families import FAMILIES
from jaxmoe.checkpoint.families.parts.keys import KINDS
from jaxmoe.errors import JaxmoeError

HOSTILE = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**200, 0.5, 1e308, math.nan, math.inf, "", "2", "x" * 10_000),
    *([], [1], [2] * 2, [True], ["sparse"] * 2, ["moe"], [None], [[1]], {}, {"a": 1}, {"hidden_size": 16}, "E*"),
)


def plan(folder, name, **settings):
    method = methods.get(name)
    make = make_plan if name == "svd" else prune_plan
    return make(Checkpoint.open(folder), method, method.settings(**settings), ratio=0.3)


USES = {
    "inspect": inspect,
    "factors": lambda folder: plan(folder, "svd"),
    "fewer experts": lambda folder: plan(folder, "reap", multiple=1),
    "fewer channels": lambda folder: plan(folder, "nystrom", multiple=1),
    "running": StoredModel,
}


@pytest.mark.parametrize("draws", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("use", USES)
def test_hostile_values_end_in_a_message(use, draws, tmp_path):
    folder = plain_checkpoint.write(tmp_path / "x")
    plain, chance, refused = json.loads((folder / "config.json").read_text()), random.Random(use), 0
    for _ in range(draws):
        changes = {chance.choice(sorted(KINDS)): chance.choice(HOSTILE)}
        if chance.random() < 0.3:
            # The names of experts are those of many architectures.
            changes["model_type"] = chance.choice(sorted(FAMILIES))
        (folder / "config.json").write_text(json.dumps({**plain, **changes}))
        message = ""
        try:
            USES[use](folder)
        except JaxmoeError as error:
            message = str(error)
        assert len(message) < 2500, changes
        assert message == "" or use.startswith("fewer") or str(folder) in message, changes
        refused += message != ""
    assert 0 < refused < draws
