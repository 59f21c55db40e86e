"""Valid inputs of every kind, and what reads them: what a hostile case changes one file of."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain_checkpoint
from hostile.edits import Choose, edit_bytes, edit_json, edit_safetensors
from typer.testing import CliRunner

from jaxmoe.calibration.folder import Statistics, layer_path
from jaxmoe.calibration.record import Record, Source
from jaxmoe.calibration.statistics import LayerStatistics
from jaxmoe.calibration.writer import save
from jaxmoe.checkpoint import Checkpoint, Planned, read_header, write_tensors
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import LinearLayout, LinearModule, experts_modules, factored_config
from jaxmoe.checkpoint.inspection import inspect
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import Workspace, finished
from jaxmoe.cli import app
from jaxmoe.data import demo_checkpoint
from jaxmoe.export.folder import write_report
from jaxmoe.export.orbax import to_orbax, to_safetensors
from jaxmoe.factors import (
    CompressedLayer,
    CompressedLinear,
    Dense,
    Grouped,
    LayerShape,
    LinearShape,
    LowRank,
    SharedBasis,
)
from jaxmoe.recovery.states import States
from jaxmoe.texts import Tokenizer, read_dialogues, read_texts
from jaxmoe.texts.instructions import Dialogue
from jaxmoe.texts.spelling import spell, speller

STATE = {"weight": jnp.ones((3, 4)), "step": jnp.asarray(2, jnp.int32)}
RUN = {"method": "svd", "ratio": 0.4}
TALK = [
    {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes.", "tool_calls": []}]},
    {"prompt": "Say a.", "response": "a."},
]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


class Kind(NamedTuple):
    """A file that is changed, how, and what then reads it.

    Args:
        file: below the folder of all inputs; empty where nothing is changed but what is asked for.
        edit: returns the file's content changed.
        read: reads the input; takes the folder of all inputs and the choices.
    """

    file: str
    edit: Callable[[bytes, Choose], bytes]
    read: Callable[[Path, Choose], object]


def build(folder: Path) -> None:
    """Write all valid inputs."""
    plain_checkpoint.write(folder / "plain")
    plain_checkpoint.write(folder / "sharded", shards=2)
    _factored(folder / "factored")
    shape = LayerShape(experts=5, hidden=4, intermediate=3)
    record = Record(model="m", tokenizer="t", domains={"code": (Source("a", 2, 16, 0),)}, layers={1: shape})
    empty = LayerStatistics.zeros(shape)
    save(folder / "statistics", record, {"code": {1: LayerStatistics(**{**vars(empty), "sequences": 2})}})
    to_orbax(folder / "plain", folder / "orbax")
    (folder / "states").mkdir()
    states = States(folder / "states", keep=2)
    for step in (1, 2):
        states.save(step, STATE)
    (folder / "tokens").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(demo_checkpoint() / name, folder / "tokens" / name)
    (folder / "tokens" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "texts").mkdir()
    (folder / "texts" / "plain.txt").write_text("Some words of a text, é.\n\nMore of them.\n" * 20, encoding="utf-8")
    (folder / "texts" / "lines.jsonl").write_text("".join(json.dumps({"text": f"Text {n}."}) + "\n" for n in range(4)))
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALK))
    workspace = Workspace(folder / "out", RUN)
    with workspace.opened([0]):
        values = np.ones((2, 3), np.float32)
        sha256 = write_tensors(
            workspace.folder / "model-layer00000.safetensors", [Planned("a", "float32", (2, 3), lambda: values)]
        )
        workspace.finish(0, "key", sha256, {"layer": 0})
    (folder / "done").mkdir()
    write_report(folder / "done", {"run": RUN, "layers": [{"layer": 0}]})


QUERY = "model.layers.0.self_attn.q_proj"
"""A module outside of the experts, in the plain checkpoint."""


def _factored(folder: Path) -> None:
    """Write the plain checkpoint with factored modules, zeros all, of several kinds of terms."""
    plain_checkpoint.write(folder)
    opened = Checkpoint.open(folder)
    layers, tensors = {}, list(opened.copied())
    for source in opened.layers:
        shape = source.shape
        abstract = CompressedLayer(
            sizes=shape,
            terms={
                "gate": (Grouped.abstract(shape.of("gate"), "float32", total=8, size=2, rows=16, ordered=True),),
                "up": (SharedBasis.abstract(shape.of("up"), "float32", bases=2, rank=3, activation="tanh"),),
                "down": (Dense.abstract(shape.of("down"), "float32"),),
            },
        )
        layers[source.module] = (shape, abstract.spec())
        for name, array in abstract.tensors().items():
            values = np.zeros(array.shape, array.dtype)
            if name.endswith("ranks"):
                values[:] = 4
            elif name.endswith("order"):
                values[0] = np.arange(shape.experts)
            tensors.append(Planned(f"{source.module}.{name}", values.dtype, values.shape, partial(np.copy, values)))
    linear = f"{QUERY}.weight"
    out, in_ = opened.tensors[linear].shape
    query = CompressedLinear(sizes=LinearShape(out, in_), terms=(LowRank.abstract((1, out, in_), "float32", rank=2),))
    tensors = [planned for planned in tensors if planned.name != linear]
    for name, array in query.tensors().items():
        zeros = np.zeros(array.shape, array.dtype)
        tensors.append(Planned(f"{QUERY}.{name}", zeros.dtype, zeros.shape, partial(np.copy, zeros)))
    modules = {
        **experts_modules(layers, opened.layouts()),
        QUERY: LinearModule(query.sizes, query.spec(), LinearLayout("float32", linear)),
    }
    config = factored_config(opened.dense_config(), modules)
    planned = [Planned(p.name, p.dtype, p.shape, partial(np.copy, p.produce())) for p in tensors]
    write_tensors(folder / "model.safetensors", planned)
    (folder / "config.json").write_text(json.dumps(config))


def json_edit(content: bytes, choose: Choose) -> bytes:
    """Change JSON, mostly as JSON and sometimes as bytes."""
    if choose(6) == 0:
        return edit_bytes(content, choose)
    return json.dumps(edit_json(json.loads(content), choose, edits=1 + choose(2))).encode()


def lines_edit(content: bytes, choose: Choose) -> bytes:
    """Change one of several lines of JSON."""
    lines = content.splitlines()
    place = choose(len(lines))
    lines[place] = json_edit(lines[place], choose)
    return b"\n".join(lines)


def template_edit(content: bytes, choose: Choose) -> bytes:
    """Change a chat template: its bytes, or by something that templates should not do."""
    snippets = (
        "{{ 1 // 0 }}",
        "{{ messages.x.y }}",
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages[0]['content'] + 3 }}",
        "{{ cycler(1).__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if true %}" * 300 + "{% endif %}" * 300,
    )
    if choose(3) == 0:
        return edit_bytes(content, choose)
    return content + snippets[choose(len(snippets))].encode()


def _model(name: str, folder: Path, choose: Choose) -> None:
    inspect(folder / name)
    StoredModel(folder / name)


def _weights(folder: Path, choose: Choose) -> None:
    for entry in read_header(folder / "plain" / "model.safetensors").values():
        entry.read()
    inspect(folder / "plain")


def _compressed(folder: Path, choose: Choose) -> None:
    opened = CompressedCheckpoint.open(folder / "factored")
    for module in opened.modules:
        opened.layer(module)


def _statistics(folder: Path, choose: Choose) -> None:
    Statistics.open(folder / "statistics").check().layer(1)


def _tokenizer(folder: Path, choose: Choose) -> None:
    Tokenizer.open(folder / "tokens").encode("Some words, é.")


def _texts(folder: Path, choose: Choose) -> None:
    read_texts([folder / "texts"])


def _template(folder: Path, choose: Choose) -> None:
    with speller(folder / "tokens", seconds=2, library=False) as own:
        spell(Dialogue(TALK[0]["messages"]), own)


def _workspace(folder: Path, choose: Choose) -> None:
    workspace = Workspace(folder / "out", RUN)
    with workspace.opened([0], resume=choose(4) > 0):
        workspace.entry(0, "key")


def _state(folder: Path, choose: Choose) -> None:
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in STATE.items()}
    States(folder / "states", keep=2).newest(abstract, 2)


def _orbax(folder: Path, choose: Choose) -> None:
    output = folder / "back"
    try:
        to_safetensors(folder / "orbax", output)
    finally:
        for path in (output, output.with_name("back.partial")):
            shutil.rmtree(path, ignore_errors=True)


WORDS = (
    *("", " ", "0", "-1", "1e999", "nan", "x" * 5000, "é", "a,b", "1:0", "0x", "2x2", "\0", "../..", "/", "-"),
    *("18446744073709551616", "9" * 400, "0.4", "svd", "mobe", "reap+mobe", "+", "svd+svd", "rank=3", "=", "--"),
    *("/dev/null", "/proc/self/mem", "~", "~nobody/x", "http://[", "{}", "%s", "a\nb"),
)


class RefusedError(Exception):
    """The command line ended in something else than success or one message."""


def _flags(folder: Path, choose: Choose) -> None:
    options = {
        "plan": ("--method", "--ratio", "--of", "--setting", "--set", "--allocation", "--statistics", "--main-experts"),
        "compress": ("--ratio", "--layers", "--seed", "--set", "--export", "--length", "--sequences", "--statistics"),
        "inspect": ("--revision",),
        "convert": ("--to",),
    }
    name = sorted(options)[choose(len(options))]
    arguments = [name, str(folder / "plain")]
    if name in ("compress", "convert"):
        arguments.append(("/dev/null/out", str(folder / "plain" / "out"), "/proc/out", "a" * 300)[choose(4)])
    if name in ("plan", "compress"):
        arguments += ["--method", "svd", "--ratio", "0.4"]
    for _ in range(1 + choose(3)):
        arguments += [options[name][choose(len(options[name]))], WORDS[choose(len(WORDS))]]
    if choose(2):
        arguments.append("--json")
    done = CliRunner().invoke(app, arguments)
    if done.exit_code not in (0, 1, 2) or "defect of jaxmoe" in done.stderr or "Traceback" in done.output:
        raise RefusedError(f"{arguments}: exit code {done.exit_code}, {done.output[-500:]} {done.exception!r}")


def _nothing(content: bytes, choose: Choose) -> bytes:
    return content


KINDS: dict[str, Kind] = {
    "config": Kind("plain/config.json", json_edit, partial(_model, "plain")),
    "index": Kind("sharded/model.safetensors.index.json", json_edit, partial(_model, "sharded")),
    "weights": Kind("plain/model.safetensors", edit_safetensors, _weights),
    "factored config": Kind("factored/config.json", json_edit, partial(_model, "factored")),
    "factored weights": Kind("factored/model.safetensors", edit_safetensors, _compressed),
    "statistics": Kind("statistics/statistics.json", json_edit, _statistics),
    "sums": Kind("statistics/" + layer_path("code", 1), edit_safetensors, _statistics),
    "tokenizer": Kind("tokens/tokenizer.json", json_edit, _tokenizer),
    "tokenizer config": Kind("tokens/tokenizer_config.json", json_edit, _tokenizer),
    "template": Kind("tokens/chat_template.jinja", template_edit, _template),
    "text": Kind("texts/plain.txt", edit_bytes, _texts),
    "text lines": Kind("texts/lines.jsonl", lines_edit, _texts),
    "dialogues": Kind("talk.jsonl", lines_edit, lambda folder, choose: read_dialogues(folder / "talk.jsonl")),
    "run record": Kind("out.partial/.jaxmoe/run.json", json_edit, _workspace),
    "layer record": Kind("out.partial/.jaxmoe/layer00000.json", json_edit, _workspace),
    "layer file": Kind("out.partial/model-layer00000.safetensors", edit_bytes, _workspace),
    "report": Kind("done/report.json", json_edit, lambda folder, choose: finished(folder / "done", RUN)),
    "orbax record": Kind("orbax/orbax.json", json_edit, _orbax),
    "state": Kind("states/2.json", json_edit, _state),
    "flags": Kind("", _nothing, _flags),
}
SLOW = {"template": 10, "orbax record": 5, "flags": 2}
"""Kinds of which a case takes long, and by how much fewer there are of them."""


def spoil(path: Path, content: bytes, kind: Kind, choose: Choose) -> None:
    """Put a changed file, or something else, in the place of a valid one."""
    if choose(10):
        path.write_bytes(kind.edit(content, choose))
        return
    path.unlink()
    other = choose(6)
    if other == 0:
        path.mkdir()
    elif other == 1:
        os.mkfifo(path)
    elif other == 2:
        path.symlink_to(path.name)
    elif other == 3:
        path.symlink_to("nowhere")
    elif other == 4:
        path.symlink_to("/dev/zero")
