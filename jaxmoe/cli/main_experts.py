"""`plan` and `compress` with `--method compressed_experts`: experts that run instead of numbers that are stored."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.cli.arguments import Setting, method_settings
from jaxmoe.compression.fewer_experts import compress_experts
from jaxmoe.compression.fewer_experts_plan import make_main_plan
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.compressed_experts import METHOD, Settings
from jaxmoe.model.auxiliary import MainExperts
from jaxmoe.report.progress import progress
from jaxmoe.report.tables import main_experts_table, size_tables


def planned(
    checkpoint: str,
    main_experts: int | None,
    setting: Setting,
    set_: list[str] | None,
    revision: str | None,
    ignored: Sequence[str],
    other: Mapping[str, Any],
):
    """Return the plan and the settings that the options ask for.

    Args:
        checkpoint: a folder or a hub id.
        main_experts: how many experts run.
        setting: as for all methods.
        set_: as for all methods.
        revision: of a hub id.
        ignored: keys of the config to leave out of account.
        other: options that this method does not take, with what was given; None or False is nothing.
    """
    from jaxmoe import methods
    from jaxmoe.checkpoint.stored_model import StoredModel

    if other.get("--ratio") is not None:
        raise JaxmoeError(
            f"--ratio: {METHOD.name} runs fewer experts and stores a little more, so give --main-experts; methods that"
            f" store fewer numbers are {', '.join(sorted(methods.METHODS))}"
        )
    if given := [name for name, value in other.items() if value not in (None, False)]:
        raise JaxmoeError(f"{', '.join(given)}: {METHOD.name} does not take that; it takes --main-experts and --text")
    settings = method_settings(METHOD, setting, set_)
    assert isinstance(settings, Settings)
    model = StoredModel(checkpoint, revision, ignore_config_keys=ignored)
    if main_experts is None:
        choices = max(layer.feed_forward.router.top_k for layer in _with_experts(model))
        raise JaxmoeError(f"{METHOD.name}: give --main-experts, 1 to {choices - 1} of the {choices} of a token")
    return make_main_plan(model, MainExperts(main_experts, settings.renorm)), settings


def _with_experts(model) -> list[Any]:
    return [model.spec.layers[index] for index in model.modules]


def plan(*arguments: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the plan as JSON and its tables; the arguments are those of `planned`."""
    summary = planned(*arguments)[0].summary()
    return summary, size_tables(summary)


def compress(
    *arguments: Any,
    output: Path,
    text: Sequence[Path] | None,
    sequences: int,
    length: int | None,
    seed: int,
    resume: bool,
    as_json: bool,
) -> tuple[dict[str, Any], list[Any]]:
    """Carry the plan out and return the report and its tables; the first arguments are those of `planned`."""
    from jaxmoe.texts import Tokenizer, text_windows, window_length

    main, settings = planned(*arguments)
    options: dict[str, Any] = {}
    if text:
        tokenizer = Tokenizer.open(main.model.folder)
        length = window_length(main.model.longest, length)
        options["texts"] = text_windows(text, tokenizer, length=length, count=sequences)
        options["tokenizer"] = tokenizer.fingerprint
    with progress(len(main.model.modules), as_json=as_json) as on_event:
        report = compress_experts(
            main,
            output,
            settings,
            **options,
            seed=seed,
            resume=resume,
            command=shlex.join(["jaxmoe", *sys.argv[1:]]),
            on_event=on_event,
        )
    learned = [main_experts_table(report["layers"])] if report["calibration"] else []
    return report, [*learned, *size_tables(report)]
