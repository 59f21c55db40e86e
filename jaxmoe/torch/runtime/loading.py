# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Factored models."""

from typing import Any

from transformers import PreTrainedModel, conversion_mapping

from jaxmoe.torch.runtime.blended import cache_blends
from jaxmoe.torch.runtime.experts import FactoredExperts
from jaxmoe.torch.runtime.linear import FactoredLinear
from jaxmoe.torch.runtime.requirements import FORMAT_VERSION
from jaxmoe.torch.runtime.term import Term

MODULES = {"experts": FactoredExperts, "linear": FactoredLinear}
"""What replaces stock modules, by the kind that stands in `config.jaxmoe`."""


def modules_of(record):
    """Return the entries of the factored modules by their paths in the causal language model."""
    if record["format_version"] == 1:
        return {path: {"kind": "experts", **entry} for path, entry in record["experts"].items()}
    return record["modules"]


def swap_modules(model, entries):
    """Replace the modules that `entries` names, on whatever device they are, the meta device too.

    Args:
        model: a causal language model or its base model.
        entries: for each module, by its path in the causal language model, its `kind`, `shape` and `terms`.

    Raises:
        ValueError: if a module is missing or an entry does not fit it.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    paths = {path: path if path in modules else path.removeprefix(prefix) for path in entries}
    if missing := [path for path in entries if paths[path] not in modules]:
        raise ValueError(f"{type(model).__name__} has no module {', '.join(missing)} that config.jaxmoe names")
    for path, entry in entries.items():
        if entry.get("kind") not in MODULES:
            raise ValueError(f"{path}: unknown kind {entry.get('kind')!r}: this code knows {', '.join(MODULES)}")
        try:
            factored = MODULES[entry["kind"]](modules[paths[path]], entry)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error
        model.set_submodule(paths[path], factored)


class Factored(PreTrainedModel):
    """Mixed into a stock model class: swaps modules and refuses to run without their tensors."""

    def __init__(self, config, *args, **kwargs):
        record = config.jaxmoe
        if record["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has jaxmoe's format {record['format_version']}, and this code reads up to "
                f"{FORMAT_VERSION}: pip install --upgrade jaxmoe, or use the code inside the checkpoint"
            )
        super().__init__(config, *args, **kwargs)
        entries = modules_of(record)
        swap_modules(self, entries)
        cache_blends(self, record.get("cache_blends", False))
        if any("main_experts" in entry for entry in entries.values()):
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), "experts.auxiliary"}
        # Factors are replicated, not split over devices, and the stock plans would sum or mask the replicas' outputs.
        plan = self._tp_plan or {}
        whole = any(entry["kind"] == "linear" for entry in entries.values())
        self._tp_plan = {} if whole else {name: rule for name, rule in plan.items() if "experts" not in name.split(".")}
        self._ep_plan = {}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Load as transformers does, but never leave a factored module with missing, mismatched or stray tensors."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        prefix = f"{model.base_model_prefix}."
        paths = tuple(f"{path}." for path in modules_of(model.config.jaxmoe))
        paths += tuple(path.removeprefix(prefix) for path in paths)
        lost = []
        for trouble in ("missing", "mismatched", "unexpected"):
            names = (name if isinstance(name, str) else name[0] for name in info[f"{trouble}_keys"])
            lost += [f"{name} ({trouble})" for name in sorted(names) if name.startswith(paths)]
        if lost:
            raise ValueError(
                f"{len(lost)} tensors of factored modules do not agree with config.json: {', '.join(lost[:20])}"
                f"{', ...' if len(lost) > 20 else ''}. The checkpoint is damaged or incomplete: fetch or write it again"
            )
        for module in model.modules():
            if isinstance(module, Term):
                module.prepare()
        return (model, info) if output_loading_info else model


def copy_conversions(config, *models):
    """Convert names on disk for factored classes as for the stock classes that they extend.

    Args:
        config: the factored configuration class, whose parent is the stock one.
        models: the factored model classes, `Factored` and a stock class their parents.
    """
    pairs = [(config.model_type, config.__base__.model_type)]
    pairs += [(model.__name__, model.__bases__[-1].__name__) for model in models]
    for factored, stock in pairs:
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(factored, mapping, overwrite=True)
