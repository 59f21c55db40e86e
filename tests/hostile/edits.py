"""Edits that make hostile inputs of valid ones: of JSON values, of bytes, of safetensors files.

Each takes a function `choose(n)` that returns a number from 0 to n - 1, so that a seeded generator and a fuzzer that
follows coverage can both drive it.
"""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

Choose = Callable[[int], int]

NESTED: Any = []
for _ in range(40):
    NESTED = [NESTED]

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    65,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "3",
    "-1",
    "none",
    "\0",
    "a\0b",
    "../../etc/passwd",
    "/",
    "é\ud800",
    "{{ 7 * 7 }}",
    "x" * 5000,
    [],
    [None],
    [0],
    [-1, "a"],
    [[]],
    list(range(70)),
    {},
    {"": None},
    {"a": {"b": []}},
    NESTED,
)


def edit_json(value: Any, choose: Choose, *, edits: int = 1) -> Any:
    """Return a JSON value with some places changed: a strange value put there, removed, renamed, swapped, nested."""
    value = copy.deepcopy(value)
    for _ in range(edits):
        places = list(_places(value))
        if not places:
            return STRANGE[choose(len(STRANGE))]
        holder, key = places[choose(len(places))]
        kind = choose(8)
        if kind < 4:
            holder[key] = copy.deepcopy(STRANGE[choose(len(STRANGE))])
        elif kind == 4:
            del holder[key]
        elif kind == 5 and isinstance(holder, dict):
            name = STRANGE[choose(len(STRANGE))]
            holder[name if isinstance(name, str) else f"{key}_"] = holder.pop(key)
        elif kind == 6:
            other, place = places[choose(len(places))]
            if not _within(holder[key], other) and not _within(other[place], holder):
                holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
        elif type(holder[key]) is int:
            holder[key] = (-holder[key], holder[key] + 1, holder[key] - 1, holder[key] * 1000, float(holder[key]))[
                choose(5)
            ]
        else:
            holder[key] = [holder[key]]
    return value


def _places(value: Any):
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        # Of long lists the first entries say as much as all.
        for place in range(min(len(value), 8)):
            yield value, place
            yield from _places(value[place])


def _within(value: Any, holder: Any) -> bool:
    return value is holder or any(_within(own[key], holder) for own, key in _places(value) if own is value)


def edit_bytes(content: bytes, choose: Choose, *, edits: int = 1) -> bytes:
    """Return bytes with some of them changed, removed, repeated or added."""
    changed = bytearray(content)
    for _ in range(edits):
        place = choose(len(changed) + 1)
        kind = choose(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << choose(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + 1 + choose(64)]
        elif kind == 3:
            changed[place:place] = bytes(choose(256) for _ in range(1 + choose(16)))
        elif kind == 4:
            changed[place:place] = changed[place : place + 1 + choose(64)]
        else:
            changed[place:place] = (b"\xff", b"\0", b"\xed\xa0\x80", b"{" * 5000, b"[" * 100_000, b"\r\n\x85")[
                choose(6)
            ]
    return bytes(changed)


def edit_safetensors(content: bytes, choose: Choose) -> bytes:
    """Return a safetensors file with its header, its length field or its bytes changed."""
    (length,) = struct.unpack("<Q", content[:8])
    kind = choose(5)
    if kind == 0:
        return edit_bytes(content, choose, edits=1 + choose(3))
    if kind == 1:
        wrong = (0, 1, 7, length - 1, length + 1, length + 8, 2**32, 2**63, 2**64 - 1)[choose(9)]
        return struct.pack("<Q", wrong) + content[8:]
    header, rest = content[8 : 8 + length], content[8 + length :]
    if kind == 2:
        header = edit_bytes(header, choose)
    else:
        edited = edit_json(json.loads(header), choose, edits=1 + choose(2))
        header = json.dumps(edited).encode()
    return struct.pack("<Q", len(header)) + header + rest
