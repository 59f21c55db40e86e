"""The decoder's arrays in a checkpoint: what each is called on disk, and reading them.

A table translates the names of `jaxmoe.model` to those on disk, an architecture's record where they differ; a name may
stand for some rows of a tensor, where several matrices lie in one. Shapes must be those of the spec, and a tensor of
the decoder that the table does not name is an error: all offenders are listed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxmoe.checkpoint.families import Family
from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, DecoderSpec, DenseBlock, LatentAttention, LayerSpec, Norm

USUAL_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{index}.",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.sinks": "self_attn.sinks",
    "attention.gate": "self_attn.gate_proj",
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_down_norm": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_down_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "shared.gate": "{shared}.gate_proj",
    "shared.up": "{shared}.up_proj",
    "shared.down": "{shared}.down_proj",
    "shared_gate": "{shared}_gate",
    "router.weight": "{router}",
    "router.bias": "{router_bias}",
    "router.selection_bias": "{bias}",
}
"""What most architectures call a decoder's arrays, and what the names in a layer begin with.

Where an architecture differs, its record has other names (`Family.names`); braces stand for what the record says of the
router and the shared experts, and brackets name a part of a tensor's rows: `[gate]`, `[up]` of two halves, `[query]`,
`[key]`, `[value]` of three parts.
"""


class Piece(NamedTuple):
    """A tensor on disk, or some of its rows, that an array is read from; `shape` is the array's."""

    tensor: str
    rows: slice
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """An array that stays on disk: whoever takes a slice of its rows reads just these."""

    matrix: Matrix

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.matrix.read(rows)


def layer_prefix(index: int, family: Family) -> str:
    """Return what the names of a layer's tensors on disk begin with.

    Example:
        >>> from jaxmoe.checkpoint.families import FAMILIES
        >>> layer_prefix(3, FAMILIES["mixtral"])
        'model.layers.3.'
    """
    return {**USUAL_NAMES, **family.names}["layer"].format(index=index)


def layer_pieces(spec: LayerSpec, prefix: str, family: Family) -> dict[str, Piece]:
    """Return what a layer's arrays are read from, the routed experts' matrices excepted.

    Args:
        spec: the layer's.
        prefix: of its tensors on disk, such as `model.layers.3.`.
        family: the architecture.
    """
    names = {**USUAL_NAMES, **family.names}
    known = {
        "shared": family.shared,
        "router": family.router,
        "router_bias": re.sub("weight$", "bias", family.router),
        "bias": family.bias,
    }
    pieces = {}
    for name, shape in _shapes(spec):
        stem, _, leaf = name.rpartition(".")
        template = names[name] if name in names else f"{names[stem]}.{leaf}"
        bracket = re.search(r"\[(.+?)\]", template)
        rows = _rows(bracket[1], spec, shape[0]) if bracket else slice(None)
        plain = template.replace(bracket[0], "") if bracket else template
        pieces[name] = Piece(prefix + plain.format(**known), rows, shape)
    return pieces


def _rows(part: str, spec: LayerSpec, size: int) -> slice:
    """Return the rows of a part: halves of gate and up, or queries, keys and values one after the other."""
    if part in ("gate", "up"):
        return slice(0, size) if part == "gate" else slice(size, 2 * size)
    attention = spec.attention
    assert isinstance(attention, Attention)
    queries, keys = attention.heads * attention.head, attention.kv_heads * attention.head
    start = {"query": 0, "key": queries, "value": queries + keys}[part]
    return slice(start, start + size)


def end_pieces(spec: DecoderSpec, family: Family) -> dict[str, Piece]:
    """Return what embedding, last normalisation and head are read from."""
    names = {**USUAL_NAMES, **family.names}
    shapes = dict(_norm("norm", spec.hidden, spec.norm))
    shapes["embedding.weight"] = (spec.vocabulary, spec.hidden)
    if not spec.tied:
        shapes["head.weight"] = (spec.vocabulary, spec.hidden)
    if spec.head_bias:
        shapes["head.bias"] = (spec.vocabulary,)
    return {
        name: Piece(f"{names[name.split('.')[0]]}.{name.split('.')[1]}", slice(None), shape)
        for name, shape in shapes.items()
    }


def _shapes(spec: LayerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("input_norm",) if spec.parallel else ("input_norm", "post_norm"):
        yield from _norm(name, spec.hidden, spec.norm)
        if spec.before and spec.after:
            yield from _norm(f"{name}_after", spec.hidden, spec.norm)
    if isinstance(spec.attention, LatentAttention):
        yield from _latent(spec.attention, spec.hidden)
    else:
        yield from _grouped(spec.attention, spec.hidden)
    block = spec.feed_forward
    if isinstance(block, DenseBlock):
        yield from _dense("feed_forward", spec.hidden, block)
        return
    yield "router.weight", (block.router.experts, spec.hidden)
    if block.router.bias:
        yield "router.bias", (block.router.experts,)
    if block.router.selection_bias:
        yield "router.selection_bias", (block.router.experts,)
    if block.shared is not None:
        yield from _dense("shared", spec.hidden, block.shared)
    if block.shared_gate:
        yield "shared_gate.weight", (1, spec.hidden)


def _norm(name: str, size: int, spec: Norm) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    if spec.bias:
        yield f"{name}.bias", (size,)


def _linear(name: str, out: int, in_: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, in_)
    if bias:
        yield f"{name}.bias", (out,)


def _dense(name: str, hidden: int, spec: DenseBlock) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("gate", "up"):
        yield from _linear(f"{name}.{part}", spec.intermediate, hidden, spec.bias)
    yield from _linear(f"{name}.down", hidden, spec.intermediate, spec.bias)


def _grouped(spec: Attention, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = spec.heads * spec.head, spec.kv_heads * spec.head
    yield from _linear("attention.query", queries, hidden, spec.bias)
    yield from _linear("attention.key", keys, hidden, spec.bias)
    yield from _linear("attention.value", spec.kv_heads * spec.value, hidden, spec.bias)
    yield from _linear("attention.output", hidden, spec.heads * spec.value, spec.output_bias)
    if spec.norm is not None:
        whole = spec.norm_over == "all"
        yield from _norm("attention.query_norm", queries if whole else spec.head, spec.norm)
        yield from _norm("attention.key_norm", keys if whole else spec.head, spec.norm)
    if spec.sinks:
        yield "attention.sinks", (spec.heads,)
    if spec.gated:
        yield "attention.gate.weight", (spec.heads * spec.value, hidden)


def _latent(spec: LatentAttention, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries = spec.heads * (spec.plain + spec.rotated)
    if spec.query_rank is None:
        yield from _linear("attention.query", queries, hidden, False)
    else:
        yield from _linear("attention.query_down", spec.query_rank, hidden, spec.bias)
        yield from _norm("attention.query_down_norm", spec.query_rank, spec.norm)
        yield from _linear("attention.query_up", queries, spec.query_rank, False)
    yield from _linear("attention.kv_down", spec.kv_rank + spec.rotated, hidden, spec.bias)
    yield from _norm("attention.kv_down_norm", spec.kv_rank, spec.norm)
    yield from _linear("attention.kv_up", spec.heads * (spec.plain + spec.value), spec.kv_rank, False)
    yield from _linear("attention.output", hidden, spec.heads * spec.value, spec.bias)


def read(pieces: Mapping[str, Piece], matrices: Mapping[str, Matrix]) -> dict[str, np.ndarray]:
    """Read the arrays."""
    return {
        # A selection bias may be stored as a row.
        name: matrices[piece.tensor].read(... if piece.rows == slice(None) else piece.rows).reshape(piece.shape)
        for name, piece in pieces.items()
    }


def check_fit(pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if tensors are missing, or have other shapes or more rows than the config says; all are listed."""
    wanted: dict[str, list[Piece]] = {}
    for piece in pieces:
        wanted.setdefault(piece.tensor, []).append(piece)
    problems = []
    for tensor, own in wanted.items():
        if tensor not in shapes:
            problems.append(f"{tensor} is missing")
            continue
        whole = own[0].shape if own[0].rows == slice(None) else (max(x.rows.stop for x in own), *own[0].shape[1:])
        found = shapes[tensor]
        if [size for size in found if size != 1] != [size for size in whole if size != 1]:
            problems.append(f"{tensor}: shape {list(found)}, config.json says {list(whole)}")
    if problems:
        raise JaxmoeError(
            f"the decoder's tensors do not fit its config: {listing(sorted(problems))}. Mend config.json if its sizes"
            " are wrong, else fetch the checkpoint again; methods that need the weights alone work as it is"
        )


def check_all_known(names: set[str], used: set[str]) -> None:
    """Raise if there are tensors of the decoder that the model does not use; all are listed.

    Args:
        names: tensors on disk that should be the decoder's.
        used: those that are read, the experts' matrices included.
    """
    harmless = re.compile(r"(\.rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias)$")
    if unknown := sorted(name for name in names - used if not harmless.search(name)):
        raise JaxmoeError(
            "tensors that jaxmoe does not know how to use, so that it could not compute what the model computes: "
            f"{listing(unknown)}"
        )


def expert_biases(names: tuple[str, ...], matrices: Mapping[str, Matrix], family: Family) -> dict[str, np.ndarray]:
    """Return the biases of gate, up and down, `[expert, out]`, from the tensors of a fused layout."""
    (both,) = (matrices[name].read() for name in names if "gate_up" in name)
    (down,) = (matrices[name].read() for name in names if "down" in name)
    gate, up = (both[:, 0::2], both[:, 1::2]) if family.interleaved else np.split(both, 2, axis=1)
    return {"experts.gate.bias": gate, "experts.up.bias": up, "experts.down.bias": down}


def join_expert_biases(
    names: tuple[str, ...], biases: Mapping[str, np.ndarray], family: Family
) -> dict[str, np.ndarray]:
    """Return what the tensors of a fused layout hold of the biases of gate, up and down: `expert_biases` backwards."""
    (both,) = (name for name in names if "gate_up" in name)
    (down,) = (name for name in names if "down" in name)
    gate, up = biases["experts.gate.bias"], biases["experts.up.bias"]
    joined = np.stack([gate, up], -1).reshape(len(gate), -1) if family.interleaved else np.concatenate([gate, up], 1)
    return {both: joined, down: biases["experts.down.bias"]}
