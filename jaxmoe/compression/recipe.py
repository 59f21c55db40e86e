"""Recipes: methods one after the other under one budget, such as `reap+mobe`; a single method is a recipe of one step.

What a recipe is to keep is shared in factors: with a kept fraction g of the experts, a step that removes something is
asked to keep g^(s_i / (s_1 + s_2 + ...)) of what it finds, with shares s_i of one (of four where bits are chosen, which
cost least) unless others are given. Whole experts and channels come in coarse pieces, of which the nearest number is
kept; the last step that takes a ratio makes up for that and spends what is left of the budget exactly. Steps that
change what the next one sees are calibrated in between, those that do not share one pass over the layers.
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxmoe import methods
from jaxmoe.checkpoint import Checkpoint, files, hub
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored
from jaxmoe.checkpoint.families import Family
from jaxmoe.compression.budget import Budget
from jaxmoe.compression.factor import Factor
from jaxmoe.compression.fewer_experts import FewerExperts
from jaxmoe.compression.found import Source
from jaxmoe.compression.origin import code_of, made_by, outside
from jaxmoe.compression.prune import Prune
from jaxmoe.compression.quantise import Quantise
from jaxmoe.compression.recover import Recover
from jaxmoe.compression.settings import changed, of_form, split, step_settings
from jaxmoe.compression.step import EXPERTS, Asked, Options, Step
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.packed import PACKED

KINDS: Mapping[str, type[Step]] = {
    "remove": Prune,
    "factor": Factor,
    "quantise": Quantise,
    "skip": FewerExperts,
    "recover": Recover,
}
"""What carries out the methods of each kind."""

PREFIX = "prune:"
"""May stand before a recipe that begins by removing, for the reader."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps in the order in which they run.

    Args:
        steps: methods with their settings.
        setting: "paper" or "improved", the same for all of them.
        shares: how much each step removes beside the others, as an exponent of what the recipe keeps; None for equal
            shares.

    Raises:
        JaxmoeError: the order makes no sense, a step stands twice, or a share is no positive number.

    Example:
        >>> recipe = find("prune:reap+mobe", options={"mobe.steps": 300})
        >>> recipe.name, recipe.sizes, recipe.changed
        ('reap+mobe', ('ratio',), {'mobe.steps': 300})
    """

    steps: tuple[Step, ...]
    setting: str = "improved"
    shares: tuple[float, ...] | None = None

    def __post_init__(self):
        check_order(self.steps)
        shares = self.shares
        if shares is not None and (len(shares) != len(self.steps) or not all(0 < s < math.inf for s in shares)):
            raise JaxmoeError(f"shares {shares} of {len(self.steps)} steps: give each step a positive number")
        for before, step in itertools.pairwise(self.steps):
            if step.takes == "ratio" and before.stores == "factored":
                raise JaxmoeError(
                    f"{self.name}: how large {before.name} may be depends on the bits that its numbers get: name them,"
                    f" as in {self.name.replace(step.name, f'{step.name}4')}"
                )

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return "+".join(step.name for step in self.steps)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plans and reports have them: those of the step, or of each step by its name."""
        if len(self.steps) == 1:
            return asdict(self.steps[0].settings)
        own = {step.name: asdict(step.settings) for step in self.steps}
        for step, share in zip(self.steps, self.shares or ()):
            own[step.name]["share"] = share
        return own

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from those of "paper" or "improved"; `step.name` where there are several steps."""
        if len(self.steps) == 1:
            return changed(self.steps[0].method, self.steps[0].settings)
        found = {
            f"{step.name}.{name}": x for step in self.steps for name, x in changed(step.method, step.settings).items()
        }
        return found | {f"{step.name}.share": share for step, share in zip(self.steps, self.shares or ())}

    @property
    def sizes(self) -> tuple[str, ...]:
        """Which sizes it is asked for: "ratio", "main_experts", both or none."""
        return tuple(dict.fromkeys(step.takes for step in self.steps if step.takes is not None))

    @property
    def requires(self) -> dict[str, str]:
        """The statistics without which some step cannot run, and what the user can do instead."""
        return {name: mend for step in self.steps for name, mend in step.requires.items()}

    @property
    def unit(self) -> dict[str, str]:
        """The unit in which sizes are given, as plans and reports have it, where a step knows no other than bytes."""
        return next(({"unit": step.unit} for step in self.steps if step.unit is not None), {})

    def accepts(self, name: str) -> bool:
        """Tell whether some step takes an option, one of `Options.given`."""
        return any(name in step.accepts for step in self.steps)

    @property
    def needs_gradients(self) -> bool:
        """Whether some step needs the Fisher information, or chooses much better with it."""
        return any(step.needs_gradients for step in self.steps)

    @property
    def calibration(self) -> str:
        """Whether it uses text: "none", "optional" or "required"."""
        own = {step.calibration for step in self.steps}
        return next(kind for kind in ("required", "optional", "none") if kind in own)

    @property
    def allocation(self) -> str:
        """The rule by which its last step that takes a ratio shares the budget where the statistics allow it."""
        return next((step.allocation for step in reversed(self.steps) if step.takes == "ratio"), "uniform")

    def share(self, step: Step) -> float:
        """Return the fraction of the whole removal, in factors, that falls to a step that takes a ratio."""
        pairs = list(zip(self.steps, self.shares or [own.share for own in self.steps]))
        own = next(share for other, share in pairs if other is step)
        return own / sum(share for other, share in pairs if other.takes == "ratio")

    def passes(self, texts: bool) -> list[tuple[Step, ...]]:
        """Return the steps that share a pass over the layers, pass by pass.

        Args:
            texts: whether there are texts to calibrate on.

        Example:
            >>> [[step.name for step in own] for own in find("reap+svd+compressed_experts").passes(texts=False)]
            [['reap'], ['svd', 'compressed_experts']]
        """
        found: list[list[Step]] = []
        for step in self.steps:
            if found and found[-1][-1].hands_on and step.joins(found[-1][-1], texts):
                found[-1].append(step)
            else:
                found.append([step])
        return [tuple(own) for own in found]

    @property
    def _last(self) -> Step:
        """The last step that leaves another form."""
        return next(step for step in reversed(self.steps) if step.stores != "same")

    @property
    def form(self) -> str:
        """The form in which the result is written where none is asked for: "factored" or "slim"."""
        return self._last.stores

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms in which the result can be written, its own first."""
        return self._last.forms(checkpoint)

    def open(
        self, source: str | Path, revision: str | None = None, *, ignore_config_keys: Collection[str] = ()
    ) -> Source:
        """Open a checkpoint to carry the recipe out on: an original, or a factored one where the first step takes it.

        Args:
            source: a folder or a hub id.
            revision: branch, tag or commit of a hub id.
            ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.

        Raises:
            JaxmoeError: it cannot be found, is damaged, or nothing that the recipe works on.
        """
        folder = hub.resolve(source, revision)
        if not self.steps[0].whole and is_factored(files.read_config(folder)):
            return CompressedCheckpoint.open(folder, ignore_config_keys=ignore_config_keys)
        return Checkpoint.open(folder, ignore_config_keys=ignore_config_keys)

    def asked(
        self,
        *,
        ratio: float | None = None,
        of: str = "experts",
        unit: str = "parameters",
        main_experts: int | None = None,
    ) -> Asked:
        """Return the sizes that the recipe is asked for.

        Args:
            ratio: removed fraction, by all steps together.
            of: what it is a fraction of, one of `budget.SCOPES`.
            unit: what is counted, one of `budget.UNITS`.
            main_experts: how many of a token's experts run.

        Raises:
            JaxmoeError: a size is missing, no number for it, or one that no step takes.
        """
        if ratio is not None and "ratio" not in self.sizes:
            other = "; it takes --main-experts" if "main_experts" in self.sizes else ""
            sized = ", ".join(sorted(methods.names("factor") + methods.names("remove")))
            free = ", ".join(name for name in methods.names("quantise") if methods.takes_bits(name))
            bits = f"; without bits in their names, {free} take one" if free else ""
            raise JaxmoeError(
                f"--ratio: {self.name} takes no ratio{other}; methods that store fewer numbers are {sized}{bits}"
            )
        budget = None if ratio is None else Budget(ratio, of, unit)
        if budget is not None and (own := self.unit.get("unit", unit)) != unit:
            raise JaxmoeError(
                f"--unit {unit}: {self.name} holds numbers in fewer bits, of which a ratio of {unit} says nothing; give"
                f" --unit {own}"
            )
        if main_experts is not None and "main_experts" not in self.sizes:
            skipping = ", ".join(methods.names("skip"))
            raise JaxmoeError(f"--main-experts goes with --method {skipping}: give other methods --ratio")
        if ratio is None and "ratio" in self.sizes:
            ratio_of = next(step for step in reversed(self.steps) if step.takes == "ratio")
            mend = (
                "--ratio 0.4" if ratio_of.unit is None else f"--ratio 0.8 --unit bytes, or bits, as in {ratio_of.name}4"
            )
            raise JaxmoeError(f"{self.name}: give the fraction to remove, such as {mend}")
        return Asked(budget, main_experts)

    def check(self, checkpoint: Source, options: Options = Options()) -> None:  # noqa: B008
        """Raise if the recipe cannot be carried out like that on a checkpoint, before anything runs.

        Args:
            checkpoint: the source.
            options: how it is to be carried out.
        """
        if options.texts and self.calibration == "none":
            raise JaxmoeError(f"{self.name}: {self.steps[0].without_text}")
        self._check_targets(checkpoint, options)
        if len(self.passes(options.texts)) > 1:
            self._check_passes(options)
        self._check_taken(options)
        last = self._last
        if options.export in PACKED and self.steps[-1] is not last:
            raise JaxmoeError(
                f"--export {options.export}: {self.steps[-1].name} trains what is stored in the factored form, and"
                " leaves it so; leave it out, or give --export factored"
            )
        if options.export == "slim" and last.stores != "slim":
            raise JaxmoeError(
                f"--export slim: {last.name} removes no experts and no channels; these do:"
                f" {', '.join(methods.names('remove'))}"
            )
        for step in self.steps:
            # Form and rule are those of the last step; the steps before have but one.
            step.check(checkpoint, options if step is last else options._replace(export=None, allocation=None))

    def check_plan(self, checkpoint: Source, options: Options) -> None:
        """Raise if the recipe cannot be planned with such options."""
        if options.statistics and len(self.passes(texts=False)) > 1:
            raise JaxmoeError(f"--statistics: {self.name} does not take that; plan it by its sizes alone")
        self._check_taken(options)
        self._check_targets(checkpoint, options)

    def _check_targets(self, checkpoint: Source, options: Options) -> None:
        if options.targets == EXPERTS:
            return
        sized = [step for step in self.steps if step.takes == "ratio"]
        if len(sized) > 1:
            raise JaxmoeError(
                f"--targets {','.join(options.targets)}: the steps of {self.name} share a budget of the routed experts;"
                " give one of them alone"
            )
        for step in sized or self.steps:
            step.check_targets(checkpoint, options.targets)

    def _check_taken(self, options: Options) -> None:
        if wrong := [f"--{name}" for name in options.given() if not self.accepts(name)]:
            takes = [f"--{size.replace('_', '-')}" for size in self.sizes]
            takes += [] if self.calibration == "none" else ["--text"]
            raise JaxmoeError(f"{', '.join(wrong)}: {self.name} does not take that; it takes {' and '.join(takes)}")

    def _check_passes(self, options: Options) -> None:
        alone = options.statistics and not options.texts
        given = {"--statistics": alone, "--sequential": options.sequential, "--layers": options.layers is not None}
        if wrong := [name for name, value in given.items() if value]:
            raise JaxmoeError(
                f"{', '.join(wrong)}: {self.name} does not take that; it calibrates every step on what that finds:"
                " give --text"
            )
        if self.calibration == "required" and not options.texts:
            raise JaxmoeError(f"{self.name}: every step is calibrated on what it finds; give --text")

    def identity(self) -> dict[str, Any]:
        """Return what tells this recipe from all others, as JSON; of methods from outside their code, too."""
        code = [code_of(step.method) for step in self.steps]
        known = code[0] if len(code) == 1 else (code if any(code) else None)
        return {"method": self.name, "settings": {"setting": self.setting, **self.settings}, "code": known}

    def imports(self, family: Family | None = None) -> list[str]:
        """Return what `--import` takes for the methods, and a model's architecture, that do not come with jaxmoe."""
        made = [made_by(step.method) for step in self.steps]
        made += [family.decoder] if family is not None and family.decoder is not None else []
        return list(dict.fromkeys(found for function in made if (found := outside(function)) is not None))


def find(
    name: str, *, setting: str = "improved", options: Mapping[str, Any] | None = None, export: str | None = None
) -> Recipe:
    """Return the recipe that a name spells.

    Args:
        name: of a method, or of several with `+` between them.
        setting: "paper" or "improved".
        options: settings by name, or by `STEP.NAME` where there are several steps; `STEP.share` says how much of the
            removal falls to a step. Values may be text.
        export: the form of the result; a packed one takes no zeros, plain scales and one width for the model or each
            layer, which are then the defaults of quantising steps.

    Raises:
        JaxmoeError: a step or a setting is unknown, or the order makes no sense; the message names orders that do.

    Example:
        >>> find("svd+reap")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: svd+reap: svd stores factors, on which reap cannot work; the order is reap+svd
    """
    found = [methods.get(part) for part in name.removeprefix(PREFIX).split("+")]
    check_order([KINDS[method.kind](method=method, settings=None) for method in found])
    names = [method.name for method in found]
    own, shares = split(names, options or {})
    steps: list[Step] = []
    for named, given in zip(found, own):
        method, asked = of_form(named, export)
        steps.append(KINDS[method.kind](method=method, settings=step_settings(method, setting, {**asked, **given})))
    parts = tuple(shares.get(step.name, step.share) for step in steps) if shares else None
    return Recipe(steps=tuple(steps), setting=setting, shares=parts)


def check_order(steps: Collection[Step]) -> None:
    """Raise unless steps make sense in their order; the message names the step and orders that do."""
    names = [step.name for step in steps]
    if not (problem := _problem(steps)):
        return
    unique = list({step.name: step for step in steps}.values())
    # The usual order first; of many others a few are enough.
    usual = sorted(unique, key=lambda step: step.stage)
    orders = dict.fromkeys(
        "+".join(step.name for step in order)
        for order in (usual, *itertools.islice(itertools.permutations(usual), 720))
        if not _problem(order)
    )
    known = list(orders)[:3]
    mend = f"; the order is {' or '.join(known)}" if known else ""
    raise JaxmoeError(f"{'+'.join(names)}: {problem}{mend}")


def _problem(steps: Collection[Step]) -> str | None:
    """Return why steps make no sense in their order, None where they do."""
    before: list[Step] = []
    for step in steps:
        if any(step.name == other.name for other in before):
            return f"{step.name} stands twice, where once at a larger share does the same"
        factored = next((other.name for other in before if other.stores == "factored"), None)
        if step.whole and factored is not None:
            return f"{factored} stores factors, on which {step.name} cannot work"
        if step.once and (same := next((other.name for other in before if other.stage == step.stage), None)):
            return f"{step.name} does again what {same} does: give one of them"
        if step.stores == "same" and not before:
            return f"{step.name} trains what steps before it stored, and there is none"
        before.append(step)
    return None
