"""Changes to files that know their structure: bytes, and single fields of JSON and YAML.

Every change follows from a `random.Random`, so that a number brings the same input back.
"""

from __future__ import annotations

import json
import random
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "a",
        "\x00",
        "\x1b[2J",
        "../../etc/passwd",
        "/dev/zero",
        "\ud800",
        "é" * 40,
        "0",
        "NaN",
        "A" * 3000,
    ),
    *([], {}, [[]], [0], [{}], {"a": 1}, {"": {}}, [0] * 50),
]
"""What is put in the place of a field."""
TEXTS = [
    *(b"\x00", b"\xff", b"\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b" ", b'"', b"\\", b"{", b"}", b"[", b"]"),
    *(b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"99999999999999999999", b"\\ud800", b"\\u0000", b"9" * 5000),
    *(b"!!python/object:os.system", b"&a", b"*a", b"<<: ", b": ", b"- ", b"? ", b"| ", b"# ", b"---\n", b"%YAML 3\n"),
    *(b"[" * 200, b"{" * 200, b'{"a":' * 1200, b"/../", b"\x1b[31m"),
]  # fmt: skip
"""What is put between bytes."""


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a piece cut out, doubled, moved, or something put in; the end cut off."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4) if draw.random() < 0.5 else 1):
        at, how = draw.randrange(len(out) + 1), draw.randrange(8)
        end = min(len(out), at + draw.choice((1, 1, 2, 4, 8, 40)))
        if how == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif how == 1 and at < len(out):
            out[at] = draw.randrange(256)
        elif how == 2:
            del out[at:end]
        elif how == 3:
            out[at:at] = out[at:end] * draw.choice((1, 1, 3, 50))
        elif how == 4:
            piece = bytes(out[at:end])
            del out[at:end]
            to = draw.randrange(len(out) + 1)
            out[to:to] = piece
        elif how == 5:
            del out[at:]
        elif how == 6 and at < len(out):
            out[at:end] = bytes(draw.choices(range(256), k=end - at))
        else:
            out[at:at] = draw.choice(TEXTS)
    return bytes(out)


def changed_fields(value: Any, draw: random.Random, times: int = 1) -> Any:
    """A copy in which fields have another value, another name, changed places, are missing or there twice."""
    for _ in range(times):
        value = _changed(value, draw, 0)
    return value


def _changed(value: Any, draw: random.Random, depth: int) -> Any:
    if not isinstance(value, dict | list) or not value or (depth and draw.random() < 0.15):
        return _another(value, draw)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[draw.randrange(len(keys))]
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    how = draw.random()
    if how < 0.75:
        copy[key] = _changed(copy[key], draw, depth + 1)
    elif how < 0.83:
        del copy[key]
    elif how < 0.9:
        other = keys[draw.randrange(len(keys))]
        copy[key], copy[other] = copy[other], copy[key]
    elif isinstance(copy, list):
        copy.insert(draw.randrange(len(copy) + 1), copy[key])
    else:
        name = draw.choice([*map(str, keys), *(text for text in VALUES if isinstance(text, str))])
        copy[name] = copy.pop(key) if draw.random() < 0.5 else copy[key]
    return copy


def _another(value: Any, draw: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, -value, 2**32, value))
    if isinstance(value, str) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return draw.choice(
            (value[:at], value[at:], value + value, value.upper(), value[:at] + "\x00" + value[at:])
        )
    return VALUES[draw.randrange(len(VALUES))]


def changed_json(value: Any, draw: random.Random) -> bytes:
    """JSON text of changed fields; sometimes its bytes are changed as well."""
    text = json.dumps(changed_fields(value, draw, draw.choice((1, 1, 1, 2, 4)))).encode()
    if draw.random() < 0.1:
        text = changed_bytes(text, draw)
    return text
