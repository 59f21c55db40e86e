"""The command line: thin commands over the library, one JSON object on standard output where asked.

Exit codes: 0, 1 with a message that one can act on, 2 for wrong usage, 130 for Ctrl-C. SIGTERM ends the program as it
ends any other: every run can be killed at any moment, and resumes.
"""

import os

# XLA's decompositions on CPU call OpenBLAS for one small matrix after another: its threads cost up to thirty times what
# they gain, most on a busy machine. It reads this when numpy or JAX loads it, so this stands before both.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Each registers its commands, in the order in which the help lists them.
from jaxmoe.cli import inspecting, compressing, measuring, training  # noqa: F401, I001
from jaxmoe.cli.app import app
from jaxmoe.cli.app import run as main

__all__ = ["app", "main"]
