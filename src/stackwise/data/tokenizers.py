"""Tokenizers: bytes, characters, and every tokenizer the `tokenizers` library can load or train.

A tokenizer is one JSON file. Text is always encoded as ordinary text: a document that spells out a
special token does not get that token.
"""

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise.config.errors import did_you_mean
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.tokenizer_rules import checked, probe
from stackwise.storage import ops
from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.regular import read_json

Ids = npt.NDArray[np.integer[Any]]

EOS = "<|endoftext|>"
PAD = "<|pad|>"

# A tokenizer.json does not say which of its special tokens ends a text; these are the names in use.
_EOS_NAMES = (
    EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "[SEP]",
)
_PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")

_MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")

_OWN_FORMAT = "stackwise-tokenizer"
_PIECE = 1 << 20
"""Characters encoded at a time: a library `Encoding` takes some 100 bytes per token."""


def _hash(definition: dict[str, Any]) -> str:
    canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Tokenizer(ABC):
    """Text to token ids and back.

    `name` is the kind, `vocab_size` counts every id including special tokens, `eos_id` separates
    documents and `pad_id` fills rows; both are None when the vocabulary has no such token.
    """

    name: str
    vocab_size: int
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None = None
    """The token that stands for a hidden one, if the vocabulary has one."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        return tuple(i for i in (self.eos_id, self.pad_id, self.mask_id) if i is not None)

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """All that makes this tokenizer what it is, JSON-able; the content of its file."""

    @abstractmethod
    def _ids(self, text: str, start: int) -> Ids:
        """Ids of `text`, which begins at character `start` of the document."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """Text of ids that are all in the vocabulary; special tokens give none."""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical definition, in hex."""
        return _hash(self.definition())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises: DataError for text the vocabulary cannot spell."""
        return [int(i) for piece in self.encode_pieces(text) for i in piece]

    def encode_pieces(self, text: str) -> Iterator[Ids]:
        """Ids of a text, as one array after another, so that a long text never stands in memory as objects."""
        start = 0
        while start < len(text):
            stop = self._cut(text, start + _PIECE)
            yield self._ids(text[start:stop], start)
            start = stop

    def start_ids(self) -> list[int]:
        """What stands in for an empty prompt: a newline, or token 0 where the vocabulary has none.

        Not the end-of-text token: it closes documents, and with masked documents a model never learns what follows.
        """
        try:
            return self.encode("\n") or [0]
        except ValueError:
            return [0]

    def _cut(self, text: str, stop: int) -> int:
        """Where a piece that may reach character `stop` ends."""
        return stop

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Never raises: broken UTF-8 and ids outside the vocabulary become U+FFFD."""
        out: list[str] = []
        known: list[int] = []
        for i in map(int, ids):
            if 0 <= i < self.vocab_size:
                known.append(i)
            else:
                out += [self._text(known), "\ufffd"]
                known = []
        return "".join([*out, self._text(known)])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tokenizer as one JSON file, replacing it whole or not at all; gives back the path."""
        target = Path(path)
        ops.replace_text(target, json.dumps(self.definition(), ensure_ascii=False, indent=1))
        return target


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then end-of-text and padding. It spells every text."""

    name = "byte"
    vocab_size = 258
    eos_id = 256
    pad_id = 257

    def definition(self) -> dict[str, Any]:
        return {"format": _OWN_FORMAT, "version": 1, "kind": "byte"}

    def _ids(self, text: str, start: int) -> Ids:
        return np.frombuffer(text.encode(), np.uint8)

    def _text(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points.

    `separated` adds end-of-text and padding after them; a corpus of a single document needs neither,
    and then the vocabulary is exactly its set of characters.
    """

    name = "char"

    def __init__(self, characters: Iterable[str], *, separated: bool) -> None:
        self.characters = sorted(set(characters))
        self.separated = separated
        n = len(self.characters)
        self.vocab_size = n + 2 if separated else n
        self.eos_id = n if separated else None
        self.pad_id = n + 1 if separated else None
        points = np.array([ord(c) for c in self.characters], np.int64)
        self._table = np.full(int(points.max(initial=0)) + 2, -1, np.int32)  # the last entry stays unknown
        self._table[points] = np.arange(n)

    def definition(self) -> dict[str, Any]:
        return {
            "format": _OWN_FORMAT,
            "version": 1,
            "kind": "char",
            "characters": "".join(self.characters),
            "separated": self.separated,
        }

    def _ids(self, text: str, start: int) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            at = int(ids.argmin())
            raise DataError(
                f"the character {text[at]!r} (U+{ord(text[at]):04X}) at position {start + at}"
                f" is not among the {len(self.characters)} of the char tokenizer",
                hint="use data.tokenizer=byte, or train on text that has it",
            )
        return ids

    def _text(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids if i < len(self.characters))


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, made from the content of a `tokenizer.json`.

    The end of text and the padding token are known by their usual names (`<|endoftext|>`, `</s>`,
    `[PAD]`, ...).
    """

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_str(content)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UnsafeInputError(f"the tokenizer ends the library that loads it: {error}") from None
        # What a file made for inference may ask for would silently shorten a document.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        vocabulary = library.get_vocab(with_added_tokens=True)
        special = {token.content: i for i, token in library.get_added_tokens_decoder().items()}
        self._library = library
        self._definition: dict[str, Any] = json.loads(library.to_str())
        self.name = str(self._definition["model"]["type"]).lower()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        self.eos_id = next((special[name] for name in _EOS_NAMES if name in special), None)
        self.pad_id = next((special[name] for name in _PAD_NAMES if name in special), None)
        self.mask_id = next((special[name] for name in _MASK_NAMES if name in special), None)
        self._special = tuple(sorted(special.values()))

    @property
    def special_ids(self) -> tuple[int, ...]:
        return self._special

    def definition(self) -> dict[str, Any]:
        return self._definition

    def _ids(self, text: str, start: int) -> Ids:
        try:
            return np.array(self._library.encode(text, add_special_tokens=False).ids, np.uint32)
        except BaseException as error:
            # A pattern that gives up inside of the library is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise UnsafeInputError(
                f"the tokenizer cannot encode the text at character {start}: {error}"
            ) from None

    def _cut(self, text: str, stop: int) -> int:
        # A token hardly ever spans the end of a line, so a long document is cut there.
        line = text.rfind("\n", stop - _PIECE, stop) + 1 if stop < len(text) else 0
        return line or stop

    def _text(self, ids: list[int]) -> str:
        return str(self._library.decode(ids, skip_special_tokens=True))


def load_tokenizer(
    path: str | os.PathLike[str], *, foreign: bool = False, expected: str | None = None, hint: str = ""
) -> Tokenizer:
    """The tokenizer of a file, or of the `tokenizer.json` in a folder.

    `foreign`: the file comes from elsewhere, so the library reads it in a limited process of its own first. `expected`:
    the `Tokenizer.hash` it must have, compared before the library reads it; `hint`: what to do about another. Raises: FileNotFoundError;
    DamagedDataError when the file is broken or another one; UnsafeInputError for what must not be loaded.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        definition = read_json(file)
        if expected is not None and _hash(definition) != expected:
            raise DamagedDataError(
                "this is not the tokenizer that was stored here: its SHA-256 is another",
                where=str(file),
                hint=hint,
            )
        if definition.get("format") == _OWN_FORMAT:
            return _own(definition)
        if "model" not in definition:
            raise ValueError("it has no model")
        definition = checked(definition, str(file))
        content = json.dumps(definition, ensure_ascii=False)
        if foreign:
            probe(content, str(file))
        return LibraryTokenizer(content)
    except (FileNotFoundError, UnsafeInputError, DamagedDataError):
        raise
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise DamagedDataError(
            f"this is not a tokenizer ({type(error).__name__}: {error})",
            where=str(file),
            hint="write it again with `stackwise tokenizer train`, or fetch it again",
        ) from error


def _own(definition: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file in our own format."""
    if definition["version"] != 1:
        raise ValueError(f"version {definition['version']!r} was written by a newer release")
    if definition["kind"] == "byte":
        return ByteTokenizer()
    if definition["kind"] == "char":
        characters, separated = definition["characters"], definition["separated"]
        if not isinstance(characters, str) or not isinstance(separated, bool):
            raise TypeError("characters must be a text and separated true or false")
        return CharTokenizer(characters, separated=separated)
    raise ValueError(f"unknown kind {definition['kind']!r}")


def open_tokenizer(name: str) -> Tokenizer:
    """What `data.tokenizer` names, except `char`, whose vocabulary comes from the text.

    A file or folder that exists is read; any other name is an id on the Hugging Face hub.
    Raises: FileNotFoundError for a path, DataError for an id that cannot be fetched.
    """
    if name == "byte":
        return ByteTokenizer()
    path = Path(os.path.expanduser(name))
    if path.exists():
        return load_tokenizer(path, foreign=True)
    if name.endswith(".json") or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"data.tokenizer: there is no file {name!r}; allowed: byte, char, the path of a tokenizer.json,"
            " a Hugging Face id; `stackwise tokenizer train` makes one"
        )
    near = did_you_mean(name, ["byte", "char"])
    if near and "/" not in name:
        raise DataError(f"data.tokenizer is {name!r}, which names no tokenizer", hint=near)
    from huggingface_hub import hf_hub_download

    try:
        return load_tokenizer(hf_hub_download(name, "tokenizer.json"), foreign=True)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError | UnsafeInputError):
            raise
        raise DataError(
            f"data.tokenizer: {name!r} is no file here and cannot be fetched from the Hugging Face hub ({error})",
            hint="use byte, char or the path of a tokenizer.json",
        ) from error


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> LibraryTokenizer:
    """Train a byte-level BPE: 256 bytes, end-of-text and padding, then the merges the texts support.

    The result has at most `vocab_size` ids, fewer when the texts hold fewer repeated pairs. Method:
    Sennrich et al. 2016 (arXiv:1508.07909) over bytes, as in GPT-2.
    Raises: DataError when `vocab_size` is below the 258 that are always there.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 2
    if vocab_size < least:
        raise DataError(
            f"vocab_size is {vocab_size}, below the {least} that are always there (256 bytes, {EOS}, {PAD})",
            hint=f"ask for {least} or more",
        )
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer=trainer)
    return LibraryTokenizer(library.to_str())
