"""The program that renders chat templates: a process of its own with little time and memory.

A template comes with a checkpoint, from a stranger: a loop in it may never end, or fill the memory. Neither can be
stopped from within the process that renders it, so `spelling` starts this file as a program, which imports nothing of
jaxmoe. It reads a line of settings and then a line for each dialogue, and writes a line for each text asked for:
`{"text", "spans"}` or `{"error", "refused"}`. It ends with `OVERTIME` when a text takes longer than it may.

Texts are those of transformers' `apply_chat_template`: rendered by its own function where transformers is installed,
by the same rules otherwise. Spans are what `{% generation %}` blocks wrote.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

SECONDS, SECONDS_EACH = 10.0, 0.1
"""Time for the first text, and what every further one adds to what is left of it: a usual one takes a millisecond."""
MEMORY = 1 << 30
"""Bytes that rendering may take beyond what the process has when it begins."""
SIZES = "/proc/self/statm"
"""Where Linux says how many pages a process has; its limit counts all of them."""
LONGEST = 1 << 24
"""Characters of the longest text: more than the longest context of any model."""
OVERTIME, OVERSIZE, BROKEN = 1, 3, 4
"""Exit codes: the first is that of `faulthandler`, which ends the process in time whatever it does."""

Render = Callable[..., tuple[str, list[tuple[int, int]]]]


def main(lines: Iterator[bytes], write: Callable[[dict[str, Any]], None]) -> None:
    """Render what the lines ask for: the templates, tokens and limits first, then a dialogue in each line."""
    settings = json.loads(next(lines))
    # transformers takes the time from the clock alone.
    render = library_renderer() if settings["library"] and not settings["clock"] else None
    render = render or own_renderer(settings["clock"])
    limit_memory(settings["memory"])
    left = settings["seconds"]
    for line in lines:
        dialogue = json.loads(line)
        for count, prompt in dialogue["asked"]:
            begun = time.monotonic()
            # Its own thread of C ends the process even within a single long operation, and on every system.
            faulthandler.dump_traceback_later(max(left, 0.001), exit=True)
            record = rendered(render, settings, dialogue, count, prompt)
            faulthandler.cancel_dump_traceback_later()
            left += SECONDS_EACH - (time.monotonic() - begun)
            write(record)


def rendered(render: Render, settings: dict[str, Any], dialogue: dict[str, Any], count: int, prompt: bool):
    try:
        text, spans = render(
            settings["templates"][dialogue["template"]],
            # As apply_chat_template does: a missing key means the same to every template, None does not.
            [{key: value for key, value in each.items() if value is not None} for each in dialogue["messages"][:count]],
            dialogue["tools"],
            dialogue["documents"],
            prompt,
            {**settings["tokens"], **dialogue["variables"]},
        )
    except MemoryError:
        return {"error": "it takes too much memory", "refused": False}
    # A template can raise whatever Python can, and all of it means the same: there is no text.
    except Exception as error:
        refused = type(error).__name__ == "TemplateError"
        return {"error": str(error) if refused else f"{type(error).__name__}: {error}", "refused": refused}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text)} characters for a dialogue", "refused": False}
    return {"text": text, "spans": spans}


def library_renderer() -> Render | None:
    """Return transformers' own function, None where it is not installed."""
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        return None

    def render(template, messages, tools, documents, prompt, variables):
        found: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **variables,
        )
        # A text and its spans for each dialogue, of which there is one.
        texts, spans = found
        return texts[0], spans[0]

    return render


def own_renderer(clock: str | None = None) -> Render:
    """Return a function that renders by transformers' rules with jinja2 alone, at an ISO time, None for now."""
    import jinja2.ext
    import jinja2.nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    written: list[str] = []
    spans: list[tuple[int, int]] = []

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` ... `{% endgeneration %}`: what it writes is the model's, and its place is noted."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller):
            text, start = caller(), sum(map(len, written))
            spans.append((start, start + len(text)))
            return text

    class Names(Namespace):
        """A namespace without names that begin with an underscore, which lead out of the sandbox."""

        def __init__(*args, **kwargs):
            self, *args = args
            values = dict(*args, **kwargs)
            for name in values:
                _check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            _check(name)
            Namespace.__setitem__(self, name, value)

    class Dictionary:
        """What a template may do with `dict`: make one."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Unlike jinja2's own, which escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: (datetime.fromisoformat(clock) if clock else datetime.now()).strftime(form),
        dict=Dictionary(),
        namespace=Names,
    )
    compiled = lru_cache(environment.from_string)

    def render(template, messages, tools, documents, prompt, variables):
        written.clear()
        spans.clear()
        for part in compiled(template).generate(
            messages=[_named_reasoning(message) for message in messages],
            tools=tools,
            documents=documents,
            add_generation_prompt=prompt,
            **variables,
        ):
            written.append(part)  # noqa: PERF402 - the extension reads it meanwhile
        return "".join(written), list(spans)

    return render


def _named_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give an answer's reasoning the names that templates know, whichever it came under."""
    given = [message[name] for name in ("reasoning_content", "thinking", "reasoning") if message.get(name) is not None]
    return {"thinking": given[0], **message, "reasoning_content": given[0]} if given else message


def limit_memory(extra: int) -> None:
    """Let the process take so many bytes more; where the system has no such limit, end it when it took them.

    On Windows, which does not tell either, time alone is limited.
    """
    try:
        import resource
    except ImportError:
        return
    if os.path.exists(SIZES):
        with open(SIZES) as sizes:
            pages = int(sizes.read().split()[0])
        limit, (_, hard) = pages * resource.getpagesize() + extra, resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    else:
        threading.Thread(target=_watch_memory, args=(peak_memory() + extra,), daemon=True).start()


def _watch_memory(limit: int) -> None:
    while peak_memory() <= limit:
        time.sleep(0.02)
    os._exit(OVERSIZE)


def peak_memory() -> int:
    """Return the most bytes that the process ever held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    try:
        main(iter(sys.stdin.buffer), answer)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(0)
    except BaseException as error:
        # Not Python's own code for that, which is that of `faulthandler`.
        os._exit(OVERSIZE if isinstance(error, MemoryError) else BROKEN)
