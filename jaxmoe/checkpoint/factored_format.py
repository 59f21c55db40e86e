"""What stands in the `config.json` of a factored checkpoint, written and read.

A factored checkpoint has a `model_type` of its own, `jaxmoe_<original>`, so that no program without our code takes it
for the original and runs it with random experts. That costs a question: transformers asks on a terminal whether to run
the checkpoint's code, also for the tokenizer, which needs none. Under the original's `model_type` it would not ask, but
then stock classes would have to refuse, and no value in a config makes all of them do so: before version 5 transformers
ignores unknown kinds of attention and experts, and GPT-OSS never reads the name of its activation.

The configuration is the original JSON edited in place: transformers may write other keys than the hub has. Under
`jaxmoe` stands the record: versions, the replaced keys of the original, and the `modules` that terms stand for, by
their paths in transformers. There are two kinds:

    experts   the routed experts of a layer: `shape` {experts, hidden, intermediate, gated}, `terms` of each target,
              `layout` of the dense experts on disk, and, where vectors compensate for experts that do not run,
              `main_experts` and `renorm`. Tensors `<module>.<target>.<position>.<tensor>`; vectors
              (`model/compressed_experts.py`) `<module>.auxiliary.<projection>` in float32.
    linear    one matrix, of an attention, a shared expert or a dense MLP: `shape` {out, in}, `terms`, `bias` (whether
              there is one; it stays where it was), `layout` of the dense matrix on disk. Tensors
              `<module>.<position>.<tensor>`.

`<tensor>` are the names that a term gives (`Term.tensors`). Format 1 had experts alone, as `experts` by path; format 3
is format 2 where arrays of terms lie in few bits, with `stores` in their entries.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

import jaxmoe
from jaxmoe.checkpoint.families import architecture
from jaxmoe.checkpoint.layout import Stack, check_layout
from jaxmoe.checkpoint.records import as_record
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import (
    CompressedLayer,
    CompressedLinear,
    LayerShape,
    LinearShape,
    LinearShapeRecord,
    ShapeRecord,
)
from jaxmoe.model.compressed_experts import MainExperts

FORMAT_VERSION = 3
"""The newest layout that this module writes and reads."""

_PLAIN = 2
"""The layout where no array lies in few bits: programs that know no such arrays read it too."""

PREFIX = "jaxmoe_"
"""Of the factored `model_type`."""

CODE = ("configuration_jaxmoe.py", "modeling_jaxmoe.py")
"""The Python files that a factored checkpoint carries, for PyTorch."""

_KEPT = ("model_type", "architectures", "auto_map")
"""The keys of the original configuration that are replaced, and kept beside the factors."""

_WHERE = "the jaxmoe record in config.json"
_MEND = "write the checkpoint again"

_Dtype = Literal["bfloat16", "float16", "float32", "float64"]


class Layout(msgspec.Struct, forbid_unknown_fields=True):
    """How the dense experts of a module lay on disk: in which dtype, and in which tensors."""

    dtype: _Dtype
    stacks: list[Stack]


class LinearLayout(msgspec.Struct, forbid_unknown_fields=True):
    """How the dense matrix `[out, in]` of a module lay on disk: in which dtype, and in which tensor."""

    dtype: _Dtype
    name: str


class ExpertsModule(NamedTuple):
    """What the record says of the routed experts of one layer.

    Args:
        shape: its sizes.
        terms: what `CompressedLayer.from_tensors` takes beside the tensors.
        layout: how the dense experts lay on disk, so that they can be written like that again; None where it was not
            written down.
        main: the experts that run, where vectors compensate for the others; None where all chosen ones do.
    """

    shape: LayerShape
    terms: Mapping[str, list[dict[str, Any]]]
    layout: Layout | None = None
    main: MainExperts | None = None

    def read(self, tensors: Mapping[str, Any]) -> CompressedLayer:
        """Return the layer from its tensors, or raise a `JaxmoeError` if they are not what the record says."""
        return CompressedLayer.from_tensors(tensors, self.terms, self.shape)

    def kinds(self) -> set[str]:
        """Return the kinds of its terms."""
        return {term["kind"] for terms in self.terms.values() for term in terms}


class LinearModule(NamedTuple):
    """What the record says of one matrix outside of the routed experts.

    Args:
        shape: its sizes.
        terms: what `CompressedLinear.from_tensors` takes beside the tensors.
        layout: how the dense matrix lay on disk, so that it can be written like that again.
        bias: whether the module has one, which no term stands for: it stays under the name that it had.
    """

    shape: LinearShape
    terms: list[dict[str, Any]]
    layout: LinearLayout
    bias: bool = False

    def read(self, tensors: Mapping[str, Any]) -> CompressedLinear:
        """Return the matrix from its tensors, or raise a `JaxmoeError` if they are not what the record says."""
        return CompressedLinear.from_tensors(tensors, self.terms, self.shape)

    def kinds(self) -> set[str]:
        """Return the kinds of its terms."""
        return {term["kind"] for term in self.terms}


Module = ExpertsModule | LinearModule


class _Experts(msgspec.Struct, forbid_unknown_fields=True, tag="experts", tag_field="kind"):
    shape: ShapeRecord
    terms: dict[str, list[dict[str, Any]]]
    layout: Layout | None = None
    main_experts: Annotated[int, msgspec.Meta(ge=1)] | None = None
    renorm: Literal["none", "main"] = "none"

    def module(self) -> ExpertsModule:
        shape = self.shape.shape
        if self.layout is not None:
            check_layout(self.layout.stacks, shape)
        main = None if self.main_experts is None else MainExperts(self.main_experts, self.renorm)
        return ExpertsModule(shape, self.terms, self.layout, main)


class _Linear(msgspec.Struct, forbid_unknown_fields=True, tag="linear", tag_field="kind"):
    shape: LinearShapeRecord
    terms: list[dict[str, Any]]
    layout: LinearLayout
    bias: bool

    def module(self) -> LinearModule:
        if not self.layout.name or not self.layout.name.isprintable():
            raise JaxmoeError(f"{self.layout.name!r} cannot be the name of one tensor")
        return LinearModule(self.shape.shape, self.terms, self.layout, self.bias)


_Path = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f]*?\.layers\.[0-9]{1,6}\.[^\x00-\x1f]+\Z")]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    version: str
    minimum_transformers: str
    model_type: str
    modules: Annotated[dict[_Path, _Experts | _Linear], msgspec.Meta(min_length=1)]
    architectures: Any = None
    auto_map: Any = None


def experts_modules(
    layers: Mapping[str, tuple[LayerShape, Mapping[str, Any]]],
    layouts: Mapping[str, Mapping[str, Any]] | None = None,
    main: MainExperts | None = None,
) -> dict[str, ExpertsModule]:
    """Return the modules of compressed layers.

    Args:
        layers: shape and spec (`CompressedLayer.spec`) of each, by the path of the experts module in transformers.
        layouts: how each module's dense experts lay on disk, as `Checkpoint.layouts` gives it.
        main: the experts that run, where vectors compensate for the others; None where all chosen ones do.
    """
    known = {} if layouts is None else msgspec.convert(layouts, dict[str, Layout])
    return {name: ExpertsModule(shape, dict(spec), known.get(name), main) for name, (shape, spec) in layers.items()}


def factored_config(config: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the original configuration edited for factored modules.

    Args:
        config: the original `config.json`.
        modules: what terms stand for, by the path in transformers. Modules that are not named stay stock ones.

    Raises:
        JaxmoeError: if the architecture's factored checkpoints could not be run.
    """
    stock = architecture(config["model_type"])
    record = {
        "format_version": FORMAT_VERSION if any(map(_in_few_bits, modules.values())) else _PLAIN,
        "version": jaxmoe.__version__,
        "minimum_transformers": stock.since,
        **{key: config[key] for key in _KEPT if key in config},
        "modules": {name: _entry(module) for name, module in modules.items()},
    }
    causal = f"Factored{stock.causal}"
    edited = {
        "model_type": PREFIX + config["model_type"],
        "architectures": [causal],
        "auto_map": {
            **{key: code for key, code in (config.get("auto_map") or {}).items() if key == "AutoTokenizer"},
            "AutoConfig": f"configuration_jaxmoe.Factored{stock.config}",
            "AutoModel": f"modeling_jaxmoe.Factored{stock.base}",
            "AutoModelForCausalLM": f"modeling_jaxmoe.{causal}",
        },
        "jaxmoe": record,
    }
    return {**config, **edited}


def _in_few_bits(module: Module) -> bool:
    terms = [module.terms] if isinstance(module, LinearModule) else module.terms.values()
    return any("stores" in entry for entries in terms for entry in entries)


def _entry(module: Module) -> dict[str, Any]:
    if isinstance(module, LinearModule):
        entry = {"kind": "linear", "shape": module.shape.as_json(), "terms": module.terms, "bias": module.bias}
        return {**entry, "layout": msgspec.to_builtins(module.layout)}
    entry = {"kind": "experts", "shape": module.shape._asdict(), "terms": module.terms}
    if module.layout is not None:
        entry["layout"] = msgspec.to_builtins(module.layout)
    return {**entry, **({} if module.main is None else module.main.as_json())}


def is_factored(config: Mapping[str, Any]) -> bool:
    """Tell whether a `config.json` is that of a factored checkpoint.

    Example:
        >>> is_factored({"model_type": "qwen3_moe"})
        False
    """
    return str(config.get("model_type", "")).startswith(PREFIX)


def read_record(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Module]]:
    """Return the original configuration of a factored checkpoint, and what its record says of each module.

    Raises:
        JaxmoeError: if the checkpoint is not factored, its format is newer than this version's or its record damaged.
    """
    record = config.get("jaxmoe")
    if not is_factored(config) or not isinstance(record, Mapping):
        raise JaxmoeError(
            f"model_type {config.get('model_type')!r} is not a factored checkpoint: it has no jaxmoe record"
        )
    version = record.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise JaxmoeError(
            f"the checkpoint has jaxmoe's format {version}, written by jaxmoe {record.get('version')}, and jaxmoe "
            f"{jaxmoe.__version__} reads up to {FORMAT_VERSION}: pip install --upgrade jaxmoe"
        )
    found = as_record(_as_format_2(record) if version == 1 else record, _Record, _WHERE, _MEND)
    if config["model_type"] != PREFIX + found.model_type:
        raise JaxmoeError(f"model_type {config['model_type']!r}, and in {_WHERE} {found.model_type!r}: {_MEND}")
    modules: dict[str, Module] = {}
    for name, entry in found.modules.items():
        try:
            modules[name] = entry.module()
        except JaxmoeError as error:
            raise JaxmoeError(f"the layout of {name} in {_WHERE}: {error}; {_MEND}") from None
    indices = [layer_index(name) for name, module in modules.items() if isinstance(module, ExpertsModule)]
    if twice := sorted({index for index in indices if indices.count(index) > 1}):
        raise JaxmoeError(f"{_WHERE} names several experts of layer {', '.join(map(str, twice))}: {_MEND}")
    kept = {key: record[key] for key in _KEPT if key in record}
    original = {key: kept.get(key, value) for key, value in config.items() if key != "jaxmoe"}
    for key in _KEPT:
        if key not in kept:
            original.pop(key, None)
    return original, modules


def _as_format_2(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of format 1 as format 2 has it."""
    if "modules" in record:
        raise JaxmoeError(f"{_WHERE} does not hold what it should (format 1 has no modules): {_MEND}")
    experts = record.get("experts")
    if isinstance(experts, Mapping):
        experts = {
            name: {**entry, "kind": "experts"} if isinstance(entry, Mapping) else entry
            for name, entry in experts.items()
        }
    rest = {key: value for key, value in record.items() if key != "experts"}
    return {**rest, **({"modules": experts} if "experts" in record else {})}


def layer_index(module: str) -> int:
    """Return the layer of a module by its path in transformers.

    Example:
        >>> layer_index("model.layers.3.mlp.experts")
        3
    """
    return int(module.split(".layers.")[1].split(".")[0])
