"""Files and arguments changed at random, as strangers, editors and broken copies change them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (
    "0",
    "-1",
    "1",
    "2147483648",
    str(10**30),
    "9" * 5001,
    "1e999",
    "999999999",
    "-1e-320",
    ".5",
    "NaN",
)
PLAIN = (*NUMBERS, ".inf", "-Infinity", "true", "null", "~", "[]", "{}", '""', "''", "[[[[]]]]")
TEXTS = (
    "",
    "a" * 300,
    "../../x",
    "/",
    "\\..\\x",
    "\x1b[31m",
    "\u202etxt.exe",
    "\ud800",
    "a\0b",
    "\r\n",
    "http://me:pass@host/x",
    "{}",
    "%s%d",
    "\ufeff",
    "\u0661",
)
BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"[" * 3000,
    b"{" * 3000,
    b"&a *a ",
    b"\n",
)
_ENDS = 4096
VALUES: tuple[Any, ...] = (
    *(0, -1, 1.5, 10**30, -(10**18), 2**63, 2**64, 1e308, float("nan"), float("inf"), -0.0),
    *(None, True, False, [], {}, [[]], [None], {"a": 1}, [0] * 50),
    *TEXTS,
)


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, left out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed) + 1)
        if draw.random() < 0.8:  # where headers and directories are
            place = min(place, draw.randrange(_ENDS))
            place = draw.choice((place, max(0, len(changed) - place)))
        end = min(len(changed), place + draw.choice((1, 2, 8, 64, 4096)))
        how = draw.randrange(5)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif how == 1:
            del changed[place:end]
        elif how == 2:
            changed[place:place] = changed[place:end]
        elif how == 3:
            changed[place:place] = draw.choice(BYTES)
        elif how == 4:
            del changed[place:]
    return bytes(changed)


def of_lines(content: bytes, draw: random.Random) -> bytes:
    """A value of a ``key: value`` or ``"key": value`` line replaced, a line moved or doubled."""
    lines = content.decode().split("\n")
    place = draw.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    how = draw.randrange(4)
    if how <= 1 and colon:
        value = draw.choice(PLAIN) if how else json.dumps(draw.choice(TEXTS))
        lines[place] = f"{key}: {value}"
    elif how == 2:
        lines.insert(draw.randrange(len(lines)), lines[place])
    else:
        lines[place] = " " * draw.randrange(6) + lines[place].lstrip()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def of_json(content: bytes, draw: random.Random) -> bytes:
    """One or two values of a JSON document replaced, left out or put elsewhere."""
    tree = [json.loads(content)]
    for _ in range(draw.choice((1, 1, 2))):
        holder, key = draw.choice(list(_places(tree)))
        if draw.random() < 0.15 and holder is not tree:
            del holder[key]
        elif draw.random() < 0.2:
            other, place = draw.choice(list(_places(tree)))
            holder[key] = json.loads(json.dumps(other[place]))
        else:
            holder[key] = draw.choice(VALUES)
    return json.dumps(tree[0]).encode()


def _places(tree: Any) -> Any:
    """(holder, key) of every value below ``tree``."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def of_header(content: bytes, draw: random.Random) -> bytes:
    """The JSON header of a safetensors file changed, its length with it or not."""
    size = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + size], draw)
    length = draw.choice((len(header), len(header), len(header), size, 2**62, 0))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def of_values(values: list[str], draw: random.Random) -> str:
    """``KEY=VALUE`` with another value, or with another key."""
    key, _, value = draw.choice(values).partition("=")
    if draw.random() < 0.15:
        key = draw.choice((key + ".x", key[:-1], "." + key, "", key.upper(), key + "."))
    return f"{key}={draw.choice((*PLAIN, *map(json.dumps, TEXTS), value + value, '[' * 200))}"


Mutation = Callable[[bytes, random.Random], bytes]
