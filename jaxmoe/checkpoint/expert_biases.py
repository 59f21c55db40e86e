"""Biases of experts with a tensor each, read as the one tensor for all experts that transformers keeps and loads.

Programs that quantise the experts of an architecture with biases take their stacked tensors apart, into one linear map
for every expert. What was taken apart is put together again here, under the name and in the order of the stack:

    mlp.experts.7.gate_proj.bias, mlp.experts.7.up_proj.bias  ->  mlp.experts.gate_up_proj_bias  [expert, 2 * F]
    mlp.experts.7.down_proj.bias                              ->  mlp.experts.down_proj_bias     [expert, D]
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from jaxmoe.checkpoint.names import ExpertName, Grammar
from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.tensor_file import TensorEntry, listing
from jaxmoe.errors import JaxmoeError


@dataclass(frozen=True, slots=True, eq=False)
class JoinedBiases:
    """The biases of all experts from a tensor for each.

    Args:
        name: of the tensor that transformers keeps.
        dtype: of the parts and of the whole.
        shape: `(experts, out)`.
        parts: the tensors on disk, those of expert 0 first; of gate and up, an expert's gate comes before its up.
        interleaved: whether numbers of gate and up alternate in the whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]
    interleaved: bool

    @property
    def numbers(self) -> int:
        """Elements."""
        return prod(self.shape)

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the biases, `[expert, out]`, or those at an index of the first axis."""
        experts = self.shape[0]
        own = np.concatenate([part.read() for part in self.parts]).reshape(experts, -1)
        if self.interleaved:
            own = own.reshape(experts, 2, -1).swapaxes(1, 2).reshape(experts, -1)
        return own[index]


def join_biases(matrices: Mapping[str, Matrix], grammar: Grammar, *, interleaved: bool) -> dict[str, Matrix]:
    """Return all tensors by name, with the biases of single experts put together.

    Args:
        matrices: by the names that they have without quantisation.
        grammar: of the architecture's names.
        interleaved: whether the architecture's stacks hold numbers of gate and up in turn.

    Raises:
        JaxmoeError: biases of some experts are missing, or they differ in size or dtype.
    """
    alone: dict[str, ExpertName] = {}
    for name, matrix in matrices.items():
        parsed = grammar.classify(name, len(matrix.shape)) if name.endswith(".bias") else None
        if parsed is not None and parsed.expert is not None and len(matrix.parts) == 1:
            alone[name] = parsed
    stacks: defaultdict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name, parsed in alone.items():
        stem = f"{parsed.prefix}{parsed.block}.experts."
        kind = "down_proj_bias" if parsed.projection == "down" else "gate_up_proj_bias"
        assert parsed.expert is not None
        stacks[stem + kind][parsed.expert, parsed.projection] = name
    joined: dict[str, Matrix] = {name: matrix for name, matrix in matrices.items() if name not in alone}
    problems = []
    for name, members in stacks.items():
        order = [members[key] for key in sorted(members)]
        if problem := _problem(name, members, [matrices[own] for own in order], matrices):
            problems.append(f"{name}: {problem}")
            continue
        experts = 1 + max(expert for expert, _ in members)
        first = matrices[order[0]]
        shape = (experts, len(order) // experts * first.shape[0])
        parts = tuple(part for own in order for part in matrices[own].parts)
        # One tensor of an expert's gate and up has one after the other.
        joined[name] = JoinedBiases(name, first.dtype, shape, parts, interleaved and name.endswith("gate_up_proj_bias"))
    if problems:
        raise JaxmoeError(f"the experts' biases are not complete or do not fit: {listing(problems)}")
    return joined


def _problem(
    name: str, members: Mapping[tuple[int, str], str], found: Sequence[Matrix], matrices: Mapping[str, Matrix]
) -> str | None:
    """Return why biases cannot be put together, None if they can."""
    if name in matrices:
        return "the biases are there twice, together and for single experts"
    kinds = sorted({projection for _, projection in members})
    if kinds not in (["down"], ["gate", "up"], ["gate_up"]):
        return f"there are biases of {' and '.join(kinds)} alone"
    experts = range(1 + max(expert for expert, _ in members))
    missing = [f"{kind} of expert {expert}" for expert in experts for kind in kinds if (expert, kind) not in members]
    if missing:
        return f"there is none for {listing(missing, 5)}"
    if len({(matrix.dtype, matrix.shape) for matrix in found}) > 1 or len(found[0].shape) != 1:
        return f"they differ: {listing(sorted({f'{matrix.dtype} {list(matrix.shape)}' for matrix in found}), 5)}"
    return None
