"""The published `config.json` of well-known models, and the shapes of their experts.

The files say what stands on the hub; only the long list of LongRoPE's factors in phi-3.5-moe is made up.
"""

import json
from pathlib import Path

from jaxmoe.factors import LayerShape

FOLDER = Path(__file__).parent / "published"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def config(name: str) -> dict:
    """Return a published config."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def first(record: dict, *names: str):
    """Return the first value of several names that is there; of a list, one for each layer, the first entry."""
    value = next(record[name] for name in names if record.get(name) is not None)
    return value[0] if isinstance(value, list) else value


def shapes(record: dict) -> dict[int, LayerShape]:
    """Return the shapes of the routed experts as a checkpoint's tensors would tell them."""
    shape = LayerShape(
        experts=first(record, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        hidden=record["hidden_size"],
        intermediate=first(record, "moe_intermediate_size", "intermediate_size"),
    )
    begin = record.get("first_k_dense_replace", record.get("moe_layer_start_index", 0))
    return dict.fromkeys(range(begin, record["num_hidden_layers"]), shape)


def transformers_reading(name: str):
    """Return transformers' configuration object of a published config; None where it has no such class."""
    from transformers import CONFIG_MAPPING

    record = config(name)
    model_type = {"kimi_k2": "deepseek_v3"}.get(record["model_type"], record["model_type"])
    if model_type not in CONFIG_MAPPING:
        return None
    plain = {key: value for key, value in record.items() if key not in ("model_type", "quantization_config")}
    return CONFIG_MAPPING[model_type](**plain)
