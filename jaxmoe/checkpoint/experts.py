"""Find the routed experts among a checkpoint's tensors, and check that they are all there and fit.

Names and shapes on disk are the truth; the config must agree with them. Everything that is wrong is collected and
reported at once: experts missing or described twice, shapes or dtypes that differ, counts that the config contradicts,
layers without the experts that they should have, and names near experts that nobody knows.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint.families import UNKNOWN, Family, decoder_config, lookup
from jaxmoe.checkpoint.families.parts.moe_layers import moe_layers, num_layers
from jaxmoe.checkpoint.layout import Stack
from jaxmoe.checkpoint.names import ExpertName, is_mtp, layer_number
from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.tensor_file import DTYPES, listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, LayerShape

FLOATS = ("F32", "BF16", "F16")
"""The dtypes in which experts can be read and written."""

# Names with "expert" in them that hold no routed experts in any architecture.
_KNOWN = re.compile(r"(?:^|\.)(?:shared?_expert\w*|expert_bias)(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """The routed experts of one decoder layer.

    Args:
        index: of the decoder layer.
        prefix: what the names of its tensors on disk begin with, such as `model.layers.3.`.
        module: path of the experts' module in transformers, such as `model.layers.3.mlp.experts`.
        shape: sizes.
        dtype: in which the matrices are stored and factors will be: bfloat16 where the source is quantised.
        names: all tensors on disk that hold the matrices, scales included; a method replaces them.
        biases: tensors of the experts' biases, which stay as they are.
        layout: how the matrices lie in the files.
        written: how they are written again: as they lay, or, where an architecture with biases was taken apart into
            single experts, in the stacks that transformers loads.
    """

    index: int
    prefix: str
    module: str
    shape: LayerShape
    dtype: np.dtype
    names: tuple[str, ...]
    biases: tuple[str, ...]
    layout: tuple[Stack, ...]
    written: tuple[Stack, ...]


class Found(NamedTuple):
    """What `find_experts` returns: the layers in ascending order, and the tensors of multi-token prediction."""

    layers: tuple[MoELayer, ...]
    mtp: tuple[str, ...]


class _Member(NamedTuple):
    parsed: ExpertName
    name: str
    matrix: Matrix


def find_experts(matrices: Mapping[str, Matrix], config: Mapping[str, Any], family: Family | None) -> Found:
    """Return the MoE layers of a checkpoint.

    Args:
        matrices: by the names that they have without quantisation.
        config: the checkpoint's `config.json`.
        family: its architecture's record; None if there is none.

    Raises:
        JaxmoeError: if there are no routed experts, or something about them is wrong; all offenders are listed.
    """
    decoder = decoder_config(config)
    (family or UNKNOWN).check(decoder)
    count = num_layers(decoder)
    members, near, mtp = _sort_names(matrices, family)
    roots = {prefix[: prefix.rindex(".", 0, -1) + 1] for prefix in members}
    if len(roots) > 1:
        raise JaxmoeError(
            f"routed experts stand under several decoders, {', '.join(sorted(roots))}: jaxmoe compresses checkpoints"
            " with one; split the checkpoint"
        )
    if count is not None and roots:
        # What is numbered behind the last decoder layer predicts further tokens.
        (root,) = roots
        behind = {name for name in matrices if (at := layer_number(name)) and at[0] == root and at[1] >= count}
        mtp |= behind
        near = [name for name in near if name not in behind]
        members = {prefix: found for prefix, found in members.items() if found[0].parsed.layer < count}
    if near:
        raise JaxmoeError(
            "unknown names near experts: jaxmoe does not know what they hold and changes nothing that it does not know;"
            f" {listing(near)}"
        )
    record = family or UNKNOWN
    if not members:
        raise JaxmoeError(_none_found(matrices, str(config.get("model_type")), lookup(decoder, record.experts)))
    problems: list[str] = []
    layers = []
    for prefix, found in members.items():
        layer = _layer(prefix, found, family, decoder, problems)
        if layer is not None:
            layers.append(layer)
            problems += _disagreements(layer, prefix, record, decoder, count)
    present = sorted(found[0].parsed.layer for found in members.values())
    expected = moe_layers(record.moe_layers, decoder)
    if expected is not None and present != expected:
        problems += [
            f"layer {i}: no routed experts, and config.json says it has some" for i in expected if i not in present
        ]
        problems += [
            f"layer {i}: routed experts, and config.json says it has none" for i in present if i not in expected
        ]
    if problems:
        raise JaxmoeError(
            "the experts are not complete or do not fit: fetch the checkpoint again if it came so, or mend what changed"
            f" it. {listing(problems)}"
        )
    layers.sort(key=lambda layer: layer.index)
    return Found(tuple(layers), tuple(name for name in matrices if name in mtp))


def _none_found(matrices: Mapping[str, Matrix], kind: str, told: Any) -> str:
    usual = "model.layers.0.mlp.experts.0.gate_proj.weight"
    if mlx := next((name for name in matrices if re.search(r"\.switch_(?:mlp|glu)\.", name)), None):
        return (
            f"the experts are in MLX's layout ({mlx}), which neither transformers nor jaxmoe reads: take the checkpoint"
            " that this one was converted from"
        )
    if type(told) is int and told > 1:
        return (
            f"no routed experts found, though config.json names {told}: none of the {len(matrices)} tensors of this"
            f" {kind!r} checkpoint has a name such as {usual}; take the checkpoint as transformers loads it"
        )
    return (
        f"no routed experts: none of the {len(matrices)} tensors of this {kind!r} checkpoint has a name such as"
        f" {usual}; jaxmoe compresses Mixture-of-Experts models only"
    )


def _sort_names(
    matrices: Mapping[str, Matrix], family: Family | None
) -> tuple[dict[str, list[_Member]], list[str], set[str]]:
    """Return the experts' tensors by the prefix of their layer, unknown names near experts, and those of MTP."""
    members: defaultdict[str, list[_Member]] = defaultdict(list)
    near: list[str] = []
    mtp: set[str] = set()
    known = re.compile(family.known) if family and family.known else None
    grammar = (family or UNKNOWN).grammar
    for name, matrix in matrices.items():
        if is_mtp(name):
            mtp.add(name)
        elif (parsed := grammar.classify(name, len(matrix.shape))) is not None:
            members[parsed.prefix].append(_Member(parsed, name, matrix))
        elif "expert" in name and "expert" in _KNOWN.sub("", name) and not (known and known.search(name)):
            near.append(name)
    return dict(members), near, mtp


def _layer(
    prefix: str, found: Sequence[_Member], family: Family | None, decoder: Mapping[str, Any], problems: list[str]
) -> MoELayer | None:
    """Return one layer, or None and add to the problems what is wrong with it."""
    before = len(problems)
    stacks: defaultdict[str, list[_Member]] = defaultdict(list)
    for member in found:
        if not member.parsed.bias:
            stacks[member.parsed.template].append(member)
    _check_coverage(prefix, stacks, family, problems)
    experts = _check_numbers(stacks, problems)
    members = [member for own in stacks.values() for member in own]
    if not members:
        return None
    dtypes = [member.matrix.dtype for member in members]
    # The commonest is taken for the right one, so that the tensors which differ are the ones listed.
    usual = max(sorted(set(dtypes)), key=dtypes.count)
    problems += [f"{m.name}: {m.matrix.dtype}, other experts are {usual}" for m in members if m.matrix.dtype != usual]
    if usual not in FLOATS:
        problems.append(f"{prefix}: experts in {usual}; jaxmoe compresses {', '.join(FLOATS)}")
    for template, own in stacks.items():
        problems += _odd_shapes(template, own)
    if len(problems) > before:
        return None
    first = sorted((own[0] for own in stacks.values()), key=lambda m: list(TARGETS).index(m.parsed.projection))
    fit = _fit(prefix, first, experts, family or UNKNOWN, decoder, problems)
    if fit is None:
        return None
    layout, shape = fit
    by_name = {member.name: member.matrix for member in members}
    names = tuple(part.name for stack in layout for name in stack.names(shape) for part in by_name[name].parts)
    block = found[0].parsed.block
    assumed = f"{prefix}{block}.experts" if block else f"{prefix}experts"
    apart = family is not None and family.expert_biases and layout[0].per_expert
    return MoELayer(
        index=found[0].parsed.layer,
        prefix=prefix,
        module=family.memory(prefix) if family else assumed,
        shape=shape,
        dtype=DTYPES[usual],
        names=names,
        biases=tuple(m.name for m in found if m.parsed.bias),
        layout=layout,
        written=_stacks(assumed, family or UNKNOWN) if apart else layout,
    )


def _odd_shapes(template: str, own: Sequence[_Member]) -> list[str]:
    """Return which of the tensors of one projection differ from the others, in one line where many do.

    Raises:
        JaxmoeError: they fall into groups of several sizes, as in models with experts for several modalities.
    """
    shapes = Counter(member.matrix.shape for member in own)
    common = shapes.most_common(1)[0][0]
    if len(shapes) > 1 and min(shapes.values()) > 1:
        sizes = ", ".join(f"{count} of {list(shape)}" for shape, count in shapes.most_common())
        raise JaxmoeError(
            f"the experts of one layer have several sizes ({template}: {sizes}), which jaxmoe does not support: it"
            " compresses layers whose experts are all alike"
        )
    return [
        f"{m.name}: shape {list(m.matrix.shape)}, others of {template} have {list(common)}"
        for m in own
        if m.matrix.shape != common
    ]


def _check_coverage(
    prefix: str, stacks: Mapping[str, Sequence[_Member]], family: Family | None, problems: list[str]
) -> None:
    """Every projection must be described once."""
    covering: dict[str, list[str]] = {"gate": [], "up": [], "down": []}
    for template, own in stacks.items():
        for projection in TARGETS[own[0].parsed.projection]:
            covering[projection].append(template)
    for projection, templates in covering.items():
        if len(templates) > 1:
            problems.append(f"{prefix}: {projection} is described twice, by {' and '.join(templates)}")
        # Whether an unknown architecture has a gate is for its tensors to say.
        elif not templates and (projection != "gate" or (family is not None and family.gated)):
            problems.append(f"{prefix}: there is no {projection} projection among {', '.join(stacks) or 'its tensors'}")


def _check_numbers(stacks: Mapping[str, Sequence[_Member]], problems: list[str]) -> int:
    """Every projection must have the experts 0 to E - 1; return E."""
    numbers = {
        template: {member.parsed.expert for member in own if member.parsed.expert is not None}
        for template, own in stacks.items()
    }
    most = max((max(own) + 1 for own in numbers.values() if own), default=0)
    for template, own in numbers.items():
        if own and len(own) < most:
            # A damaged name may carry any number: count instead of listing all that it would imply.
            missing = [str(number) for number in islice((n for n in range(most) if n not in own), 10)]
            more = f" and {most - len(own) - len(missing)} more" if most - len(own) > len(missing) else ""
            problems.append(f"{template}: no expert {', '.join(missing)}{more} of {most}")
    return most


def _fit(
    prefix: str,
    first: Sequence[_Member],
    experts: int,
    family: Family,
    decoder: Mapping[str, Any],
    problems: list[str],
) -> tuple[tuple[Stack, ...], LayerShape] | None:
    """Return the layout and the sizes that all the tensors of a layer agree on, given one tensor of every stack."""
    gated = any(member.parsed.projection in ("gate", "gate_up") for member in first)
    if not experts:
        whole = [member.matrix.shape[0] for member in first if member.parsed.layout in ("fused", "stacked")]
        told = _of_layer(lookup(decoder, family.experts), first[0].parsed.layer, num_layers(decoder))
        # A flat layout does not show how many experts its rows belong to: there the config decides.
        experts = whole[0] if whole else told if type(told) is int else 0
    fitting = []
    for transposed in (False, True) if family.transposed is None else (family.transposed,):
        layout = tuple(_stack(member, transposed, family) for member in first)
        (down,) = (stack for stack in layout if stack.target == "down")
        sizes = down.sizes(next(m.matrix.shape for m in first if m.parsed.projection == "down"), experts)
        shape = LayerShape(experts, *sizes, gated)
        if min(shape[:3]) > 0 and all(s.on_disk(shape) == m.matrix.shape for s, m in zip(layout, first, strict=True)):
            fitting.append((layout, shape))
    if not fitting:
        shapes = ", ".join(f"{member.parsed.template} {list(member.matrix.shape)}" for member in first)
        problems.append(f"{prefix}: the shapes do not fit {experts} experts and one another: {shapes}")
        return None
    # Both ways round fit only without a gate: `[expert, F, D]` beside `[expert, D, F]`.
    hidden = lookup(decoder, family.hidden or "hidden_size")
    return next((fit for fit in fitting if fit[1].hidden == hidden), fitting[0])


def _stacks(path: str, family: Family) -> tuple[Stack, ...]:
    """Return how transformers keeps all experts of a layer together."""
    transposed = bool(family.transposed)
    both = Stack(name=f"{path}.gate_up_proj", target="gate_up", transposed=transposed, interleaved=family.interleaved)
    return both, Stack(name=f"{path}.down_proj", target="down", transposed=transposed)


def _stack(member: _Member, transposed: bool, family: Family) -> Stack:
    parsed = member.parsed
    fused = parsed.layout == "fused"
    flat = parsed.layout == "flat"
    return Stack(
        name=parsed.template,
        target=parsed.projection,
        # In the flat layout all three have the hidden size along the columns.
        transposed=(fused and transposed) or (flat and parsed.projection == "down"),
        interleaved=fused and family.interleaved and parsed.projection == "gate_up",
        flat=flat,
    )


def _of_layer(value: Any, index: int, count: int | None) -> Any:
    """Return what a config says of one layer: a list with as many entries as there are layers has one for each."""
    return value[index] if isinstance(value, list) and len(value) == count and index < len(value) else value


def _disagreements(
    layer: MoELayer, prefix: str, family: Family, decoder: Mapping[str, Any], count: int | None
) -> list[str]:
    """Return where the config's sizes differ from those of the tensors."""
    problems = []
    for what, keys, found in (
        # All of these are names of one number; of the others the first that is there counts.
        *(("routed experts", key, layer.shape.experts) for key in family.experts.split("|")),
        ("hidden size", family.hidden, layer.shape.hidden),
        ("expert intermediate size", family.intermediate, layer.shape.intermediate),
    ):
        value = _of_layer(lookup(decoder, keys), layer.index, count)
        if type(value) is int and value != found:
            problems.append(f"{prefix}: {what} {found}, and config.json says {value}")
    return problems
