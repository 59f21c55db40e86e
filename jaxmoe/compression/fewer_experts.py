"""Skipping experts: fewer of a token's experts run, and small vectors compensate for the others.

Without text the vectors are ones. With text, the hidden states of the model walk through its layers, and each layer's
vectors learn from what its experts read and gave there. A run that is killed resumes at the layer where it stopped, and
ends with the same bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from jaxmoe.calibration.collect import make_record
from jaxmoe.calibration.record import Record
from jaxmoe.checkpoint.families import decoder_config, decoder_spec
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.expert_vectors import distil, importance, observe
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.compression.step import Asked, Context, Options, Step, Texts
from jaxmoe.compression.term_pass import TermStep, check_factored
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Count
from jaxmoe.methods.method import Outcome
from jaxmoe.model.compressed_experts import MainExperts, main_experts, ones
from jaxmoe.model.spec import DecoderSpec, ExpertBlock
from jaxmoe.model.work import Activity, activity
from jaxmoe.streaming import HiddenStates, Prefetched, run_layer, start


@dataclass(frozen=True, kw_only=True)
class FewerExperts(TermStep):
    """A step that runs fewer experts for every token."""

    stage: ClassVar[int] = 3
    once: ClassVar[bool] = True
    without_text: ClassVar[str] = (
        "published Compressed Experts learn with the whole model: write them without text, then `jaxmoe recover` trains"
        " them; or give --setting improved, which learns from text layer by layer"
    )

    @property
    def takes(self) -> str:
        """How many of a token's experts run."""
        return "main_experts"

    @property
    def calibration(self) -> str:
        """Only the improved setting learns from text here."""
        return "none" if self.settings.setting == "paper" else "optional"

    def joins(self, before: Step, texts: bool) -> bool:
        """Where there is no text to learn from, in the pass of the step before."""
        return not texts or self.calibration == "none"

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the one form that has a place for the vectors."""
        return ["factored"]

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if the vectors could not be written."""
        if options.export not in (None, "factored"):
            raise JaxmoeError(f"--export {options.export}: {self.name} has vectors, which only a factored form holds")
        check_factored(checkpoint, "factored")

    def adds(self, found: Found) -> Count:
        """Count the vectors."""
        return found.vectors()

    def plan(self, found: Found, asked: Asked, **_: Any) -> "PlannedFewerExperts":
        """Plan that so many experts of a token run.

        Raises:
            JaxmoeError: the number is out of range, vectors compensate for experts already, or jaxmoe cannot run the
                model or write it with factors.
        """
        found.model()
        check_factored(found.checkpoint, "factored")
        if found.main is not None:
            raise JaxmoeError(
                f"{found.checkpoint.folder}: vectors compensate for experts already, and only {found.main.count} run:"
                " give the checkpoint that this one was made of"
            )
        spec = decoder_spec(
            decoder_config(found.checkpoint.dense_config()),
            {index: layer.sizes for index, layer in found.layers.items()},
            found.checkpoint.ignored,
        )
        if asked.main_experts is None:
            choices = _choices(spec)
            raise JaxmoeError(f"{self.name}: give --main-experts, 1 to {choices - 1} of the {choices} of a token")
        main = MainExperts(asked.main_experts, self.settings.renorm)
        fewer = main_experts(spec, dict.fromkeys(found.layers, main))
        return PlannedFewerExperts(step=self, found=found, main=main, whole=spec, fewer=fewer)


@dataclass(frozen=True, kw_only=True)
class PlannedFewerExperts:
    """A model of which only the main experts of a token are to run.

    Args:
        step: what is planned.
        found: the model.
        main: how many run.
        whole: what the model computes with all chosen experts.
        fewer: what it will compute.
    """

    step: FewerExperts
    found: Found = field(repr=False)
    main: MainExperts
    whole: DecoderSpec = field(repr=False)
    fewer: DecoderSpec = field(repr=False)

    @property
    def after(self) -> Found:
        """The model with vectors."""
        return replace(self.found, main=self.main)

    @property
    def peak_bytes(self) -> None:
        """Unknown: examples lie in files, and a batch is small."""

    def work(self) -> tuple[Activity, Activity]:
        """Return stored and active numbers and operations, before and after."""
        rest = self.found.after()
        other = rest.model.numbers - rest.experts.numbers
        before, after = (
            activity(other, [(block, self.found.layers[index]) for index, block in blocks(spec)])
            for spec in (self.whole, self.fewer)
        )
        return before, after

    def facts(self, index: int) -> dict[str, Any]:
        """Return nothing before it has learned."""
        return {}

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        before, after = self.work()
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": self.main.as_json(),
            "experts_per_token": {"before": _choices(self.whole), "after": self.main.count},
            "achieved": sizes.removed(),
            **sizes.model(),
            "active_parameters": {"before": before.active, "after": after.active},
            "operations_per_token": {"before": before.operations, "after": after.operations},
        }

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the vectors."""
        record = self._record(context)
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": self.main.as_json(),
            "texts": None if record is None else fingerprint(record.as_json()),
        }

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return the text that the vectors learn from."""
        record = self._record(context)
        return None if record is None else {"sequential": False, **record.describe()}

    def _texts(self, context: Context) -> Texts | None:
        """Return the texts that the vectors learn from."""
        return None if self.step.calibration == "none" else context.setup.texts

    def _record(self, context: Context) -> Record | None:
        texts = self._texts(context)
        if texts is None:
            return None
        return make_record(self.found.model(), texts.windows, texts.tokenizer, moments="none")

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Give every layer its vectors."""
        texts = self._texts(context)
        if texts is None:
            return (replace(layer, vectors=ones(self.found.layers[layer.index].sizes)) for layer in layers)
        return self._learned(list(layers), texts, context)

    def _learned(self, layers: list[Layer], texts: Texts, context: Context) -> Iterator[Layer]:
        """Walk the texts' hidden states through the model, and let the vectors of every layer learn."""
        if not layers:
            return
        model, wanted = self.found.model(), {layer.index: layer for layer in layers}
        ids, counted = (np.concatenate([getattr(text, name) for text in texts.windows]) for name in ("ids", "counted"))
        states = HiddenStates(ids, context.journal / "states", model.spec.hidden)
        begin, last = min(wanted), max(wanted)
        first = next((index for index in range(begin, -1, -1) if states.whole(index)), None)
        if first is None:
            first = 0
            start(model, states)
        for index, parameters in Prefetched(model, range(first, last + 1)):
            out = None if index == last else states.create(index + 1)
            spec = model.spec.layers[index]
            examples = None
            if index in self.found.layers:
                # Also where nothing is missing: another program might round the states differently.
                examples = observe(index, parameters, spec, states, out, counted)
            else:
                for _ in run_layer(index, parameters, spec, states, out):
                    pass
            if out is not None:
                states.finish(index + 1)
            if examples is not None and index in wanted:
                yield self._learn(wanted[index], parameters, examples, context.setup.seed)
            states.remove(index)

    def _learn(self, layer: Layer, parameters: dict[str, Any], examples, seed: int) -> Layer:
        block = self.fewer.layers[layer.index].feed_forward
        assert isinstance(block, ExpertBlock)
        found = distil(examples, parameters, block, self.step.settings, (seed, layer.index))
        facts = {
            "error": {"before": found.before, "after": found.after},
            "steps": found.steps,
            "losses": found.losses,
            "importance": importance(examples, block.shape.experts, block.running),
            "never_auxiliary": list(found.never),
        }
        outcomes = list(layer.outcomes)
        if found.never:
            named = ", ".join(map(str, found.never))
            detail = f"experts {named} were never auxiliary in the text, and keep vectors of ones"
            outcomes.append(Outcome("never_auxiliary", "auxiliary", detail))
        if found.after >= found.before:
            detail = "no vectors were better than ones on the tokens set apart: give more text, or a smaller rate"
            outcomes.append(Outcome("kept_ones", "auxiliary", detail))
        return replace(layer, vectors=found.vectors, outcomes=tuple(outcomes), facts={**layer.facts, **facts})


def blocks(spec: DecoderSpec) -> Iterable[tuple[int, ExpertBlock]]:
    """Yield the index and the experts of every layer that has any."""
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.feed_forward, ExpertBlock):
            yield index, layer.feed_forward


def _choices(spec: DecoderSpec) -> int:
    """Return how many experts the router chooses for every token; the most of any layer."""
    return max(block.router.top_k for _, block in blocks(spec))
