"""What a comparison measures: a cell for every contender, size and seed, and the command that makes it.

A contender is a method, or a chain of methods, with its settings. One with the setting "paper" is given the statistics
only where the published method needs them; "improved" always weighs its errors by them. A size is a removed fraction,
and for methods that remove nothing the number of experts that still run.
"""

import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.families import architecture
from jaxmoe.compression.chain import Chain
from jaxmoe.compression.recipe import check_form
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods import AnyMethod
from jaxmoe.methods.compressed_experts import MainMethod
from jaxmoe.methods.frequency import FREQUENCY
from jaxmoe.methods.method import needs_gradients
from jaxmoe.methods.reap import REAP
from jaxmoe.methods.svd import SVD

Size = Mapping[str, Any]
"""What is asked for: `{"ratio", "of"}` or `{"main_experts"}`."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its settings.

    Args:
        method: from `jaxmoe.methods`, a `Chain` of them, or `compressed_experts.METHOD`.
        settings: an instance of `method.settings`, or `ChainSettings`.

    Example:
        >>> from jaxmoe import methods
        >>> mobe = methods.get("mobe")
        >>> Contender(method=mobe, settings=mobe.settings(setting="paper", steps=20)).changed
        {'steps': 20}
    """

    method: AnyMethod | Chain | MainMethod
    settings: Any

    @property
    def setting(self) -> str:
        return self.settings.setting

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from those of "paper" or "improved" as they come; `step.name` in a chain."""
        if isinstance(self.method, Chain):
            names = [step.name for step in self.method.steps]
            pairs = zip(names, self.settings.steps)
            found = {f"{step}.{name}": value for step, own in pairs for name, value in _changed(own).items()}
            return found | {f"{step}.share": share for step, share in zip(names, self.settings.shares or ())}
        return _changed(self.settings)

    @property
    def calibrated(self) -> bool:
        """Whether it takes the calibration, where there is any."""
        return self.setting == "improved" or bool(self._requires)

    @property
    def wants_gradients(self) -> bool:
        """Whether it needs the Fisher information, or shares its budget better with it."""
        if isinstance(self.method, MainMethod):
            return False
        return needs_gradients(self._requires) or (
            self.setting == "improved" and self.method.allocation == "importance"
        )

    @property
    def _requires(self) -> Mapping[str, str]:
        return {} if isinstance(self.method, MainMethod) else self.method.requires(self.settings)

    @property
    def parts(self) -> tuple[AnyMethod, ...]:
        """The methods behind it that a module registers."""
        if isinstance(self.method, Chain):
            return self.method.steps
        return () if isinstance(self.method, MainMethod) else (self.method,)

    def identity(self) -> dict[str, Any]:
        """Return what tells this contender from all others, as JSON."""
        code = [_code(part) for part in self.parts]
        known = code[0] if len(code) == 1 else (code if any(code) else None)
        return {"method": self.method.name, "settings": asdict(self.settings), "code": known}

    def options(self) -> list[str]:
        """Return what the command line is to be told of it."""
        options = ["--method", self.method.name, "--setting", self.setting]
        return options + [part for name, value in self.changed.items() for part in ("--set", f"{name}={_text(value)}")]


def _changed(settings: Any) -> dict[str, Any]:
    usual = type(settings)(setting=settings.setting)
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compression: a contender at one size from one seed.

    Args:
        contender: the method and its settings.
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
            >>> from jaxmoe import methods
            >>> svd = methods.get("svd")
            >>> size = {"ratio": 0.4, "of": "experts"}
            >>> Cell(contender=Contender(method=svd, settings=svd.settings()), size=size).name
            'svd-improved-0.4-experts-seed0'
        """
        words = (self.contender.method.name, self.contender.setting, *self.size.values())
        return "-".join(map(str, words)) + f"-seed{self.seed}"

    def command(self, source: str, output: Path, options: Sequence[str], revision: str | None = None) -> str:
        """Return the command line that makes the cell.

        Args:
            source: the checkpoint as it was given.
            output: the folder to create.
            options: further ones, such as those that give the method its statistics or texts.
            revision: branch, tag or commit of a hub id.
        """
        outside = dict.fromkeys(filter(None, map(_outside, self.contender.parts)))
        words = ["jaxmoe", *(word for name in outside for word in ("--import", name)), "compress", source, str(output)]
        words += self.contender.options()
        for name, value in self.size.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += [*options, *(["--seed", str(self.seed)] if self.seed else [])]
        return shlex.join(words + (["--revision", revision] if revision else []))


def check_forms(checkpoint: Checkpoint, contenders: Sequence[Contender]) -> None:
    """Raise if the checkpoints of a contender could not be written, so that nothing is calibrated in vain."""
    for contender in contenders:
        if isinstance(contender.method, MainMethod):
            architecture(checkpoint.model_type)
        else:
            check_form(checkpoint, contender.parts[-1])


def with_baselines(contenders: Sequence[Contender], *, calibrated: bool, factored: bool = True) -> list[Contender]:
    """Return the contenders, and before them the cheap methods that every comparison has, unless they are there.

    These are truncated SVD of every expert in the contenders' settings, where factors can be written, and, where there
    are statistics, pruning of experts by frequency and by REAP.
    """
    missing = dict.fromkeys(contender.setting for contender in contenders)
    for contender in contenders:
        if contender.method is SVD:
            missing.pop(contender.setting, None)
    baselines = [Contender(method=SVD, settings=SVD.settings(setting=s)) for s in missing if factored]
    there = {contender.method.name for contender in contenders}
    if calibrated and contenders:
        pruning = (method for method in (FREQUENCY, REAP) if method.name not in there)
        baselines += [Contender(method=method, settings=method.settings()) for method in pruning]
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
    removed: list[Size] = [{"ratio": ratio, "of": of} for ratio in sorted(set(ratios))]
    running: list[Size] = [{"main_experts": count} for count in sorted(set(main_experts), reverse=True)]
    return [
        Cell(contender=contender, size=size, seed=seed)
        for contender in contenders
        for size in (running if isinstance(contender.method, MainMethod) else removed)
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
