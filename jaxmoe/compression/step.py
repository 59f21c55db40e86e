"""What every step of a recipe has in common, whatever its kind: what it needs, where it may stand, how it works.

A step is a method with its settings. Planned on what it finds, it knows the size of everything it will store; carried
out, it takes the layers of a pass one after the other, as the step before it leaves them, and hands them on.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxmoe import methods
from jaxmoe.compression.budget import NOTHING, Budget, Sizes
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Count, Term
from jaxmoe.methods.method import needs_gradients
from jaxmoe.texts import Windows


class Texts(NamedTuple):
    """The texts of a calibration, as they were given and as they were cut.

    Args:
        paths: as given.
        sequences: windows of each, None for all.
        length: tokens in a window.
        windows: the windows.
        tokenizer: fingerprint of what cut them.
    """

    paths: Sequence[str | Path]
    sequences: int | None
    length: int
    windows: Sequence[Windows]
    tokenizer: str | None


class Asked(NamedTuple):
    """The sizes that a recipe is asked for; None where it takes no such size.

    Args:
        budget: what is removed.
        main_experts: how many of a token's experts run.
    """

    budget: Budget | None = None
    main_experts: int | None = None


EXPERTS = ("experts",)
"""The targets of every step that is told no others."""


class Options(NamedTuple):
    """How a recipe is to be carried out, beside its sizes: what some steps refuse.

    Args:
        export: form of the result; None for the recipe's own.
        layers: `(first, end)`, to work on these layers alone.
        sequential: whether each layer is calibrated behind the compressed ones.
        allocation: rule by which the budget is shared; None for the method's own.
        targets: what factors replace: "experts", and of the linear maps beside them `model.roles.LINEAR_TARGETS`.
        gradients: whether and how the calibration keeps the Fisher information; None for what is needed.
        texts: whether there are texts to calibrate on.
        statistics: whether there are statistics.
    """

    export: str | None = None
    layers: tuple[int, int] | None = None
    sequential: bool = False
    allocation: str | None = None
    targets: tuple[str, ...] = EXPERTS
    gradients: str | None = None
    texts: bool = False
    statistics: bool = False

    def given(self) -> list[str]:
        """Return the names of what not every step takes and was given.

        Example:
            >>> Options(layers=(0, 2), statistics=True).given()
            ['layers', 'statistics']
        """
        names = ("layers", "sequential", "allocation", "gradients", "statistics")
        return [name for name in names if getattr(self, name) not in (None, False)]


class Setup(NamedTuple):
    """What a pass is carried out with, beside its steps.

    Args:
        export: form of the result; None for the steps' own.
        seed: the random seed.
        statistics: calibrated on the model that it finds, None without.
        texts: to learn from, None without.
        teacher: folder of the model that the recipe began with.
    """

    export: str | None = None
    seed: int = 0
    statistics: Sums | None = None
    texts: Texts | None = None
    teacher: Path | None = None


class Context(NamedTuple):
    """What the steps of a pass work with.

    Args:
        found: the model that the pass finds.
        setup: what it is carried out with.
        journal: folder for what a step keeps while it works; it goes when the output is published.
    """

    found: Found
    setup: Setup
    journal: Path


@runtime_checkable
class Planned(Protocol):
    """A step that works on the layers of a pass, planned: what it will store, and how it comes about."""

    @property
    def after(self) -> Found:
        """The model that it leaves."""
        ...

    @property
    def peak_bytes(self) -> int | None:
        """Predicted peak of memory beyond that of the idle program; None where nothing predicts it."""
        ...

    def facts(self, index: int) -> dict[str, Any]:
        """Return what plans and reports say of a layer beside what it stores, as JSON."""
        ...

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read.

        Args:
            sizes: of all three scopes, as planned or as they came true.
        """
        ...

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the bytes of its result, as JSON, beside what all steps share."""
        ...

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return what the report says of the text that it learns from, None where it is not the statistics' text."""
        ...

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Work on layers in their order, each as the step before leaves it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """A method with its settings.

    Args:
        method: its record in `jaxmoe.methods`.
        settings: an instance of `method.settings`.
    """

    method: Any
    settings: Any

    stage: ClassVar[int]
    """Where its kind stands in the usual order: remove, factor, quantise, skip, recover."""
    whole: ClassVar[bool] = False
    """Whether it works on whole matrices alone, not on what another step stored in their place."""
    stores: ClassVar[str] = "factored"
    """The form in which it leaves the model: "factored", "slim" (fewer or smaller experts), or "same"."""
    accepts: ClassVar[frozenset[str]] = frozenset()
    """Names of the `Options.given` that it takes."""
    without_text: ClassVar[str] = "it does not learn from text"
    """Why it takes none, where its calibration is "none"."""
    once: ClassVar[bool] = False
    """Whether one step of its kind is all that makes sense."""
    share: ClassVar[float] = 1.0
    """How much of a budget falls to it beside other steps, unless a recipe says otherwise, see `recipe`."""
    unit: ClassVar[str | None] = None
    """The only unit in which a ratio says something of what it leaves; None for any."""
    hands_on: ClassVar[bool] = False
    """Whether a step after it may work on its layers in the same pass."""

    @property
    def name(self) -> str:
        """That of the method."""
        return self.method.name

    @property
    def takes(self) -> str | None:
        """The size that it is asked for: "ratio", "main_experts", or none."""
        return None

    @property
    def requires(self) -> Mapping[str, str]:
        """The statistics without which it cannot run, and what the user can do instead."""
        return self.method.requires(self.settings)

    @property
    def needs_gradients(self) -> bool:
        """Whether it cannot do without the Fisher information, or not well."""
        return needs_gradients(self.requires)

    @property
    def calibration(self) -> str:
        """Whether it uses text: "none", "optional" or "required"."""
        return "required" if self.requires else "optional"

    @property
    def allocation(self) -> str:
        """The rule by which it shares its budget where the statistics allow it."""
        return "uniform"

    def joins(self, before: "Step", texts: bool) -> bool:
        """Tell whether it works in the same pass as the step before it: where it needs no calibration in between.

        Args:
            before: that step.
            texts: whether there are texts to calibrate on.
        """
        return False

    @abstractmethod
    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms in which a recipe that ends with it can be written, its own first."""
        ...

    @abstractmethod
    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if it cannot be carried out like that on a checkpoint, before anything runs."""
        ...

    def check_targets(self, checkpoint: Source, targets: tuple[str, ...]) -> None:
        """Raise if it cannot replace anything but routed experts, or the checkpoint has nothing of a target.

        Args:
            checkpoint: the source.
            targets: others than the routed experts alone.
        """
        able = ", ".join(methods.of_linear_maps())
        raise JaxmoeError(f"--targets {','.join(targets)}: {self.name} works on the experts alone; others take {able}")

    def terms(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return what becomes of the abstract terms of a target."""
        return terms

    def adds(self, found: Found) -> Count:
        """Count what it stores beside the terms."""
        return NOTHING

    @abstractmethod
    def plan(
        self,
        found: Found,
        asked: Asked,
        *,
        options: Options,
        statistics: Sums | None,
        weighted: bool,
        then: Sequence["Step"],
        nearest: bool = False,
        measure: bool = True,
    ) -> Any:
        """Plan the step.

        Args:
            found: the model that it works on.
            asked: the sizes that fall to it.
            options: how it is to be carried out.
            statistics: of that model, None where there are none (yet).
            weighted: whether there will be some.
            then: the steps after it, which decide what its terms take in the end.
            nearest: whether it may remove a little less where that is closer, since a later step makes up for it.
            measure: whether what sizes cost may be measured on the model's values; without these, sizes alone count.
        """
        ...

    @abstractmethod
    def begin(self, planned: Sequence[Any], found: Found, setup: Setup) -> Any:
        """Return the pass that this step begins.

        Args:
            planned: the step and those that join it, planned.
            found: the model that it finds.
            setup: what it is carried out with.
        """
        ...


def behind(then: Sequence[Step], terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Return what becomes of the abstract terms of a target in the steps that follow."""
    for step in then:
        terms = step.terms(terms)
    return terms
