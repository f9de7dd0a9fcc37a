"""Numbers as a person reads them. Decimal units throughout: 1 MB = 10**6 bytes, 1 k = 1000."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = [
    "count",
    "duration",
    "encodable",
    "flops",
    "labelled",
    "loss",
    "printable",
    "rate",
    "remaining",
    "signed",
    "size",
    "spelled",
    "steps",
    "stored",
    "tick",
]

_ASCII = str.maketrans({"–": "-", "→": "->", "·": ",", "…": "...", "±": "+-", "×": "x"})
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def _scaled(value: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: 1234567 -> ``1.23 M``."""
    if not math.isfinite(value):
        return str(value)
    power = 0
    # 999.5 would print as "1000", so it already belongs to the next prefix
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    exact_small_integer = power == 0 and value == int(value)
    digits = 0 if exact_small_integer else max(0, 2 - int(math.log10(max(abs(value), 1))))
    suffix = f"{_PREFIXES[power]}{unit}"
    return f"{value:.{digits}f} {suffix}".rstrip()


def count(value: float | None) -> str:
    """A quantity of things: ``1.23 M``."""
    return "–" if value is None else _scaled(value, "")


def size(value: float | None) -> str:
    """Bytes: ``612 MB``."""
    return "–" if value is None else _scaled(value, "B")


def flops(value: float | None) -> str:
    """Floating-point operations: ``3.40 TFLOP``."""
    return "–" if value is None else _scaled(value, "FLOP")


def tick(value: float, unit: str = "") -> str:
    """A mark on an axis, no more digits than needed: ``1.5 M``, ``20 MB``, ``0``."""
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:g} {_PREFIXES[power]}{unit}".rstrip() if value else "0"


def rate(value: float | None) -> str:
    """Tokens per second: ``12.3 k tok/s``."""
    return "–" if value is None else f"{_scaled(value, '')} tok/s"


def steps(value: int) -> str:
    """Step numbers stay exact: ``12,500``."""
    return f"{value:,}"


def loss(value: float | None) -> str:
    """A loss in nats, four decimals."""
    return "–" if value is None else f"{value:.4f}"


def labelled(text: str, label: str | None) -> str:
    """A figure with what its loss is behind it, where that is not exact: ``2.1450 (bound)``."""
    return text if label in (None, "exact") else f"{text} ({label})"


def signed(value: float) -> str:
    """A difference of losses: ``+0.0123``; an exact zero is called unchanged."""
    return "unchanged" if value == 0 else f"{value:+.4f}"


def duration(seconds: float | None) -> str:
    """``0:07``, ``12:34`` or ``3:05:09``; days from 48 hours on."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(max(0.0, seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def remaining(seconds: float | None) -> str:
    """A time that is guessed, no finer than it can be known: ``0:07``, ``12:34``, ``3:05 h``, ``2 d 4 h``."""
    if seconds is None or not math.isfinite(seconds) or seconds < 3600:
        return duration(seconds)
    hours, minutes = divmod(round(seconds / 60), 60)
    return duration(seconds) if hours >= 48 else f"{hours}:{minutes:02d} h"


def printable(text: str) -> str:
    """``text`` with control characters written out, so that a model's output cannot drive a terminal.

    Line feeds and tabs stay. Everything else below U+0020, DEL, the C1 controls, lone surrogates and
    the characters that reorder text become ``\\x1b``-style escapes.
    """
    return "".join(_visible(char) for char in text)


def encodable(text: str, encoding: str) -> str:
    """``text`` with what ``encoding`` lacks as ``\\u2192``-style escapes: a terminal must never end a run."""
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def spelled(text: str, encoding: str) -> str:
    """Words of ours, with dashes and arrows as ASCII where ``encoding`` lacks them; the rest is ``encodable``."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII)
    return encodable(text, encoding)


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t":
        return char
    if code < 0x20 or 0x7F <= code <= 0x9F:
        return f"\\x{code:02x}"
    reorders = code in (0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    if reorders or 0xD800 <= code <= 0xDFFF:
        return f"\\u{code:04x}"
    return char


def stored(figures: Mapping[str, int]) -> list[str]:
    """What a stage had stored of its frozen trunk, fact by fact."""
    facts = [
        f"{figures['entries']:,} {'entry' if figures['entries'] == 1 else 'entries'}",
        f"{size(figures['ram_bytes'])} in memory",
        f"{size(figures['disk_bytes'])} on disk",
        f"{figures['hits']:,} read",
    ]
    if figures["evicted"]:
        facts.append(
            f"{figures['evicted']:,} older {'store' if figures['evicted'] == 1 else 'stores'} removed"
        )
    return facts
