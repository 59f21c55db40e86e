"""How Sphinx builds these pages. Settings and the API reference are made from the code, so that they cannot drift."""

import inspect
import re
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxmoe
from jaxmoe import methods

project = "jaxmoe"
author = "The jaxmoe developers"
version = release = jaxmoe.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Browsers draw MathML themselves: the pages need no network and no script.
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jaxmoe"
html_theme_options = {"source_repository": "https://github.com/jaxmoe/jaxmoe", "source_directory": "docs/"}
html_show_copyright = False
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Types of fields such as `bytes` and `layers` have names that records have too.
suppress_warnings = ["myst.header", "ref.python"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False

GENERATED = Path(__file__).parent / "api" / "generated"

FURTHER = ("jaxmoe.methods", "jaxmoe.scores", "jaxmoe.comparison", "jaxmoe.report.plots", "jaxmoe.allocation")
"""Modules of which all public names are listed, beside the names of `jaxmoe` itself."""


def pages() -> dict[str, list[str]]:
    """Return the public names by the module that they are documented with."""
    found = {}
    for name, names in jaxmoe._HOMES.items():
        module = import_module(name)
        found[name] = [
            *names,
            *(own for own in _public(module) if own not in names and _is_record(getattr(module, own))),
        ]
    for name in FURTHER:
        module = import_module(name)
        found[name] = sorted({*found.get(name, ()), *_public(module)})
    return found


def _public(module: ModuleType) -> list[str]:
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", None) or own
    return [name for name in names if not name.startswith("_") and callable(getattr(module, name))]


def _is_record(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, tuple)


def write_api(_app: Any) -> None:
    """Write a page for each module of the API reference."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    written = set()
    for name, names in pages().items():
        module = import_module(name)
        lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
        for own in names:
            kind = "autoclass" if inspect.isclass(getattr(module, own)) else "autofunction"
            lines += [f".. {kind}:: {name}.{own}", *(["   :members:"] if kind == "autoclass" else []), ""]
        path = GENERATED / f"{name}.rst"
        written.add(path)
        text = "\n".join(lines)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in set(GENERATED.glob("*.rst")) - written:
        path.unlink()


def plain_docstring(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """Make a docstring reStructuredText: indented mathematics is literal, and stars and bars are themselves."""
    section = False
    result: list[str] = []
    for position, line in enumerate(lines):
        if line and not line.startswith(" "):
            section = bool(re.fullmatch(r"(Args|Returns|Raises|Source|Example|Yields):", line))
        begins = position > 0 and not lines[position - 1].strip()
        if line.startswith("    ") and not section:
            if begins:
                result += [".. code-block:: text", ""]
            result.append(line)
        elif line.lstrip().startswith((">>>", "...")):
            result.append(line)
        else:
            parts = re.split(r"(`[^`]*`)", line)
            result.append("".join(p if p.startswith("`") else re.sub(r"(?<!\\)([*|])", r"\\\1", p) for p in parts))
    lines[:] = result


def plain_signature(_app, _what, _name, _obj, _options, signature: str | None, returns: str | None):
    """Name arrays in signatures as the code does."""
    return tuple(x and x.replace("jaxlib._jax.", "").replace("jaxtyping.", "") for x in (signature, returns))


def skip_fields(_app, _what, _name, thing, skip: bool, _options) -> bool | None:
    """Leave out the fields of records: their docstrings would only number them."""
    return skip or (inspect.getdoc(thing) or "").startswith("Alias for field number") or None


def inline_mathml(writer, node) -> None:
    """Write a formula within a line."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_mathml(writer, node) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f'<p class="formula">{convert(node.astext(), display="block")}</p>')
    raise nodes.SkipNode


class SettingsTable(Directive):
    """`{settings} METHOD`: every setting of a method, its values as published and improved, and its meaning."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        method = methods.get(name)
        # Settings that several methods have are described once, in the class that they extend.
        meaning = {name: text for own in reversed(method.settings.__mro__) for name, text in documented(own).items()}
        both = [method.settings(setting=setting) for setting in ("paper", "improved")]
        rows = ["| setting | paper | improved | meaning |", "|---|---|---|---|"]
        for own in fields(method.settings):
            if own.name != "setting":
                values = " | ".join(f"`{getattr(settings, own.name)}`" for settings in both)
                rows.append(f"| `{own.name}` | {values} | {meaning.get(own.name, '')} |")
        if len(rows) == 2:
            rows = ["It has none of its own."]
        node = nodes.container()
        self.state.nested_parse(StringList(rows, source=name), self.content_offset, node)
        return node.children


def documented(settings: type) -> dict[str, str]:
    """Return what the docstring of a class says of each argument."""
    text = inspect.cleandoc(settings.__doc__ or "")
    found: dict[str, str] = {}
    name = None
    for line in text.partition("Args:\n")[2].split("\n\n")[0].splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def setup(app) -> None:
    app.add_directive("settings", SettingsTable)
    app.add_html_math_renderer("mathml", (inline_mathml, None), (block_mathml, None))
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("builder-inited", write_api)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
