"""What a comparison measures: a cell for every recipe, size and seed, the command that makes it, and making it.

A size is what a recipe is asked for: a removed fraction, for methods that remove nothing the number of experts that
still run, both, or nothing where the recipe alone says how large the result is, as `gptq4` does.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.families import Family
from jaxmoe.compression import engine
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.step import EXPERTS, Options, Texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import OnEvent
from jaxmoe.report.records import Report

Size = Mapping[str, Any]
"""What is asked for: `ratio`, `of` and `unit`, `main_experts`, both, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compression: a recipe at one size from one seed.

    Args:
        recipe: what runs.
        size: what is asked for.
        targets: what is replaced.
        seed: the random seed.
    """

    recipe: Recipe
    size: Size
    targets: tuple[str, ...] = EXPERTS
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that a folder can have; cells that differ in further settings alone share it.

        Example:
            >>> from jaxmoe.compression.recipe import find
            >>> Cell(recipe=find("svd"), size={"ratio": 0.4, "of": "experts"}).name
            'svd-improved-0.4-experts-seed0'
        """
        targets = () if self.targets == EXPERTS else self.targets
        words = (self.recipe.name, self.recipe.setting, *self.size.values(), *targets)
        return "-".join(map(str, words)) + f"-seed{self.seed}"

    def decided(self) -> dict[str, Any]:
        """Return what tells this cell from all others of the same context, as JSON."""
        targets = {} if self.targets == EXPERTS else {"targets": list(self.targets)}
        return {**self.recipe.identity(), **self.size, **targets, "seed": self.seed}

    def command(
        self,
        source: str,
        output: Path,
        options: Sequence[str],
        revision: str | None = None,
        family: Family | None = None,
    ) -> str:
        """Return the command line that makes the cell.

        Args:
            source: the checkpoint as it was given.
            output: the folder to create.
            options: further ones, such as those that give the method its statistics or texts.
            revision: branch, tag or commit of a hub id.
            family: the source's architecture, None where it is not known.
        """
        words = ["jaxmoe", *(word for name in self.recipe.imports(family) for word in ("--import", name))]
        words += ["compress", source, str(output), *recipe_options(self.recipe)]
        for name, value in self.size.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += [] if self.targets == EXPERTS else ["--targets", ",".join(self.targets)]
        words += [*options, *(["--seed", str(self.seed)] if self.seed else [])]
        return shlex.join(words + (["--revision", revision] if revision else []))


def recipe_options(recipe: Recipe) -> list[str]:
    """Return what the command line is to be told of a recipe.

    Example:
        >>> from jaxmoe.compression.recipe import find
        >>> recipe_options(find("mobe", setting="paper", options={"steps": 20}))
        ['--method', 'mobe', '--setting', 'paper', '--set', 'steps=20']
    """
    given = [f"{name}={_text(value)}" for name, value in recipe.changed.items()]
    return ["--method", recipe.name, "--setting", recipe.setting, *(word for own in given for word in ("--set", own))]


def cells(
    recipes: Sequence[Recipe],
    ratios: Sequence[float],
    *,
    of: str = "experts",
    unit: str = "bytes",
    main_experts: Sequence[int] = (),
    targets: tuple[str, ...] = EXPERTS,
    seeds: int = 1,
) -> list[Cell]:
    """Return all cells: recipes, for each the sizes in ascending order, for each the seeds from 0.

    Args:
        recipes: what is compared.
        ratios: removed fractions.
        of: what they are fractions of.
        unit: what is counted, "parameters" or "bytes".
        main_experts: how many experts run, for methods that remove nothing.
        targets: what is replaced.
        seeds: of every recipe and size.

    Raises:
        JaxmoeError: there is nothing to compare, a ratio is no fraction, or there are no seeds.
    """
    if not recipes:
        raise JaxmoeError("no methods to compare: name at least one, such as svd")
    if not ratios:
        raise JaxmoeError("no ratios to compare at: give removed fractions such as 0.2,0.4")
    if wrong := [ratio for ratio in ratios if not 0 < ratio < 1]:
        listed = ", ".join(f"{ratio:g}" for ratio in wrong)
        raise JaxmoeError(f"ratios {listed} are no removed fractions: give numbers between 0 and 1, such as 0.4")
    if seeds < 1:
        raise JaxmoeError(f"{seeds} seeds: give at least 1")
    counted = {} if unit == "parameters" else {"unit": unit}
    sizes: dict[str, list[Size]] = {
        "ratio": [{"ratio": ratio, "of": of, **counted} for ratio in sorted(set(ratios))],
        "main_experts": [{"main_experts": count} for count in sorted(set(main_experts), reverse=True)],
    }

    def asked(recipe: Recipe) -> list[Size]:
        found: list[Size] = [{}]
        for name in recipe.sizes:
            found = [{**one, **other} for one in found for other in sizes[name]]
        return found

    return [
        Cell(recipe=recipe, size=size, targets=targets, seed=seed)
        for recipe in recipes
        for size in asked(recipe)
        for seed in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a cell is given of the common calibration: what a single run would be given, which ends with the same bytes.

    Args:
        statistics: of the source, None without.
        texts: behind them, for recipes that calibrate their steps or learn from text themselves.
        gradients: whether and how their calibration keeps the Fisher information.
    """

    statistics: Statistics | None = None
    texts: Texts | None = None
    gradients: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, statistics: Statistics, texts: Texts, *, gradients: bool) -> "Calibration":
        """Return what a recipe is given of statistics and the texts behind them."""
        reads = recipe.accepts("statistics")
        if reads and len(recipe.steps) == 1:
            return cls(statistics=statistics)
        return cls(
            statistics=statistics if reads else None, texts=texts, gradients="sequence" if gradients and reads else None
        )

    def options(self) -> list[str]:
        """Return what the command line is to be told of it."""
        if self.texts is None:
            return [] if self.statistics is None else ["--statistics", str(self.statistics.folder)]
        words = [word for path in self.texts.paths for word in ("--text", str(path))]
        words += ["--sequences", str(self.texts.sequences)] if self.texts.sequences is not None else []
        words += ["--length", str(self.texts.length)]
        return [*words, *(["--gradients", self.gradients] if self.gradients is not None else [])]


def make(
    cell: Cell, checkpoint: Checkpoint, output: Path, calibration: Calibration, *, command: str, on_event: OnEvent
) -> Report:
    """Write the checkpoint of a cell.

    Args:
        cell: what to make.
        checkpoint: the source.
        output: the folder to create.
        calibration: from `Calibration.of`.
        command: that makes the same.
        on_event: called after every step.

    Raises:
        JaxmoeError: the size cannot be reached, the calibration is missing, or the run fails.
    """
    return engine.compress(
        checkpoint,
        output,
        cell.recipe,
        cell.recipe.asked(**cell.size),
        options=Options(gradients=calibration.gradients, targets=cell.targets),
        texts=calibration.texts,
        statistics=calibration.statistics,
        seed=cell.seed,
        command=command,
        on_event=on_event,
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
