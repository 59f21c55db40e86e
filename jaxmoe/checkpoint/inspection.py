"""What a checkpoint is, from its config and headers alone: architecture, layers, experts, sizes, dtypes, support."""

from collections import Counter
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored, layer_index
from jaxmoe.checkpoint.families import decoder_config, exports, lookup
from jaxmoe.checkpoint.reader import Checkpoint


def inspect(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint, original or written by jaxmoe, without reading its numbers.

    Raises:
        JaxmoeError: if it cannot be read.
    """
    folder = hub.resolve(source, revision)
    opened = CompressedCheckpoint.open(folder) if is_factored(files.read_config(folder)) else Checkpoint.open(folder)
    dtypes = Counter()
    for entry in opened.tensors.values():
        dtypes[entry.dtype] += entry.bytes
    common = {
        "folder": str(folder),
        "tensors": len(opened.tensors),
        "parameters": opened.parameters,
        "bytes": opened.bytes,
        "dtypes": dict(dtypes.most_common()),
    }
    return {**common, **(_compressed(opened) if isinstance(opened, CompressedCheckpoint) else _original(opened))}


def _original(checkpoint: Checkpoint) -> dict[str, Any]:
    expert_parameters = sum(layer.shape.numbers for layer in checkpoint.layers)
    family = checkpoint.family
    return {
        "model_type": checkpoint.model_type,
        "known": family is not None,
        "compressed": False,
        "expert_parameters": expert_parameters,
        "experts_per_token": lookup(decoder_config(checkpoint.config), family.top_k) if family else None,
        "routing": family.routing if family else None,
        "moe_layers": [layer.index for layer in checkpoint.layers],
        "layers": [
            {"layer": layer.index, "module": layer.module, "dtype": str(layer.dtype), **layer.shape._asdict()}
            for layer in checkpoint.layers
        ],
        "exports": exports(checkpoint.model_type),
        "notes": list(checkpoint.notes),
    }


def _compressed(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    return {
        "model_type": checkpoint.config["model_type"],
        "known": True,
        "compressed": True,
        "expert_parameters": checkpoint.count().numbers,
        "moe_layers": [layer_index(module) for module in checkpoint.modules],
        "layers": [
            {
                "module": module,
                **record.shape._asdict(),
                "terms": record.terms,
                **({} if record.main is None else record.main.as_json()),
            }
            for module, record in checkpoint.experts.items()
        ],
        "linear_parameters": checkpoint.count_linears().numbers,
        "linears": [
            {"module": module, **record.shape.as_json(), "bias": record.bias, "terms": record.terms}
            for module, record in checkpoint.linears.items()
        ],
        "main_experts": max((main.count for main in checkpoint.main.values()), default=None),
        "exports": [] if checkpoint.main else ["dense"],
        "notes": [f"compressed by jaxmoe {checkpoint.config['jaxmoe'].get('version')}", *checkpoint.notes],
    }
