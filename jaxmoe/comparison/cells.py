"""What a comparison measures: a cell for every contender, ratio and seed, and the command that makes it.

A contender is a method with its settings. One with the setting "paper" is given the statistics only where the published
method needs them; "improved" always weighs its errors by them.
"""

import inspect
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods import AnyMethod
from jaxmoe.methods.frequency import FREQUENCY
from jaxmoe.methods.reap import REAP
from jaxmoe.methods.svd import SVD


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its settings.

    Args:
        method: from `jaxmoe.methods`.
        settings: an instance of `method.settings`.

    Example:
        >>> from jaxmoe import methods
        >>> mobe = methods.get("mobe")
        >>> Contender(method=mobe, settings=mobe.settings(setting="paper", steps=20)).changed
        {'steps': 20}
    """

    method: AnyMethod
    settings: Any

    @property
    def setting(self) -> str:
        return self.settings.setting

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from those of "paper" or "improved" as they come."""
        usual = type(self.settings)(setting=self.setting)
        values = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        return {name: value for name, value in values.items() if value != getattr(usual, name)}

    @property
    def calibrated(self) -> bool:
        """Whether it takes the statistics, where there are any."""
        return self.setting == "improved" or bool(self.method.requires(self.settings))

    @property
    def wants_gradients(self) -> bool:
        """Whether it needs the Fisher information, or shares its budget better with it."""
        needs = any(name.startswith("fisher") for name in self.method.requires(self.settings))
        return needs or (self.setting == "improved" and self.method.allocation == "importance")

    def identity(self) -> dict[str, Any]:
        """Return what tells this contender from all others, as JSON."""
        return {"method": self.method.name, "settings": asdict(self.settings), "code": _code(self.method)}

    def options(self) -> list[str]:
        """Return what the command line is to be told of it."""
        options = ["--method", self.method.name, "--setting", self.setting]
        return options + [part for name, value in self.changed.items() for part in ("--set", f"{name}={_text(value)}")]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compression: a contender at one size from one seed.

    Args:
        contender: the method and its settings.
        ratio: removed fraction, between 0 and 1.
        of: what the ratio is a fraction of.
        seed: of everything random.
    """

    contender: Contender
    ratio: float
    of: str = "experts"
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that a folder can have; cells that differ in further settings alone share it.

        Example:
            >>> from jaxmoe import methods
            >>> svd = methods.get("svd")
            >>> Cell(contender=Contender(method=svd, settings=svd.settings()), ratio=0.4).name
            'svd-improved-0.4-experts-seed0'
        """
        method = self.contender.method.name
        return f"{method}-{self.contender.setting}-{self.ratio}-{self.of}-seed{self.seed}"

    def command(self, source: str, output: Path, statistics: Path | None, revision: str | None = None) -> str:
        """Return the command line that makes the cell.

        Args:
            source: the checkpoint as it was given.
            output: the folder to create.
            statistics: the folder of the statistics, None without.
            revision: branch, tag or commit of a hub id.
        """
        outside = _outside(self.contender.method)
        words = ["jaxmoe", *(["--import", outside] if outside else []), "compress", source, str(output)]
        words += [*self.contender.options(), "--ratio", str(self.ratio), "--of", self.of]
        words += ["--statistics", str(statistics)] if statistics is not None else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return shlex.join(words + (["--revision", revision] if revision else []))


def with_baselines(contenders: Sequence[Contender], *, calibrated: bool) -> list[Contender]:
    """Return the contenders, and before them the cheap methods that every comparison has, unless they are there.

    These are truncated SVD of every expert in the contenders' settings and, where there are statistics, pruning of
    experts by frequency and by REAP.
    """
    missing = dict.fromkeys(contender.setting for contender in contenders)
    for contender in contenders:
        if contender.method is SVD:
            missing.pop(contender.setting, None)
    baselines = [Contender(method=SVD, settings=SVD.settings(setting=s)) for s in missing]
    there = {contender.method.name for contender in contenders}
    if calibrated and contenders:
        pruning = (method for method in (FREQUENCY, REAP) if method.name not in there)
        baselines += [Contender(method=method, settings=method.settings()) for method in pruning]
    return [*baselines, *contenders]


def cells(contenders: Sequence[Contender], ratios: Sequence[float], *, of: str = "experts", seeds: int = 1):
    """Return all cells: contenders, for each the ratios in ascending order, for each the seeds from 0.

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
    return [
        Cell(contender=contender, ratio=ratio, of=of, seed=seed)
        for contender in contenders
        for ratio in sorted(set(ratios))
        for seed in range(seeds)
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _outside(method: AnyMethod) -> str | None:
    """Return what `--import` takes for a method that does not come with jaxmoe, None for one that does."""
    module = inspect.getmodule(method.fit)
    name = "__main__" if module is None else module.__name__
    top = name.split(".")[0]
    if module is None or top in ("jaxmoe", "__main__"):
        return None
    # A file that was imported by its path is not found by its name.
    return name if PathFinder.find_spec(top) is not None else str(module.__file__)


def _code(method: AnyMethod) -> str | None:
    """Return a SHA-256 of the source of a method that does not come with jaxmoe, so that a changed one is new."""
    module = inspect.getmodule(method.fit)
    if module is not None and module.__name__.split(".")[0] == "jaxmoe":
        return None
    try:
        source = inspect.getsource(method.fit if module is None or module.__name__ == "__main__" else module)
    except (OSError, TypeError):
        return None
    return sha256(source.encode()).hexdigest()
