"""What a comparison measures: a cell for every contender, size and seed, and the command that makes it.

A contender is a recipe with its settings. One with the setting "paper" is given the statistics
only where the published method needs them; "improved" always weighs its errors by them. A size is a removed fraction,
and for methods that remove nothing the number of experts that still run.
"""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.compression.recipe import Recipe, find
from jaxmoe.compression.step import Options
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.frequency import FREQUENCY
from jaxmoe.methods.reap import REAP
from jaxmoe.methods.svd import SVD

Size = Mapping[str, Any]
"""What is asked for: `{"ratio", "of"}` or `{"main_experts"}`."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A recipe with its settings.

    Args:
        recipe: from `compression.recipe.find`.

    Example:
        >>> Contender(recipe=find("mobe", setting="paper", options={"steps": 20})).changed
        {'steps': 20}
    """

    recipe: Recipe

    @property
    def name(self) -> str:
        """That of the recipe."""
        return self.recipe.name

    @property
    def setting(self) -> str:
        """ "paper" or "improved"."""
        return self.recipe.setting

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from those of "paper" or "improved"; `step.name` where there are several steps."""
        return self.recipe.changed

    @property
    def calibrated(self) -> bool:
        """Whether it takes the calibration, where there is any."""
        need = self.recipe.calibration
        return need == "required" or (need == "optional" and self.setting == "improved")

    @property
    def learns_from_text(self) -> bool:
        """Whether it takes the texts of the calibration, not only the statistics of the source."""
        return len(self.recipe.passes(texts=True)) > 1 or not self.recipe.accepts("statistics")

    @property
    def wants_gradients(self) -> bool:
        """Whether it needs the Fisher information, or shares its budget better with it."""
        return self.recipe.needs_gradients or (self.setting == "improved" and self.recipe.allocation == "importance")

    def options(self) -> list[str]:
        """Return what the command line is to be told of it."""
        options = ["--method", self.name, "--setting", self.setting]
        return options + [part for name, value in self.changed.items() for part in ("--set", f"{name}={_text(value)}")]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compression: a contender at one size from one seed.

    Args:
        contender: the recipe and its settings.
        size: what is asked for.
        seed: of everything random.
    """

    contender: Contender
    size: Size
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that a folder can have; cells that differ in further settings alone share it.

        Example:
            >>> Cell(contender=Contender(recipe=find("svd")), size={"ratio": 0.4, "of": "experts"}).name
            'svd-improved-0.4-experts-seed0'
        """
        words = (self.contender.name, self.contender.setting, *self.size.values())
        return "-".join(map(str, words)) + f"-seed{self.seed}"

    def command(self, source: str, output: Path, options: Sequence[str], revision: str | None = None) -> str:
        """Return the command line that makes the cell.

        Args:
            source: the checkpoint as it was given.
            output: the folder to create.
            options: further ones, such as those that give the method its statistics or texts.
            revision: branch, tag or commit of a hub id.
        """
        outside = self.contender.recipe.imports()
        words = ["jaxmoe", *(word for name in outside for word in ("--import", name)), "compress", source, str(output)]
        words += self.contender.options()
        for name, value in self.size.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += [*options, *(["--seed", str(self.seed)] if self.seed else [])]
        return shlex.join(words + (["--revision", revision] if revision else []))


def check_forms(checkpoint: Checkpoint, contenders: Sequence[Contender]) -> None:
    """Raise if the checkpoints of a contender could not be written, before calibration starts."""
    for contender in contenders:
        for step in contender.recipe.steps:
            step.check(checkpoint, Options(texts=True))


def with_baselines(contenders: Sequence[Contender], *, calibrated: bool, factored: bool = True) -> list[Contender]:
    """Return the contenders, and before them the cheap methods that every comparison has, unless they are there.

    These are truncated SVD of every expert in the contenders' settings, where factors can be written, and, where there
    are statistics, pruning of experts by frequency and by REAP.
    """
    settings = list(dict.fromkeys(contender.setting for contender in contenders))
    there = {(contender.name, contender.setting) for contender in contenders}
    svd = [Contender(recipe=find(SVD.name, setting=setting)) for setting in settings if factored]
    baselines = [own for own in svd if (own.name, own.setting) not in there]
    if calibrated and contenders:
        named = {name for name, _ in there}
        baselines += [Contender(recipe=find(own.name)) for own in (FREQUENCY, REAP) if own.name not in named]
    return [*baselines, *contenders]


def cells(
    contenders: Sequence[Contender],
    ratios: Sequence[float],
    *,
    of: str = "experts",
    main_experts: Sequence[int] = (),
    seeds: int = 1,
) -> list[Cell]:
    """Return all cells: contenders, for each the sizes in ascending order, for each the seeds from 0.

    Args:
        contenders: what is compared.
        ratios: removed fractions.
        of: what they are fractions of.
        main_experts: how many experts run, for methods that remove nothing.
        seeds: of every contender and size.

    Raises:
        JaxmoeError: there is nothing to compare, a ratio is no fraction, or there are no seeds.
    """
    if not contenders:
        raise JaxmoeError("no methods to compare: name at least one, such as svd")
    if not ratios:
        raise JaxmoeError("no ratios to compare at: give removed fractions such as 0.2,0.4")
    if wrong := [ratio for ratio in ratios if not 0 < ratio < 1]:
        listed = ", ".join(f"{ratio:g}" for ratio in wrong)
        raise JaxmoeError(f"ratios {listed} are no removed fractions: give numbers between 0 and 1, such as 0.4")
    if seeds < 1:
        raise JaxmoeError(f"{seeds} seeds: give at least 1")
    sizes: dict[str, list[Size]] = {
        "ratio": [{"ratio": ratio, "of": of} for ratio in sorted(set(ratios))],
        "main_experts": [{"main_experts": count} for count in sorted(set(main_experts), reverse=True)],
    }
    return [
        Cell(contender=contender, size={name: x for part in parts for name, x in part.items()}, seed=seed)
        for contender in contenders
        for parts in itertools.product(*(sizes[name] for name in contender.recipe.sizes))
        for seed in range(seeds)
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
