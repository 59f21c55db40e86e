"""What a ratio means where whole experts or channels are removed: how many stay, the same in every layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.families import GROUPS, KEPT_GROUPS, decoder_config
from jaxmoe.checkpoint.families.parts.keys import brief
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.tensor_file import Planned
from jaxmoe.compression.budget import NOTHING, Budget, Sizes, Totals
from jaxmoe.compression.found import Found, dense_layer
from jaxmoe.compression.step import Step, behind
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.pruned import check_stock, slim_config, slim_copied, slim_edited, slim_shape
from jaxmoe.factors import Count, LayerShape
from jaxmoe.methods.method import count
from jaxmoe.methods.pruning import PruningMethod


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """How many experts, or channels of every expert, stay.

    Args:
        method: says which.
        settings: its settings.
        requested: `{"ratio", "of"}`, and `unit` where it is bytes.
        before: experts of a layer, or channels of an expert.
        keep: so many of them stay.
        groups: of experts that keep equal numbers.
        shapes: of the layers afterwards, by index.
        sizes: of all three scopes, before and after.
        peak_bytes: predicted peak of memory beyond that of the idle program.
    """

    method: PruningMethod
    settings: Any
    requested: dict[str, Any]
    before: int
    keep: int
    groups: int
    shapes: Mapping[int, LayerShape]
    sizes: Sizes
    peak_bytes: int

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read."""
        return {
            "method": self.method.name,
            "settings": asdict(self.settings),
            "requested": self.requested,
            "allocation": "uniform",
            "kept": {self.method.unit: self.keep},
            "achieved": self.sizes.removed(self.requested.get("unit", "parameters")),
            **self.sizes.model(),
            "peak_bytes": self.peak_bytes,
            "layers": [{"layer": index, "projections": self.projections(index)} for index in sorted(self.shapes)],
        }

    def projections(self, index: int) -> dict[str, dict[str, Any]]:
        """Return for each projection of a layer its terms, ranks, stored numbers and the kept fraction."""
        shape = self.shapes[index]
        return {
            name: {
                "terms": [{"target": name, "kind": "dense", self.method.unit: self.keep}],
                "ranks": [min(shape.of(name)[1:])],
                "parameters": int(np.prod(shape.of(name))),
                "kept": self.keep / self.before,
            }
            for name in shape.projections
        }


def make_prune_plan(
    checkpoint: Checkpoint,
    method: PruningMethod,
    settings: Any,
    budget: Budget,
    *,
    nearest: bool = False,
    then: Sequence[Step] = (),
) -> PrunePlan:
    """Choose how many experts or channels stay: at least the asked fraction goes, and as little more as possible.

    Args:
        checkpoint: the source.
        method: what removes.
        settings: an instance of `method.settings`.
        budget: what is asked for; what is replaced are all routed experts.
        nearest: whether a little less may go instead where that is closer, since a later step makes up for it.
        then: steps that work on the result, which decide what it takes in the end.

    Raises:
        JaxmoeError: the ratio is out of reach: the message names the reachable range; or the stock architecture cannot
            hold the result.
    """
    if checkpoint.family is None:
        raise JaxmoeError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is unknown to jaxmoe: it cannot tell how tokens"
            f" choose experts and what else has their sizes, so that {method.name} removes none; use a method that"
            " keeps them all, such as svd or mobe"
        )
    unit = method.unit
    sizes = {layer.shape.experts if unit == "experts" else layer.shape.intermediate for layer in checkpoint.layers}
    if len(sizes) > 1:
        raise JaxmoeError(
            f"{checkpoint.folder}: layers have {', '.join(map(str, sorted(sizes)))} {unit}, and {method.name} keeps the"
            " same number in all: use another method"
        )
    (before,) = sizes
    groups, least = _groups(checkpoint, before) if unit == "experts" else (1, 1)
    step = math.lcm(settings.multiple, groups)
    copied = slim_copied(checkpoint)
    candidates = [keep for keep in range(step, before, step) if keep >= least]
    whole = Found.of(checkpoint).before()

    def after(keep: int, shapes: Mapping[int, LayerShape], steps: Sequence[Step]) -> Totals:
        """Count what is left behind some further steps."""
        stored = _stored(checkpoint, shapes, steps)
        others = _others(checkpoint, copied, unit, keep)
        rest = Count(sum(x.numbers for x in others), sum(x.bytes for x in others))
        return Totals(stored, stored, stored + rest)

    def plan(keep: int) -> PrunePlan:
        shapes = {layer.index: slim_shape(layer.shape, unit, keep) for layer in checkpoint.layers}
        return PrunePlan(
            method=method,
            settings=settings,
            requested=budget.as_json(),
            before=before,
            keep=keep,
            groups=groups,
            shapes=shapes,
            sizes=Sizes(whole, after(keep, shapes, ())),
            peak_bytes=max(_peak(layer.shape, layer.dtype.itemsize, unit) for layer in checkpoint.layers),
        )

    def goes(plan: PrunePlan) -> bool:
        """Tell whether at least the asked fraction goes, in whole numbers."""
        left = after(plan.keep, plan.shapes, then) if then else plan.sizes.after
        return budget.scope(whole) - budget.scope(left) >= budget.removed(whole)

    # Sizes are linear in what is kept, so the largest that is small enough is found by halving.
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if goes(plan(candidates[middle])):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        extremes = [plan(keep) for keep in candidates[:1] + candidates[-1:]]
        sizes = [Sizes(whole, after(own.keep, own.shapes, then)) for own in extremes]
        raise JaxmoeError(_out_of_reach(method, step, budget, extremes, sizes))
    chosen = plan(candidates[low - 1])
    if nearest and low < len(candidates):
        more = plan(candidates[low])
        chosen = min(chosen, more, key=lambda found: abs(found.sizes.removed(budget.unit)[budget.of] - budget.ratio))
    config = slim_config(checkpoint, unit, chosen.keep)
    if unit == "channels":
        plain = checkpoint.plain()
        check_stock(plain, config, chosen.shapes, _others(plain, slim_copied(plain), unit, chosen.keep))
    return chosen


def _stored(checkpoint: Checkpoint, shapes: Mapping[int, LayerShape], then: Sequence[Step]) -> Count:
    """Count what the experts that stay take behind the steps that follow."""
    layers = {layer.index: dense_layer(shapes[layer.index], layer.dtype) for layer in checkpoint.layers}
    found = Found(checkpoint=checkpoint, layers=layers)
    total = sum((step.adds(found) for step in then), NOTHING)
    for layer in layers.values():
        for terms in layer.terms.values():
            total += count(behind(then, terms))
    return total


def _others(checkpoint: Checkpoint, copied: list[Planned], unit: str, keep: int) -> list[Planned]:
    """Return what the result has beside the experts' matrices."""
    edited: dict[str, list[Planned]] = {}
    for layer in checkpoint.layers:
        edited |= slim_edited(checkpoint, layer, copied, unit, keep, _nothing)
    return [new for tensor in copied for new in edited.get(tensor.name, [tensor])]


def _nothing() -> np.ndarray:
    raise RuntimeError("a plan reads no tensors")


def _groups(checkpoint: Checkpoint, experts: int) -> tuple[int, int]:
    """Return the groups of experts that have to stay equal, and the least number of experts that routing needs."""
    family, decoder = checkpoint.family, decoder_config(checkpoint.config)
    assert family is not None
    top_k = family.read(decoder, family.top_k)
    if checkpoint.family is None and top_k is None:
        raise JaxmoeError(
            f"{checkpoint.folder}: model_type {checkpoint.model_type!r} is unknown to jaxmoe, which cannot tell how"
            " many experts a token needs: choose a method that leaves the experts in place"
        )
    most = max(top_k) if isinstance(top_k, list) else top_k
    groups = family.read(decoder, GROUPS) or 1
    chosen = family.read(decoder, KEPT_GROUPS) or groups
    if type(most) is not int or most > experts or experts % groups:
        raise JaxmoeError(
            f"{checkpoint.folder}: config.json does not tell how many experts a token needs ({family.top_k} ="
            f" {brief(top_k)}, {groups!r} groups of {experts} experts)"
        )
    # DeepSeek-V3 and its kin score a group by its two best experts, and a token's have to fit into its groups.
    inside = max(2 if family.routing == "deepseek_v3" else 1, -(-most // chosen))
    return groups, groups * inside


def unwritten(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """Return the checkpoint that a plan leads to, with all names and sizes but without values: to plan what follows."""
    unit = plan.method.unit
    tensors = _others(checkpoint, slim_copied(checkpoint), unit, plan.keep)
    layers = []
    for layer in checkpoint.layers:
        shape = plan.shapes[layer.index]
        own = plan_dense(layer.written, shape, layer.dtype, lambda projection: _nothing())
        names = tuple(tensor.name for tensor in own)
        layers.append(replace(layer, shape=shape, names=names, layout=layer.written))
        tensors += own
    planned: dict[str, Any] = {tensor.name: Unwritten(tensor) for tensor in tensors}
    config = slim_config(checkpoint, unit, plan.keep)
    return replace(checkpoint, config=config, tensors=planned, matrices=planned, layers=tuple(layers), mtp=())


@dataclass(frozen=True)
class Unwritten:
    """A tensor that is still to be written, as `checkpoint.Matrix` has it; it cannot be read."""

    planned: Planned

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def dtype(self) -> str:
        return self.planned.code

    @property
    def shape(self) -> tuple[int, ...]:
        return self.planned.shape

    @property
    def numbers(self) -> int:
        return self.planned.numbers

    @property
    def bytes(self) -> int:
        return self.planned.bytes

    @property
    def parts(self) -> tuple["Unwritten"]:
        return (self,)

    def read(self, index: Any = ...) -> np.ndarray:
        return _nothing()


def _peak(shape: LayerShape, itemsize: int, unit: str) -> int:
    """Predict what slimming one layer holds at once: a projection in the file's and in float32, twice, and moments."""
    projection = shape.numbers // len(shape.projections)
    moments = 3 * 8 * shape.experts * shape.intermediate**2 if unit == "channels" else 0
    return 2 * projection * (itemsize + 4) + moments


def _out_of_reach(
    method: PruningMethod, multiple: int, budget: Budget, extremes: list[PrunePlan], sizes: list[Sizes]
) -> str:
    if not extremes:
        return (
            f"{budget}: {method.name} can remove no {method.unit} from this model, of which it keeps a multiple of"
            f" {multiple}; use another method, or --set multiple=1"
        )
    return (
        f"{budget} is out of reach for {method.name}, which keeps at least {extremes[0].keep} {method.unit}: it can"
        f" remove {budget.reach(sizes)}; choose a ratio in that range, or another method"
    )
