"""The code that a factored checkpoint carries, written without PyTorch."""

import ast
import subprocess
import sys

import pytest

from jaxmoe.checkpoint.factored_format import CODE, ExpertsModule, factored_config
from jaxmoe.checkpoint.families import FAMILIES, exports
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import LayerShape
from jaxmoe.factors.registry import KINDS

SIZES = LayerShape(experts=4, hidden=6, intermediate=5)
TWINS = {kind: "".join(map(str.capitalize, kind.split("_"))) + "Term" for kind in KINDS}


def code(*kinds: str, model_type: str = "qwen3_moe") -> dict[str, str]:
    """Return the code of a checkpoint that has terms of some kinds."""
    entry = ExpertsModule(SIZES, {"down": [{"kind": kind} for kind in kinds]})
    return remote_code(factored_config({"model_type": model_type}, {"model.layers.3.mlp.experts": entry}))


def classes(text: str) -> set[str]:
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if "factored" in exports(name)])
def test_defines_the_classes_that_the_configuration_names(model_type):
    config = factored_config({"model_type": model_type}, {"model.layers.3.mlp.experts": ExpertsModule(SIZES, {})})
    defined = {name.removesuffix(".py"): classes(text) for name, text in remote_code(config).items()}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert name in defined[module]


def test_holds_the_twins_that_the_checkpoint_needs():
    assert tuple(code("dense")) == CODE
    for kind, name in TWINS.items():
        found = classes(code("dense", kind)["modeling_jaxmoe.py"])
        assert found & set(TWINS.values()) == {name, "DenseTerm"}
        assert {"FactoredExperts", "FactoredLinear", "Factored"} <= found


def test_the_same_terms_give_the_same_text():
    assert code("sparse", "dense", "grouped") == code("grouped", "sparse", "dense")


def test_imports_nothing_but_transformers_and_what_it_needs():
    text = code(*KINDS)["modeling_jaxmoe.py"]
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "packaging"}
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0")


@pytest.mark.parametrize("kinds", [("low_rank",), tuple(KINDS)])
def test_is_as_tidy_as_the_rest(kinds, tmp_path):
    for name, text in code(*kinds, model_type="granitemoehybrid").items():
        (tmp_path / name).write_text(text)
    for command in (["check"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "--config", "pyproject.toml", "--no-cache", str(tmp_path)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_writing_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from test_remote_code import code\n"
        "assert 'class FactoredExperts' in code('low_rank')['modeling_jaxmoe.py']"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=__file__.rpartition("/")[0])


def test_a_twin_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(KINDS["dense"], "twin", "no_such_package.twin")
    with pytest.raises(JaxmoeError, match=r"module no_such_package\.twin is not there"):
        code("dense")
