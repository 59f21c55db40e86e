"""What the command line says of an exception that nobody expected where it arose.

Known faults are `JaxmoeError`s, found where they enter. What still reaches the top is the system's (no memory, a disk
that fails) or a defect of jaxmoe; either way it becomes one message that says what was being worked on and what to do.
"""

import errno
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import extract_tb

import jaxmoe

REPORT_AT = "https://github.com/jaxmoe/jaxmoe/issues"

_SYSTEM = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EFBIG: "choose a folder on a file system that takes larger files",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "change the permission (chmod, chown), or choose another place",
    errno.EPERM: "change the permission (chmod, chown), or choose another place",
    errno.EMFILE: "raise the limit (ulimit -n 4096), then run the same command again",
    errno.ENFILE: "end other programs on this machine, then run the same command again",
    errno.ENOMEM: "end other programs, or take a machine with more memory",
    errno.EIO: "the disk or the network failed: copy the folder to another disk, then run the same command there",
    errno.ESTALE: "the network file system forgot the file: run the same command again",
    errno.ENOTDIR: "move away the file that stands where a folder is needed, or choose another place",
    errno.EISDIR: "move away the folder that stands where a file is needed, or choose another place",
    errno.ELOOP: "put the file or folder itself there instead of links",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do about the faults that the system itself reports."""

_MEMORY = (
    "there is not enough memory: give fewer or shorter texts or fewer --rows where the command takes them, end other"
    " programs, or take a machine with more (`jaxmoe plan` predicts what compressing needs)"
)


def explain(error: BaseException) -> str:
    """Return one message for an exception: what was being worked on, what happened, what to do.

    Example:
        >>> explain(OSError(errno.EROFS, "Read-only file system", "/mnt/small"))
        '/mnt/small: Read-only file system: choose a folder that can be written to'
    """
    known = [link for link in _chain(error) if _known(link) is not None]
    if known:
        # The first cause says most: what followed from it names no file.
        cause = known[-1]
        return f"{_where(cause)}{_what(cause)}: {_known(cause)}"
    return f"{_where(error)}{_what(error)}: {_defect(error)}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it followed from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _known(error: BaseException) -> str | None:
    """Return what to do about what is no defect of jaxmoe; None for everything else."""
    if isinstance(error, MemoryError) or (
        # JAX's own, which is not imported for this.
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    ):
        return _MEMORY
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return _SYSTEM[error.errno]
    return None


def _where(error: BaseException) -> str:
    """Return the file that an exception is about, else the command, as the beginning of a message."""
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    if found := [str(name) for name in names if isinstance(name, str | bytes | Path)]:
        return f"{' and '.join(found)}: "
    return f"{_command()}: " if sys.argv[1:] else ""


def _what(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # A line is enough: XLA lists its buffers, and some libraries put a traceback into the message.
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    return f"{type(error).__name__}{': ' if first else ''}{first}"


def _defect(error: BaseException) -> str:
    version = f"jaxmoe {jaxmoe.__version__}, Python {platform.python_version()}"
    return (
        f"this is a defect of jaxmoe{_line(error)}; what is finished is kept. Run the command again with `jaxmoe"
        f" --debug` in front, and report what it prints at {REPORT_AT} ({version})"
    )


def _line(error: BaseException) -> str:
    """Return the innermost line of jaxmoe that an exception went through."""
    root = Path(jaxmoe.__file__).parent
    own = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(root)]
    if not own:
        return ""
    return f" ({Path(own[-1].filename).relative_to(root.parent).as_posix()}, line {own[-1].lineno})"


def _command() -> str:
    words = shlex.join(["jaxmoe", *sys.argv[1:]])
    return words if len(words) <= 300 else f"{words[:300]}..."
