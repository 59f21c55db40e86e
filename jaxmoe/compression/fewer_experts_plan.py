"""What a number of main experts means for a model: stored numbers, active ones and operations, before anything runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.families import architecture
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Count
from jaxmoe.methods.compressed_experts import METHOD
from jaxmoe.model.auxiliary import MainExperts, main_experts, vector_shapes
from jaxmoe.model.spec import DecoderSpec, ExpertBlock
from jaxmoe.model.work import Activity, activity


@dataclass(frozen=True, kw_only=True)
class MainPlan:
    """A model of which only the main experts of a token are to run.

    Args:
        model: the source.
        main: how many run.
        spec: what the model then computes.
        before: stored and active numbers, and operations.
        after: the same of the result.
        bytes: of all tensors, `{"before", "after"}`.
    """

    model: StoredModel
    main: MainExperts
    spec: DecoderSpec
    before: Activity
    after: Activity
    bytes: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read."""
        added = self.after.stored - self.before.stored
        experts = stored(self.model).numbers
        return {
            "method": METHOD.name,
            "requested": self.main.as_json(),
            "experts_per_token": {"before": self.top_k, "after": self.main.count},
            "achieved": {
                "touched": -added / experts,
                "experts": -added / experts,
                "model": -added / self.before.stored,
            },
            "parameters": {"before": self.before.stored, "after": self.after.stored},
            "active_parameters": {"before": self.before.active, "after": self.after.active},
            "operations_per_token": {"before": self.before.operations, "after": self.after.operations},
            "bytes": self.bytes,
        }

    @property
    def top_k(self) -> int:
        """Experts that the router chooses for every token; the most of any layer."""
        return max(block.router.top_k for _, block in blocks(self.spec))


def make_main_plan(model: StoredModel, main: MainExperts) -> MainPlan:
    """Plan a model with fewer active experts.

    Args:
        model: an original or a factored checkpoint.
        main: how many experts of a token are to run, 1 to one less than the router chooses.

    Raises:
        JaxmoeError: the number is out of range, vectors stand in for experts already, or the architecture cannot be
            written with factors.
    """
    source = model.checkpoint
    if isinstance(source, CompressedCheckpoint) and source.main:
        raise JaxmoeError(
            f"{model.folder}: vectors stand in for experts already, and only {next(iter(source.main.values())).count}"
            " run: give the checkpoint that this one was made of"
        )
    architecture(source.dense_config()["model_type"])
    spec = main_experts(model.spec, dict.fromkeys(model.modules, main))
    other = source.parameters - stored(model).numbers
    layers = {index: model.abstract_experts(index) for index in model.modules}
    before, after = (
        activity(other, [(block, layers[index]) for index, block in blocks(own)]) for own in (model.spec, spec)
    )
    vectors = sum(rows * size for _, block in blocks(spec) for rows, size in vector_shapes(block.shape).values())
    size = sum(planned.bytes for planned in source.copied()) + sum(own.count().bytes for own in layers.values())
    sizes = {"before": source.bytes, "after": size + 4 * vectors}
    return MainPlan(model=model, main=main, spec=spec, before=before, after=after, bytes=sizes)


def blocks(spec: DecoderSpec) -> Iterable[tuple[int, ExpertBlock]]:
    """Yield the index and the experts of every layer that has any."""
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.feed_forward, ExpertBlock):
            yield index, layer.feed_forward


def stored(model: StoredModel) -> Count:
    """Count what the routed experts of a model store."""
    return sum((model.abstract_experts(index).count() for index in model.modules), Count(0, 0))
