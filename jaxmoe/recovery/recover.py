"""Recover a checkpoint: train some of its arrays on text, and write the same checkpoint with other numbers.

The whole model, the optimiser's memory of what is trained and the teacher are in memory at once. The run can be stopped
at any moment; the same command resumes, and ends with the same bytes.
"""

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

import jaxmoe
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.records import read_bytes, read_record
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import REPORT, Workspace, fingerprint, finished, make_folder
from jaxmoe.errors import JaxmoeError, called_as
from jaxmoe.export.card import model_card
from jaxmoe.export.folder import write_report
from jaxmoe.export.trained import write_trained
from jaxmoe.recovery.losses import TAUGHT, Side
from jaxmoe.recovery.run import METRICS
from jaxmoe.recovery.run import train as run_training
from jaxmoe.recovery.scales import floating_scales, stored_scales
from jaxmoe.recovery.sharding import training_mesh
from jaxmoe.recovery.trainable import merge, select
from jaxmoe.recovery.training import Training
from jaxmoe.report.events import Complete, OnEvent, ignore
from jaxmoe.report.records import Report
from jaxmoe.report.recovery_records import RecoveryReport
from jaxmoe.texts import (
    Document,
    Paths,
    Rows,
    Tokenizer,
    check_same,
    encode_documents,
    instruction_documents,
    pack,
    paths,
    read_texts,
    speller,
    window_length,
)
from jaxmoe.texts.chat_template import chat_template

CARD = "README.md"
_CALL = "jaxmoe.recover(checkpoint, output, text=[...], train=[...], ...)"
_OWN = ("teacher", "trained", "training", "data", "losses", "outcomes", "seconds")
"""What the report of a recipe says of its training."""


class Completes(NamedTuple):
    """A recipe of which a training is a step.

    Args:
        report: of the recipe, which stands in the place of the training's own and has that under `recovery`; its `run`,
            if it has one, is what the output is known by.
        files: further text files of the output, by name.
    """

    report: Mapping[str, Any]
    files: Mapping[str, str]


@called_as(_CALL)
def recover(
    checkpoint: str | Path,
    output: str | Path,
    *,
    text: Paths | None = None,
    instructions: Paths | None = None,
    prompts: bool = False,
    teacher: str | Path | None = None,
    train: Sequence[str] = ("router", "norms", "factors"),
    loss: Mapping[str, float] | None = None,
    length: int | None = None,
    seed: int = 0,
    save_every: int = 50,
    keep: int = 2,
    mesh: tuple[int, int] | None = None,
    resume: bool = True,
    command: str = "",
    ignore_config_keys: Collection[str] = (),
    completes: "Completes | None" = None,
    on_event: OnEvent = ignore,
    **training: Any,
) -> RecoveryReport:
    """Train a compressed checkpoint on text, towards its original or on the text alone, and write the result.

    Args:
        checkpoint: a folder or a hub id, original or written by jaxmoe.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it.
        text: text files, folders of `*.txt`, or files of JSON lines with a `text`.
        instructions: JSON-lines files of dialogues, see `jaxmoe.texts.read_dialogues`.
        prompts: whether all of a dialogue is learned instead of its answers alone.
        teacher: the original, a folder or hub id; needed by the losses `distillation` and `outputs`.
        train: what is trained, see `trainable.SETS`.
        loss: weights of the losses by name; None for distillation where there is a teacher, else for next_token.
        length: tokens in a row; None for what `texts.window_length` says.
        seed: of the order of the data.
        save_every: steps after which the training's state is saved.
        keep: so many states remain.
        mesh: devices over rows and over experts; None for one device.
        resume: whether to resume an unfinished run; False starts over.
        command: the command line, for the report.
        ignore_config_keys: keys of both configs to leave out of account, where jaxmoe does not know what they mean.
        completes: the recipe of which this is a step.
        on_event: called with an event after every step.
        training: `steps`, `rows`, `learning_rate` and all else that `Training` takes.

    Returns:
        The report of the training, also written to `report.json`, in that of the recipe where this is a step of one.

    Raises:
        JaxmoeError: a checkpoint or text cannot be used, the teacher is another model's, training diverged, the output
            exists, or the disk is full.

    Example:
        >>> import tempfile, jaxmoe
        >>> from jaxmoe.data import demo_checkpoint, demo_texts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"text": demo_texts()[0], "train": ["norms"], "length": 16, "steps": 1, "rows": 2}
        ...     report = jaxmoe.recover(demo_checkpoint(), f"{folder}/recovered", **options)
        >>> report.training["steps"]
        1
    """
    known = [own.name for own in fields(Training) if own.name != "weights"]
    if unknown := [name for name in training if name not in known]:
        raise TypeError(f"recover: unknown {', '.join(unknown)}; call {_CALL}, where ... may be {', '.join(known)}")
    settings = Training(weights=loss or {"distillation" if teacher else "next_token": 1.0}, **training)
    texts, dialogues = paths(text), paths(instructions)
    if save_every < 1 or keep < 1:
        raise JaxmoeError(f"saved every {save_every} steps, {keep} kept: give at least 1 of both")
    begun = time.perf_counter()
    model = StoredModel(checkpoint, ignore_config_keys=ignore_config_keys)
    output = output_folder(output, [model.folder, teacher, *texts, *dialogues])
    tokenizer = Tokenizer.open(checkpoint)
    original = _teacher(model, tokenizer, teacher, settings, ignore_config_keys)
    length = window_length(model.longest, length)
    clock = _clock(model.folder, output) if dialogues else None
    rows = pack(documents(model.folder, tokenizer, texts, dialogues, prompts=prompts, clock=clock), length)
    run = {
        "recover": model.checkpoint.fingerprint(),
        "teacher": None if original is None else original.checkpoint.fingerprint(),
        "rows": fingerprint({name: _digest(part) for name, part in rows._asdict().items()}),
        "sets": list(train),
        "training": asdict(settings),
        "seed": seed,
        "mesh": None if mesh is None else list(mesh),
        "versions": {"jaxmoe": jaxmoe.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "platform": f"{jax.default_backend()} {platform.machine()}",
    }
    if clock is not None:
        run["clock"] = clock.isoformat()
    recorded = run if completes is None else completes.report.get("run", run)
    if (done := finished(output, recorded)) is not None:
        on_event(Complete(output=str(output)))
        return RecoveryReport.read({**done, **done.get("recovery", {})})
    stored = model.parameters()
    parameters = floating_scales(stored)
    chosen = select(parameters, train)
    workspace = Workspace(output, run)
    with workspace.opened([], resume=resume), workspace.exclusive("training"):
        folder = workspace.journal / "training"
        make_folder(folder)
        result = run_training(
            Side(parameters, model.spec),
            None if original is None else Side(original.parameters(), original.spec),
            rows,
            chosen,
            settings,
            folder,
            seed=seed,
            save_every=save_every,
            keep=keep,
            mesh=None if mesh is None else training_mesh(*mesh),
            on_event=on_event,
        )
        after = stored_scales(merge(parameters, result["trained"]), stored)
        counted = write_trained(model, after, chosen, workspace.folder)
        write_bytes(workspace.folder / METRICS, read_bytes(folder / METRICS))
        report = _report(model, original, output, train, settings, rows, length, result, counted)
        report |= {"seed": seed, "command": command, "seconds": time.perf_counter() - begun, "run": run}
        report |= {"ignored_config_keys": list(model.ignored)} if model.ignored else {}
        if completes is None:
            report = write_report(workspace.folder, report)
            card = _card(_card_before(model.folder), report)
        else:
            own = {name: report[name] for name in _OWN}
            whole = {
                **completes.report,
                "run": recorded,
                "stored": counted,
                "seconds": completes.report["seconds"] + report["seconds"],
            }
            card = _card(model_card(Report.read(whole)).rstrip(), report)
            write_report(workspace.folder, {**whole, "recovery": own})
            for name, content in completes.files.items():
                write_bytes(workspace.folder / name, content.encode())
        write_bytes(workspace.folder / CARD, card.encode())
        workspace.publish()
    on_event(Complete(output=str(output)))
    return RecoveryReport.read(report)


def documents(
    folder: Path,
    tokenizer: Tokenizer,
    texts: Sequence[str | Path],
    instructions: Sequence[str | Path],
    *,
    prompts: bool = False,
    clock: datetime | None = None,
) -> list[Document]:
    """Return the documents of texts and instructions, each ended by the tokenizer's end token if it has one.

    Args:
        folder: of the checkpoint, for its chat template.
        tokenizer: of the checkpoint.
        texts: as `jaxmoe.texts.read_texts` takes them; all of their tokens are learned.
        instructions: files of dialogues.
        prompts: whether all of a dialogue is learned.
        clock: the time that chat templates are told; None for now.
    """
    if not texts and not instructions:
        raise JaxmoeError("no text: give at least one text file, or a file of instructions")
    found = []
    for text in read_texts(texts) if texts else ():
        for ids in encode_documents(text, tokenizer):
            if tokenizer.end is not None:
                ids = np.append(ids, np.int32(tokenizer.end))
            found.append(Document(ids, np.ones(len(ids), bool)))
    if instructions:
        with speller(folder, clock=clock) as spelled:
            for path in instructions:
                found += instruction_documents(path, tokenizer, spelled, prompts=prompts)
    return found


def _clock(folder: Path, output: Path) -> datetime | None:
    """Return the time that a chat template with a date in it is told, None for others: that at which the run began.

    The same command resumes with the same rows on another day.
    """
    template = chat_template(folder)
    if template is None or not template.dated:
        return None
    for path, kind in ((output / REPORT, _Report), (Workspace(output, {}).journal / "run.json", _Run)):
        # What holds no such record is refused where the run is compared with it.
        with suppress(JaxmoeError, ValueError):
            record = read_record(path, kind, "start over")
            return datetime.fromisoformat(record.run.clock if isinstance(record, _Report) else record.clock)
    return datetime.now().replace(microsecond=0)


class _Run(msgspec.Struct):
    clock: str


class _Report(msgspec.Struct):
    run: _Run


def _teacher(
    model: StoredModel, tokenizer: Tokenizer, teacher, training: Training, ignored: Collection[str]
) -> StoredModel | None:
    """Open the teacher, if a loss needs one, and check that it speaks of the same things."""
    needed = [name for name in training.weights if name in TAUGHT]
    if not needed:
        if teacher is not None:
            raise JaxmoeError(f"a teacher, but no loss that needs one: give {' or '.join(TAUGHT)}, or no teacher")
        return None
    if teacher is None:
        raise JaxmoeError(f"the loss {needed[0]} needs a teacher: give the original checkpoint")
    original = StoredModel(teacher, ignore_config_keys=ignored)
    if original.spec.vocabulary != model.spec.vocabulary:
        raise JaxmoeError(
            f"the teacher {original.folder} has {original.spec.vocabulary} tokens, {model.folder} has"
            f" {model.spec.vocabulary}: give the model that it was made from"
        )
    check_same(tokenizer, Tokenizer.open(teacher))
    sizes = [(own.spec.hidden, len(own.spec.layers)) for own in (model, original)]
    if "outputs" in needed and sizes[0] != sizes[1]:
        raise JaxmoeError(
            f"the teacher has hidden size {sizes[1][0]} and {sizes[1][1]} layers, the model {sizes[0][0]} and"
            f" {sizes[0][1]}: the loss outputs compares layer by layer; give the model that it was made from"
        )
    return original


def _digest(part: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(part).data).hexdigest()


def _report(model: StoredModel, original, output, sets, training, rows: Rows, length, result, stored) -> dict[str, Any]:
    metrics = result["metrics"]
    part = max(1, len(metrics) // 10)
    losses = {
        name: {
            when: float(np.mean([line[name] for line in some]))
            for when, some in (("first_tenth", metrics[:part]), ("last_tenth", metrics[-part:]))
        }
        for name in ("loss", *training.weights)
    }
    compression = model.folder / REPORT
    return {
        "jaxmoe": jaxmoe.__version__,
        "source": str(model.folder),
        "teacher": None if original is None else str(original.folder),
        "output": str(output),
        "trained": {
            "sets": list(sets),
            "arrays": len(result["trained"]),
            "parameters": sum(array.size for array in result["trained"].values()),
        },
        "training": asdict(training),
        "data": {
            "rows": len(rows.ids),
            "length": length,
            "tokens": rows.tokens,
            "learned": int(rows.learned.sum()),
            "passes": training.steps * training.rows / len(rows.ids),
        },
        "losses": losses,
        "outcomes": [
            *({"kind": "damaged_state", "detail": reason} for reason in result["damaged"]),
            *_no_gain(losses["loss"], training.learning_rate),
        ],
        "stored": stored,
        "compression": read_record(compression, dict[str, Any], "remove it") if compression.is_file() else None,
    }


def _no_gain(loss: Mapping[str, float], rate: float) -> list[dict[str, str]]:
    """Return the outcome of a training in which the loss did not fall; none of others."""
    first, last = loss["first_tenth"], loss["last_tenth"]
    if last < first:
        return []
    detail = (
        f"the loss did not fall, {first:.4g} in the first tenth of the steps and {last:.4g} in the last: train longer,"
        f" at another learning rate than {rate:g}, or keep the checkpoint as it was"
    )
    return [{"kind": "no_gain", "detail": detail}]


def _card_before(folder: Path) -> str:
    """Return the model card of the source."""
    path = folder / CARD
    return path.read_text(encoding="utf-8").rstrip() if path.is_file() else f"# {folder.name}"


def _card(before: str, report: dict[str, Any]) -> str:
    """Return a model card with what training did."""
    trained, data, training = report["trained"], report["data"], report["training"]
    lines = [
        before,
        "",
        "## Recovery",
        "",
        f"Trained with jaxmoe {report['jaxmoe']} after that: {', '.join(trained['sets'])} ({trained['parameters']:,} of"
        f" {report['stored']['parameters']:,} parameters), {training['steps']} steps of {training['rows']} rows of"
        f" {data['length']} tokens, {data['passes']:.2f} passes over {data['tokens']:,} tokens.",
        "",
        "| loss | mean of the first tenth of the steps | of the last |",
        "|---|---|---|",
        *(
            f"| {name} | {loss['first_tenth']:.4f} | {loss['last_tenth']:.4f} |"
            for name, loss in report["losses"].items()
        ),
        "",
        *(f"- {outcome['kind']}: {outcome['detail']}" for outcome in report["outcomes"]),
        f"- teacher: {report['teacher'] or 'none'}",
        f"- command: `{report['command']}`" if report["command"] else "- made through the Python interface",
        "",
    ]
    return "\n".join(lines)
