"""Text to a prepared corpus, and text to a trained tokenizer. Nothing here prints, and nothing imports torch."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.data.corpus import FORMAT, SPLITS, VERSION, Corpus, sha256_of
from stackwise.data.errors import DataError
from stackwise.data.settings import DataSettings
from stackwise.data.sources import Document, Source, open_eval_source, open_source
from stackwise.data.tokenizers import CharTokenizer, LibraryTokenizer, Tokenizer, open_tokenizer, train_bpe
from stackwise.storage import ops
from stackwise.storage.sums import write_sums


def prepare(settings: DataSettings, cache_dir: str | os.PathLike[str]) -> Corpus:
    """Tokenize the text that `settings` names into memory-mapped shards under `cache_dir`.

    Documents are encoded one at a time. With several documents each ends with the tokenizer's
    end-of-text token; a single document has nothing to be separated from. The folder appears whole or
    not at all, its name depends on the text and settings, and a folder that is already there is used, after its files
    were compared with their hashes.

    Raises: FileNotFoundError naming the key; DataError for text or a tokenizer that cannot be used;
    DamagedDataError for broken files, also those of an earlier preparation.
    """
    source, held_out = open_source(settings), open_eval_source(settings)
    tokenizer = None if settings.tokenizer == "char" else open_tokenizer(settings.tokenizer)
    recipe = {
        "train": source.recipe(),
        "validation": {"fraction": settings.eval_fraction} if held_out is None else held_out.recipe(),
        "tokenizer": "char" if tokenizer is None else tokenizer.hash,
        "version": VERSION,
    }
    folder = Path(cache_dir) / sha256_of(recipe)[:16]
    if folder.exists():
        corpus = Corpus.open(folder, reused=True)
        corpus.verify()
        return corpus
    try:
        with ops.appearing(folder) as part:
            _write(part, recipe, tokenizer, source, held_out, settings)
    except OSError:
        if not folder.exists():
            raise
        # Another process prepared the same text meanwhile; its folder holds the same bytes.
    return Corpus.open(folder)


@dataclass(frozen=True)
class TrainedTokenizer:
    """What `train_tokenizer` made, and from how much text."""

    tokenizer: LibraryTokenizer
    path: Path
    n_documents: int
    n_bytes: int


def train_tokenizer(
    settings: DataSettings, vocab_size: int, path: str | os.PathLike[str], *, min_frequency: int = 2
) -> TrainedTokenizer:
    """Train a byte-level BPE on the training split of the text that `settings` names, and save it.

    `settings.tokenizer` is not used. Raises: as `prepare`, and DataError for a `vocab_size` below 258.
    """
    split = _Splitter(open_source(settings), open_eval_source(settings), settings.eval_fraction)
    counts = [0, 0]

    def texts() -> Iterator[str]:
        for name, document in split.documents():
            if name == "train":
                counts[0] += 1
                counts[1] += len(document.text.encode())
                yield document.text

    tokenizer = train_bpe(texts(), vocab_size, min_frequency=min_frequency)
    ops.make_dir(Path(path).parent)
    return TrainedTokenizer(tokenizer, tokenizer.save(path), *counts)


class _Splitter:
    """Hands out the documents of a source with the split each belongs to.

    Several documents are split by document: one is held out whenever the validation bytes so far are
    below their share, whatever its own size, so the held-out documents are spread over the source.
    A single document is split by character, its last part held out.
    """

    def __init__(self, source: Source, held_out: Source | None, fraction: float) -> None:
        self.source, self.held_out, self.fraction = source, held_out, fraction
        head = list(itertools.islice(self._texts(source), 2))
        if not head:
            raise DataError(
                "the training text is empty", where=_name(source), hint="data.source and data.path name it"
            )
        if held_out is not None and next(self._texts(held_out), None) is None:
            raise DataError(
                "the held-out text is empty", where=_name(held_out), hint="data.eval_path names it"
            )
        self.several = len(head) > 1

    def documents(self) -> Iterator[tuple[str, Document]]:
        if self.held_out is not None:
            yield from (("train", document) for document in self._texts(self.source))
            yield from (("validation", document) for document in self._texts(self.held_out))
        elif self.several:
            seen = held = 0
            for document in self._texts(self.source):
                size = len(document.text.encode())
                out = held < self.fraction * seen
                seen += size
                held += size if out else 0
                yield "validation" if out else "train", document
        else:
            for document in self._texts(self.source):
                cut = int(len(document.text) * (1 - self.fraction))
                yield "train", Document(document.text[:cut], document.where)
                yield "validation", Document(document.text[cut:], f"{document.where} from character {cut}")

    @staticmethod
    def _texts(source: Source) -> Iterator[Document]:
        return (document for document in source.documents() if document.text)


class _Shard:
    """A file under construction, with its hash."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.file = stack.enter_context(ops.NewFile(path, kind="export"))
        self.digest = sha256()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.digest.update(data)


class _SplitWriter:
    """Writes the tokens of one split and the starts of its documents."""

    def __init__(
        self,
        stem: Path,
        tokenizer: Tokenizer,
        dtype: str,
        separator: int | None,
        stack: ExitStack,
    ) -> None:
        self.tokens = _Shard(stem.with_suffix(".bin"), stack)
        self.starts = _Shard(stem.with_suffix(".documents.bin"), stack)
        self.tokenizer, self.dtype = tokenizer, dtype
        self.end = None if separator is None else np.array([separator], dtype)
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self.max_id = -1

    def add(self, document: Document) -> None:
        start = self.n_tokens
        try:
            for ids in self.tokenizer.encode_pieces(document.text):
                self._put(ids)
        except DataError as error:
            raise type(error)(error.message, where=document.where, hint=error.hint) from error
        if self.n_tokens == start:  # a tokenizer may drop all of a document, such as lone spaces
            return
        if self.end is not None:
            self._put(self.end)
        self.starts.write(np.array([start], "<i8"))
        self.n_documents += 1
        self.n_bytes += len(document.text.encode())

    def _put(self, ids: np.ndarray) -> None:
        if ids.size:
            self.max_id = max(self.max_id, int(ids.max()))
            self.tokens.write(ids.astype(self.dtype))
            self.n_tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": self.n_documents,
            "max_id": self.max_id,
            "sha256": {shard.path.name: shard.digest.hexdigest() for shard in (self.tokens, self.starts)},
        }


def _write(
    folder: Path,
    recipe: dict[str, Any],
    tokenizer: Tokenizer | None,
    source: Source,
    held_out: Source | None,
    settings: DataSettings,
) -> None:
    split = _Splitter(source, held_out, settings.eval_fraction)
    if tokenizer is None:
        characters: set[str] = set()
        for document in source.documents():
            characters.update(document.text)
        tokenizer = CharTokenizer(characters, separated=split.several)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    separator = tokenizer.eos_id if split.several else None
    with ExitStack() as stack:
        writers = {name: _SplitWriter(folder / name, tokenizer, dtype, separator, stack) for name in SPLITS}
        for name, document in split.documents():
            writers[name].add(document)
        counts = {name: writer.finish() for name, writer in writers.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe,
        "tokenizer": {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "separator": separator,
        },
        "dtype": dtype,
        "splits": counts,
    }
    tokenizer.save(folder / "tokenizer.json")
    ops.write_new(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()], kind="export")
    write_sums(folder)


def _name(source: Source) -> str:
    """The files or the dataset of a source, for an error message."""
    recipe = source.recipe()
    files = [str(file["name"]) for file in recipe.get("files", ())]
    return ", ".join(files[:3]) + (" ..." if len(files) > 3 else "") if files else ":".join(recipe["name"])
