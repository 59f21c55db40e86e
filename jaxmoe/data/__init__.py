"""The bundled checkpoint and text: a small, really trained Mixture-of-Experts model and what to measure it on.

`demo/` is a 2.8M-parameter Qwen3-MoE checkpoint (its README says how it was trained), `text/` holds five domains of
about 20 kB each that it has not seen (SOURCES.md gives origins and licences).
"""

from importlib.resources import files
from pathlib import Path


def demo_checkpoint() -> Path:
    """Return the folder of the bundled checkpoint.

    Example:
        >>> (demo_checkpoint() / "config.json").is_file()
        True
    """
    return _folder() / "demo"


def demo_texts() -> tuple[Path, ...]:
    """Return the bundled held-out text files, one domain each, in alphabetical order.

    Example:
        >>> [path.stem for path in demo_texts()]
        ['code', 'literature', 'reference', 'speeches', 'techdocs']
    """
    return tuple(sorted((_folder() / "text").glob("*.txt")))


def _folder() -> Path:
    # The package is always unpacked (checkpoints are memory-mapped), so its resources are plain files.
    return Path(str(files(__name__)))
