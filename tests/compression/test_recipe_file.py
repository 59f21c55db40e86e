"""Recipe files: what they may hold, what is said of everything else, and that each output holds its own."""

import inspect
import json
import re

import pytest
import yaml
from program import call, checksums
from two_layers import short_demo

import jaxmoe
from jaxmoe.cli.app import app
from jaxmoe.compression.recipe_file import NAME, RecipeFile, read_recipe, recipe_yaml
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError

HOW = {"recipe", "resume", "as_json", "weighted"}
"""Options of the command line that say how to run, not what."""


@pytest.fixture
def written(tmp_path):
    """A function that writes a file and returns its path."""

    def write(content: str, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_every_option_of_the_command_line_may_stand_in_a_file():
    (command,) = (own for own in app.registered_commands if own.callback.__name__ == "compress")
    names = {name.rstrip("_") for name in command.callback.__wrapped__.__annotations__} - {"ctx", "return"}
    assert names - HOW - {"checkpoint", "output"} == set(RecipeFile.__struct_fields__)


def test_yaml_and_json_say_the_same(written):
    options = {"method": "reap+mobe", "ratio": 0.4, "set": {"mobe.steps": 300, "mobe.alike": True}, "text": ["a", "b"]}
    assert read_recipe(written(yaml.safe_dump(options))) == options
    assert read_recipe(written(json.dumps(options), "recipe.json")) == options


def test_values_are_those_of_the_command_line(written):
    text = "{main-experts: 2, ratio: 1, layers: '0:4', ignore_config_keys: 'a, b', seed: null}"
    assert read_recipe(written(text)) == {
        "main_experts": 2,
        "ratio": 1.0,
        "layers": (0, 4),
        "ignore_config_keys": ["a", "b"],
    }
    assert read_recipe(written("layers: [2, 5]"))["layers"] == (2, 5)


WRONG = {
    "unknown": ("methods: svd", "there is no option 'methods', do you mean method"),
    "nothing alike": ("zzzzzz: 1", "there is no option 'zzzzzz', there are method, ratio"),
    "several": ("{rato: 1, sed: 2}", "'rato', do you mean ratio.*'sed', do you mean seed"),
    "text for a number": ("ratio: much", "ratio: 'much' is nothing that it takes, give a number"),
    "fraction for a whole number": ("seed: 0.5", "seed: 0.5 .*, give a whole number"),
    "number for true": ("sequential: 1", "sequential: 1 .*, give true or false"),
    "number in a list": ("text: [1]", r"text: \[1\] .*, give text, or a list of texts"),
    "list for settings": ("set: [steps=3]", "set: .*, give settings by name"),
    "nested settings": ("set: {mobe: {steps: 3}}", r"set: .*at `\$\[...\]`.*, give settings by name"),
    "time of day": ("layers: 1:30", "layers: 90 .*, give FIRST:END in quotes"),
    "bad layers": ("layers: '5:2'", "--layers 5:2: give FIRST:END"),
    "twice": ("ratio: 0.2\nratio: 0.4", "line 1: this is no YAML .*ratio stands there twice"),
    "twice in two spellings": ("{main-experts: 1, main_experts: 2}", "stands there twice"),
    "no YAML": ("method: svd\nratio: [0.4", "line 2: this is no YAML"),
    "tab": ("method: svd\n\tratio: 0.4", "line 2: this is no YAML"),
    "a list": ("[svd]", "holds no options: give them by name"),
    "empty": ("", "holds no options"),
    "not UTF-8": (b"method: \xff", "is not UTF-8"),
    "an object": ("!!python/object/apply:os.getcwd []", "line 1: this is no YAML"),
    "control character": ("method: \x01", "is no YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(written, case):
    content, message = WRONG[case]
    path = written(content)
    with pytest.raises(JaxmoeError, match=f"(?s){re.escape(str(path))}.*{message}|^{message}"):
        read_recipe(path)


def test_wrong_json_has_its_line(written):
    with pytest.raises(JaxmoeError, match="line 2: this is no JSON"):
        read_recipe(written('{"method": "svd",\n ratio}', "recipe.json"))


def test_a_missing_file_is_named(tmp_path):
    for command in (("plan", demo_checkpoint()), ("compress", demo_checkpoint(), tmp_path / "out")):
        done = call(*command, "--recipe", tmp_path / "none.yaml")
        assert done.returncode == 1
        assert "none.yaml does not exist" in done.stderr


def test_nested_anchors_end_in_a_message(written):
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else '1'}]" for n in range(9))
    with pytest.raises(JaxmoeError, match="there is no option 'a0'") as caught:
        read_recipe(written(bomb))
    assert len(str(caught.value)) < 4000
    with pytest.raises(JaxmoeError, match="give text, or a list of texts") as caught:
        read_recipe(written(f"set: {{x: 1}}\ntext: [{', '.join(['[[[1]]]'] * 10_000)}]"))
    assert len(str(caught.value)) < 1000


def test_what_is_written_is_read_again(tmp_path):
    options = {"method": "svd", "ratio": 0.1 + 0.2, "text": ["a b: c", "über"], "set": {"x": "1e-3", "y": False}}
    (tmp_path / NAME).write_text(recipe_yaml(options, comment="two\nlines"), encoding="utf-8")
    assert read_recipe(tmp_path / NAME) == options


def test_a_recipe_is_checked_without_running(written):
    said = call("plan", demo_checkpoint(), "--recipe", written("{method: reap+svd, ratio: 0.4}"), "--json")
    assert json.loads(said.stdout) == jaxmoe.plan(demo_checkpoint(), "reap+svd", ratio=0.4).as_json()
    refused = {
        "{ratio: 0.4}": (2, "give a method such as svd, or --recipe FILE"),
        "{method: svd+reap, ratio: 0.4}": (1, "the order is reap+svd"),
        "{method: svd, ratio: 0.9999}": (1, "out of reach"),
        "{method: svd, ratio: 0.4, text: nowhere.txt}": (1, "nowhere.txt does not exist"),
        "{method: svd, ratio: 0.4, export: slim}": (1, "removes no experts and no channels"),
        "{method: mobe, ratio: 0.4, set: {stps: 3}}": (1, "the settings of mobe are"),
        "{method: svd, ratio: 0.4, gradients: sequence}": (1, "--gradients goes with --text"),
        "{method: svd, ratio: 0.4, statistics: a, text: b}": (1, "both --statistics and --text"),
        "{method: svd, ratio: 0.4, seed: -1}": (1, "seed -1: give a number from 0"),
        "{method: svd, ratio: 0.4, unit: bits}": (1, "unit 'bits': give parameters or bytes"),
        "{method: svd, ratio: 0.4, of: all}": (1, "of 'all': give"),
        "{method: svd, ratio: 0.4, setting: best}": (1, "setting 'best': give paper or improved"),
    }
    for content, (code, message) in refused.items():
        done = call("plan", demo_checkpoint(), "--recipe", written(content))
        assert (done.returncode, message in done.stderr) == (code, True), (content, done.stderr)


def test_the_command_line_overrides_the_file(written):
    path = written("{method: mobe, ratio: 0.2, set: {steps: 7, bases: 2}}")
    done = call("plan", demo_checkpoint(), "--recipe", path, "--ratio", 0.5, "--set", "steps=9", "--json")
    plan = json.loads(done.stdout)
    assert plan["requested"]["ratio"] == 0.5
    assert (plan["settings"]["steps"], plan["settings"]["bases"]) == (9, 2)


def test_defaults_are_those_of_the_function():
    """The command line hands on what it is given alone; what it shows as defaults has to be true all the same."""
    for command in app.registered_commands:
        if command.callback.__name__ in ("plan", "compress"):
            ours = inspect.signature(getattr(jaxmoe, command.callback.__name__)).parameters
            for name, own in inspect.signature(command.callback.__wrapped__).parameters.items():
                if own.default not in (inspect.Parameter.empty, None) and name != "as_json":
                    assert getattr(own.default, "value", own.default) == ours[name].default, name


SHORT = {"sequences": 2, "length": 32}
RUNS = {
    "weights alone": ("svd", {"ratio": 0.5, "seed": 3}),
    "given statistics": ("svd", {"ratio": 0.4, "statistics": ..., "allocation": "spectral", "setting": "paper"}),
    "texts": ("reap", {"ratio": 0.25, "text": demo_texts()[:2], **SHORT}),
    "two steps": (
        "reap+svd",
        {"ratio": 0.2, "of": "model", "set": {"svd.share": 2}, "text": demo_texts()[:1], **SHORT},
    ),
    "sequential": ("svd", {"ratio": 0.5, "text": demo_texts()[0], "sequential": True, "export": "dense", **SHORT}),
    "fewer experts": ("compressed_experts", {"main_experts": 1, "set": {"steps": 2}, "text": demo_texts()[0], **SHORT}),
    "bytes": ("svd", {"ratio": 0.4, "unit": "bytes"}),
    "targets": ("svd", {"ratio": 0.2, "of": "model", "targets": "experts,attention"}),
}


@pytest.mark.parametrize("case", RUNS)
def test_what_an_output_holds_makes_it_again(case, tmp_path, monkeypatch):
    method, options = RUNS[case]
    if "statistics" in options:
        monkeypatch.chdir(tmp_path)
        jaxmoe.calibrate(short_demo(), "sums", text=demo_texts()[0], **SHORT)
        options = {**options, "statistics": "sums"}
    first = jaxmoe.compress(short_demo(), tmp_path / "first", method, **options)
    monkeypatch.chdir("/")
    recipe = tmp_path / "first" / NAME
    planned = call("plan", short_demo(), "--recipe", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    done = call("compress", short_demo(), tmp_path / "second", "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert checksums(tmp_path / "first") == checksums(tmp_path / "second")
    assert (tmp_path / "second" / NAME).read_text() == recipe.read_text()
    assert json.loads(done.stdout)["run"] == first.run


def test_a_later_step_does_not_carry_the_file_along(tmp_path):
    """It says how an output is made, and is not true of what is made of that."""
    jaxmoe.compress(short_demo(), tmp_path / "small", "svd", ratio=0.5)
    assert call("convert", tmp_path / "small", tmp_path / "dense", "--to", "dense").returncode == 0
    assert not (tmp_path / "dense" / NAME).exists()
