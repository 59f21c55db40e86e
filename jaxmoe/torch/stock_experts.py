"""The routed experts of a stock transformers model, whatever its family: find them, and run one expert at a time.

Since version 5 transformers keeps all experts of a layer in one module named `experts`, called with
`(hidden_states, top_k_index, top_k_weights)`, and says by flags how their matrices lie: gate and up stacked or
interleaved, transposed or not, with or without biases, gate and norm behind. Whatever does not follow that contract is
refused by name.
"""

import inspect
import re
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape

_FLAGS = ("has_gate", "is_transposed", "is_concatenated")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class StockExperts(NamedTuple):
    """The experts module of one layer.

    Args:
        path: in the model, such as `model.layers.3.mlp.experts`.
        module: itself.
        shape: sizes.
    """

    path: str
    module: Any
    shape: LayerShape

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that hold the matrices, under the module's names."""
        first = "gate_up_proj" if self.shape.gated else "up_proj"
        return {name: getattr(self.module, name) for name in (first, "down_proj")}

    def intermediate(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Return h, the input of an expert's down projection, in the dtype of its rows."""
        if self.shape.gated:
            return self.module._apply_gate(self._linear(rows, "gate_up_proj", expert))
        return self.module.act_fn(self._linear(rows, "up_proj", expert))

    def output(self, intermediate: torch.Tensor, expert: int) -> torch.Tensor:
        """Return an expert's output from h, before the router's weight."""
        out = self._linear(intermediate, "down_proj", expert)
        return self.module.post_expert_norm(out) if getattr(self.module, "has_post_expert_norm", False) else out

    def projections(self, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what lies in one expert's part of a parameter (or of its gradient) as `[out, in]` by projection."""
        if self.module.is_transposed:
            matrix = matrix.T
        if name != "gate_up_proj":
            return {name.removesuffix("_proj"): matrix}
        parts = matrix.chunk(2) if self.module.is_concatenated else (matrix[::2], matrix[1::2])
        return dict(zip(("gate", "up"), parts))

    def arguments(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows `[token, hidden]`, chosen experts and weights `[token, top_k]` from a call of the module."""
        bound = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        rows, chosen, weights = tuple(bound.values())[:3]
        rows, chosen = rows.reshape(-1, rows.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        if weights.numel() != chosen.numel() or len(rows) != len(chosen) or rows.shape[1] != self.shape.hidden:
            raise JaxmoeError(
                f"{self.path} was called with rows {tuple(rows.shape)}, experts {tuple(chosen.shape)} and weights"
                f" {tuple(weights.shape)}: this family does not follow transformers' contract for experts"
            )
        if int(chosen.max()) >= self.shape.experts:
            raise JaxmoeError(
                f"{self.path} holds {self.shape.experts} experts and was asked for number {int(chosen.max())}: this"
                " family has experts without matrices, which are not supported"
            )
        return rows, chosen, weights.reshape(chosen.shape)

    def _linear(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        matrix, bias = getattr(self.module, name)[expert], getattr(self.module, f"{name}_bias", None)
        matrix = (matrix.T if self.module.is_transposed else matrix).to(rows.dtype)
        return F.linear(rows, matrix, None if bias is None else bias[expert].to(rows.dtype))


def find_experts(model: torch.nn.Module) -> dict[int, StockExperts]:
    """Return the experts modules of a model by the index of their layer.

    Raises:
        JaxmoeError: there are none, or some do not follow transformers' contract; all of them are listed.
    """
    found: dict[int, StockExperts] = {}
    problems = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] != "experts":
            continue
        numbers = re.findall(r"\.(\d+)\.", path)
        problem = _problem(module) or ("" if len(numbers) == 1 else "its layer cannot be told")
        if problem:
            problems.append(f"{path} ({type(module).__name__}): {problem}")
        else:
            found[int(numbers[0])] = StockExperts(path, module, _shape(module))
    if problems:
        raise JaxmoeError(
            f"statistics cannot be gathered from {listing(problems, 5)}; the model has to be a dense one whose experts"
            " modules follow transformers 5"
        )
    if not found:
        raise JaxmoeError(
            f"{type(model).__name__} has no module called `experts` as transformers 5 has them: its routed experts, if"
            " it has any, are not supported"
        )
    return dict(sorted(found.items()))


def _problem(module: Any) -> str:
    """Return why a module does not follow the contract, an empty text if it does."""
    if missing := [flag for flag in _FLAGS if not hasattr(module, flag)]:
        return f"it lacks {', '.join(missing)}"
    named = "gate_up_proj" if module.has_gate else "up_proj"
    for name in (named, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 3:
            return f"it has no stacked {name}"
        if weight.dtype not in _DTYPES:
            return f"its weights are {weight.dtype}"
    if len(inspect.signature(module.forward).parameters) != 3:
        return "it is not called with rows, experts and weights"
    shape, first = _shape(module), tuple(getattr(module, named).shape)
    rows = (2 if shape.gated else 1) * shape.intermediate
    if first != (shape.experts, *((shape.hidden, rows) if module.is_transposed else (rows, shape.hidden))):
        return f"its {named} {first} and down_proj {tuple(module.down_proj.shape)} do not fit together"
    return ""


def _shape(module: Any) -> LayerShape:
    experts, hidden, intermediate = module.down_proj.shape
    if module.is_transposed:
        hidden, intermediate = intermediate, hidden
    return LayerShape(experts, hidden, intermediate, module.has_gate)
