"""The Python files that travel with a factored checkpoint: the classes of its architecture, and what they run.

The code is that of `jaxmoe/torch/runtime`, in one file: what every factored model needs and the twins of the terms that
this checkpoint has, each module behind those that it imports. PyTorch is not needed to write it, so the modules are
read, not imported. The same terms give the same text.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

import jaxmoe
from jaxmoe.checkpoint.factored_format import CODE, PREFIX, read_record
from jaxmoe.checkpoint.families import TransformersClasses, architecture
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.registry import twin

RUNTIME = "jaxmoe.torch.runtime"
"""The package that is assembled; twins of terms may lie elsewhere and import from it."""

_LICENCE = "# SPDX-License-Identifier: Apache-2.0\n# Copyright The jaxmoe developers\n"
_WIDTH = 120


def remote_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the Python files of a factored checkpoint by name.

    Args:
        config: the factored configuration.

    Raises:
        JaxmoeError: the configuration is not that of a factored checkpoint, or a twin's file is not there.
    """
    original, modules = read_record(config)
    model_type, kinds = original["model_type"], {kind for module in modules.values() for kind in module.kinds()}
    stock = architecture(model_type)
    modeling = _modeling(model_type, stock, kinds)
    # Transformers keeps one model class for each configuration class: that of other terms has to be another one.
    digest = sha256(modeling.encode()).hexdigest()
    return dict(zip(CODE, (_configuration(model_type, stock, digest), modeling), strict=True))


def _configuration(model_type: str, stock: TransformersClasses, digest: str) -> str:
    return f'''\
{_LICENCE}"""The configuration of {model_type} with factored modules, written by jaxmoe {jaxmoe.__version__}."""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("{stock.since}"):
    raise ImportError(
        "{model_type} as factored by jaxmoe needs transformers {stock.since} or newer, but "
        f"{{transformers.__version__}} is installed: pip install --upgrade transformers"
    )

from {stock.configuration} import {stock.config}


class Factored{stock.config}({stock.config}):
    """For the model classes in modeling_jaxmoe.py of SHA-256 {digest[:32]}."""

    model_type = "{PREFIX}{model_type}"
'''


def _modeling(model_type: str, stock: TransformersClasses, kinds: Iterable[str]) -> str:
    roots = [f"{RUNTIME}.requirements", *map(twin, sorted(kinds)), f"{RUNTIME}.loading"]
    parts = _ordered(roots)
    described = _Part.read(RUNTIME).doc.partition("\n")[2].strip()
    bodies = "\n\n\n".join(part.body for part in parts)
    classes = _import(stock.modeling, sorted((stock.base, stock.causal)), "  # noqa: E402")
    return f'''\
{_LICENCE}"""Run {model_type} with sums of factored terms for matrices, written by jaxmoe {jaxmoe.__version__}.

{described}
"""

{_imports(parts)}

{bodies}


{classes}

from .configuration_jaxmoe import Factored{stock.config}  # noqa: E402


class Factored{stock.base}(Factored, {stock.base}):
    config_class = Factored{stock.config}
    config: Factored{stock.config}


class Factored{stock.causal}(Factored, {stock.causal}):
    config_class = Factored{stock.config}
    config: Factored{stock.config}


copy_conversions(Factored{stock.config}, Factored{stock.base}, Factored{stock.causal})
'''


class _Part(NamedTuple):
    """One module of the runtime: docstring, what it imports from here and from elsewhere, and the rest of its text."""

    module: str
    doc: str
    needs: list[str]
    imports: list[tuple[str, str | None]]
    names: set[str]
    body: str

    @classmethod
    def read(cls, module: str) -> "_Part":
        text = _source(module)
        tree, lines = ast.parse(text), text.splitlines()
        needs, imports, names, dropped = [], [], set(), set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(RUNTIME):
                needs.append(node.module or "")
            elif isinstance(node, ast.ImportFrom):
                imports += [(node.module or "", ast.unparse(alias)) for alias in node.names]
            elif isinstance(node, ast.Import):
                imports += [(ast.unparse(alias), None) for alias in node.names]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [node]
                names |= {getattr(target, "name", getattr(target, "id", "")) for target in targets} - {""}
                continue
            dropped |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
        doc = ast.get_docstring(tree, clean=False) or ""
        if doc:
            dropped |= set(range(tree.body[0].lineno - 1, tree.body[0].end_lineno or 0))
        dropped |= {number for number, line in enumerate(lines) if line in _LICENCE.splitlines()}
        body = "\n".join(line for number, line in enumerate(lines) if number not in dropped).strip("\n")
        return cls(module, doc, needs, imports, names, body)


def _source(module: str) -> str:
    """Return the text of a module, without importing it or the packages that it lies in."""
    path, found = None, None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:end]), path)
        if found is None:
            break
        path = found.submodule_search_locations
    get_source = getattr(getattr(found, "loader", None), "get_source", None)
    text = None if get_source is None else get_source(module)
    if text is None:
        raise JaxmoeError(f"the PyTorch code in module {module} is not there, so that no checkpoint can carry it")
    return text


def _ordered(roots: Iterable[str]) -> list[_Part]:
    """Return modules and all that they need from here, each behind those that it needs."""
    parts: dict[str, _Part] = {}

    def add(module: str) -> None:
        if module in parts:
            return
        part = _Part.read(module)
        for needed in part.needs:
            add(needed)
        for other in parts.values():
            if twice := part.names & other.names:
                raise JaxmoeError(
                    f"{other.module} and {module} both define {', '.join(sorted(twice))}, and would stand in one file:"
                    " rename one"
                )
        parts[module] = part

    for root in roots:
        add(root)
    return list(parts.values())


def _imports(parts: Iterable[_Part]) -> str:
    """Return all imports from elsewhere, sorted as linters do it: the standard library first."""
    wanted = {pair for part in parts for pair in part.imports}
    blocks = []
    for standard in (True, False):
        own = {pair for pair in wanted if (pair[0].split(".")[0].split(" ")[0] in sys.stdlib_module_names) is standard}
        lines = [f"import {module}" for module in sorted(module for module, name in own if name is None)]
        for module in sorted({module for module, name in own if name is not None}):
            names = sorted((name for other, name in own if other == module and name is not None), key=_order)
            lines.append(_import(module, names))
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block)


def _import(module: str, names: Iterable[str], note: str = "") -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line + note
    return f"from {module} import ({note}\n" + "".join(f"    {name},\n" for name in names) + ")"


def _order(name: str) -> tuple[int, str]:
    """Sort constants before classes before functions."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name
