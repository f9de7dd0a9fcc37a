"""What a tokenizer.json may say, checked before the library sees it.

The library takes two tokens of one id, ids up to 2^31, templates with ids outside of the vocabulary, replacements that
multiply a text a thousandfold, and padding to any length; some of these end the process. Here every id belongs to one
token, every part is of a known kind, and what only pads or shortens is taken out.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from math import prod
from typing import Any

from stackwise.data import tokenizer_probe
from stackwise.storage.errors import DamagedFileError, UnsafeInputError

MAX_TOKENS = 4_000_000
MAX_PARTS = 64
MAX_DEPTH = 4
MAX_REGEX = 8192
MAX_GROWTH = 256
"""How many times longer all replacements together may make a text."""
_GAPS = 65_536
_TEXT = 1024
_SECONDS = 120

_FIELDS = {
    *("version", "truncation", "padding", "added_tokens", "model"),
    *("normalizer", "pre_tokenizer", "post_processor", "decoder"),
}
_MODELS = {"BPE", "Unigram", "WordPiece", "WordLevel"}
_PARTS = {
    "normalizer": {
        *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
        *("Prepend", "Replace", "Sequence", "Strip", "StripAccents"),
    },
    "pre_tokenizer": {
        *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace"),
        *("Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    },
    "post_processor": {
        *("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"),
    },
    "decoder": {
        *("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence"),
        *("Strip", "WordPiece"),
    },
}
_ITEMS = ("normalizers", "pretokenizers", "processors", "decoders")
_NUMBERS = {"max_input_chars_per_word": 10_000, "length": 2**20, "start": 1024, "stop": 1024}
"""Fields of models and parts that count something, with the most that is taken."""


def checked(definition: dict[str, Any], where: str) -> dict[str, Any]:
    """The definition without padding and truncation. UnsafeInputError, naming file and field, for what is refused."""
    rules = _Rules(where)
    if stray := sorted(definition.keys() - _FIELDS):
        rules.refuse(stray[0], "is no field of a tokenizer that is known")
    model = definition.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise DamagedFileError("it has no model with a vocabulary")
    ids = rules.vocabulary(model)
    rules.added(definition.get("added_tokens") or [], ids)
    highest = max(ids.values(), default=-1)
    if highest >= 2 * len(ids) + _GAPS:
        rules.refuse("model.vocab", f"has the id {highest} in a vocabulary of {len(ids)}")
    for place, kinds in _PARTS.items():
        rules.part(place, definition.get(place), kinds, ids)
    if prod(rules.growths) > MAX_GROWTH:
        rules.refuse("normalizer", f"and the decoder make a text more than {MAX_GROWTH} times longer")
    return {**definition, "truncation": None, "padding": None}


def probe(content: str, where: str) -> None:
    """Have a limited process load and use the definition; UnsafeInputError when that does not end well."""
    if reason := _probed(content):
        raise UnsafeInputError(f"{where}: the tokenizer is refused: {reason}")


@functools.lru_cache(maxsize=64)
def _probed(content: str) -> str:
    """What went wrong in `tokenizer_probe`; empty when nothing did. A verdict holds as long as this process."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", tokenizer_probe.__file__],
            input=content.encode(),
            capture_output=True,
            timeout=_SECONDS,
            env={},
        )
    except subprocess.TimeoutExpired:
        return f"using it took more than {_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"using it ended the process by signal {-done.returncode}"
    said = (done.stdout or done.stderr).decode(errors="replace").strip().splitlines()
    return said[-1][:300] if said else f"using it ended the process with {done.returncode}"


class _Rules:
    def __init__(self, where: str) -> None:
        self.where = where
        self.parts = 0
        self.growths: list[int] = []

    def refuse(self, field: str, message: str) -> Any:
        raise UnsafeInputError(f"{self.where}: {field} {message}")

    def vocabulary(self, model: dict[str, Any]) -> dict[str, int]:
        """Token -> id; each id once."""
        kind, vocab = model.get("type", "BPE"), model.get("vocab")
        if not isinstance(kind, str) or kind not in _MODELS:
            self.refuse("model.type", f"is {kind!r:.80}; known: {', '.join(sorted(_MODELS))}")
        if model.get("dropout"):
            self.refuse("model.dropout", "makes ids random; it must be null")
        self.numbers("model", model)
        if isinstance(vocab, list):
            pieces = [row[0] if isinstance(row, list) and len(row) == 2 else None for row in vocab]
            unknown = model.get("unk_id")
            if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
                self.refuse("model.unk_id", f"is {unknown!r:.80}, outside of a vocabulary of {len(vocab)}")
            ids = {piece: i for i, piece in enumerate(pieces) if isinstance(piece, str)}
        elif isinstance(vocab, dict):
            ids = vocab
        else:
            return self.refuse("model.vocab", "is neither a map nor a list")
        if len(ids) != len(vocab):
            self.refuse("model.vocab", "holds a token twice, or one that is no text")
        if len(ids) > MAX_TOKENS:
            self.refuse("model.vocab", f"has {len(ids):,} tokens, {MAX_TOKENS:,} at most")
        if not all(type(i) is int and i >= 0 for i in ids.values()):
            self.refuse("model.vocab", "has an id that is no number from 0 on")
        if len(set(ids.values())) != len(ids):
            self.refuse("model.vocab", "gives two tokens one id")
        return dict(ids)

    def added(self, tokens: object, ids: dict[str, int]) -> None:
        """Take the added tokens into `ids`."""
        taken, seen = set(ids.values()), set()
        for number, token in enumerate(tokens if isinstance(tokens, list) else [None]):
            name = f"added_tokens[{number}]"
            if not isinstance(token, dict):
                return self.refuse(name, "is no map")
            content, i = token.get("content"), token.get("id")
            if not isinstance(content, str) or not 0 < len(content) <= _TEXT:
                return self.refuse(name, f"has no content of 1 to {_TEXT} characters")
            if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                return self.refuse(name, f"has the id {i!r:.80}")
            if content in seen or ids.get(content, i) != i or (content not in ids and i in taken):
                self.refuse(name, f"gives {content!r:.80} the id {i}, which has another meaning already")
            seen.add(content)
            ids[content] = i
            taken.add(i)
        return None

    def part(self, place: str, part: object, kinds: set[str], ids: dict[str, int], depth: int = 0) -> None:
        """Check a normalizer, pre-tokenizer, post-processor or decoder, and the parts in it."""
        if part is None:
            return None
        self.parts += 1
        if self.parts > MAX_PARTS or depth > MAX_DEPTH:
            self.refuse(place, f"has more than {MAX_PARTS} parts, or parts in parts in parts")
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in kinds:
            return self.refuse(place, f"is of the kind {kind!r:.80}; known: {', '.join(sorted(kinds))}")
        self.numbers(place, part)
        self.pattern(place, part.get("pattern"))
        for name in ("content", "prepend", "prepend_scheme", "replacement", "delimiter", "prefix", "suffix"):
            text = part.get(name)
            if isinstance(text, str) and len(text) > _TEXT:
                self.refuse(f"{place}.{name}", f"has {len(text):,} characters, {_TEXT} at most")
        if part["type"] == "Replace":
            self.growths.append(max(1, len(str(part.get("content", "")))))
        self.template(place, part, ids)
        for name in _ITEMS:
            items = part.get(name, [])
            if not isinstance(items, list):
                self.refuse(f"{place}.{name}", "is no list")
            for item in items:
                self.part(place, item, kinds, ids, depth + 1)
        return None

    def numbers(self, place: str, part: dict[str, Any]) -> None:
        for name, most in _NUMBERS.items():
            value = part.get(name)
            if value is not None and not (type(value) is int and 0 <= value <= most):
                self.refuse(f"{place}.{name}", f"is {value!r:.80}, outside of 0 to {most}")

    def pattern(self, place: str, pattern: object) -> None:
        texts = pattern.values() if isinstance(pattern, dict) else [pattern]
        for text in texts:
            if isinstance(text, str) and len(text) > MAX_REGEX:
                self.refuse(f"{place}.pattern", f"has {len(text):,} characters, {MAX_REGEX} at most")

    def template(self, place: str, part: dict[str, Any], ids: dict[str, int]) -> None:
        """Ids that a post-processor adds are those of their tokens."""
        named = [(part[name], None) for name in ("sep", "cls") if name in part]
        special = part.get("special_tokens") or {}
        if not isinstance(special, dict):
            return self.refuse(f"{place}.special_tokens", "is no map")
        for token in special.values():
            fields = token if isinstance(token, dict) else {}
            numbers, names = fields.get("ids"), fields.get("tokens")
            if not isinstance(numbers, list) or not isinstance(names, list) or len(numbers) != len(names):
                return self.refuse(f"{place}.special_tokens", "needs as many ids as tokens")
            named += [((name, i), None) for name, i in zip(names, numbers, strict=True)]
        for pair, _ in named:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[1]) is not int:
                return self.refuse(place, f"names the token {pair!r:.80}, which is no pair of text and id")
            if not isinstance(pair[0], str) or ids.get(pair[0]) != pair[1]:
                self.refuse(
                    place, f"adds {pair[0]!r:.80} as id {pair[1]}, which is not its id in the vocabulary"
                )
        return None
