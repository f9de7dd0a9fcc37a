"""Any text as tokens in memory, spelled by a tokenizer that is there: what a run is measured on besides its own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stackwise.data.corpus import FORMAT, VERSION, Corpus, TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.files import find_files
from stackwise.data.sources import FileSource
from stackwise.data.tokenizers import Tokenizer

KINDS = {".jsonl": "jsonl", ".parquet": "parquet"}
"""Kind of source by the ending of its files; every other ending is plain text."""


def read_corpus(name: str, tokenizer: Tokenizer, *, text_key: str | None = None) -> Corpus:
    """The text of a file, of the files of a glob, or of a prepared corpus folder, whose held-out split it is.

    A text file is one document, and so is a row of JSONL or Parquet, whose `text_key` (null: text) holds it; several documents each
    end with the tokenizer's end-of-text token, as in training. `train` and `validation` of the result are the same
    split: all of the text. Its `hash` tells the text from all others, in every folder.
    FileNotFoundError and DataError name the file, and what is wrong in it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _no_key(text_key, "a prepared corpus")
        return _prepared(folder, tokenizer)
    files = find_files("--text", [name])
    kinds = {KINDS.get(file.suffix, "text") for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"its files are of several kinds, {' and '.join(sorted(kinds))}",
            where=f"--text {name}",
            hint="name files of one ending",
        )
    kind = kinds.pop()
    if kind == "text":
        _no_key(text_key, "a text file")
    source = FileSource(kind, files, text_key or "text")
    try:
        texts = [document for document in source.documents() if document.text]
    except DataError as error:
        # the settings of a source are options here
        message, hint = (part.replace("data.text_key", "--text-key") for part in (error.message, error.hint))
        raise type(error)(message, where=error.where, hint=hint) from error
    end = tokenizer.eos_id if len(texts) > 1 else None
    parts: list[np.ndarray] = []
    starts: list[int] = []
    tokens = n_bytes = 0
    for document in texts:
        start = tokens
        try:
            for ids in tokenizer.encode_pieces(document.text):
                parts.append(ids.astype(np.uint32))
                tokens += len(ids)
        except DataError as error:
            raise type(error)(error.message, where=document.where, hint=error.hint) from error
        if tokens == start:
            continue
        if end is not None:
            parts.append(np.array([end], np.uint32))
            tokens += 1
        starts.append(start)
        n_bytes += len(document.text.encode())
    if not tokens:
        raise DataError("there is no text in it", where=f"--text {name}")
    split = TokenSplit.from_arrays(np.concatenate(parts), starts, n_bytes, "text")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": source.recipe(),
        "tokenizer": tokenizer.hash,
        "separator": end,
    }
    return Corpus(folder, manifest, tokenizer, split, split)


def _no_key(text_key: str | None, what: str) -> None:
    """DataError where a field is named and there are none."""
    if text_key is not None:
        raise DataError(
            f"{what} has no fields, so there is nothing to choose by",
            where=f"--text-key {text_key}",
            hint=f"leave it out; files with fields end with {' or '.join(KINDS)}",
        )


def _prepared(folder: Path, tokenizer: Tokenizer) -> Corpus:
    if not (folder / "manifest.json").is_file():
        raise DataError(
            "this folder is no prepared corpus: it has no manifest.json",
            where=f"--text {folder}",
            hint=f"name its files, such as {str(folder / '*.txt')!r}",
        )
    corpus = Corpus.open(folder, reused=True)
    corpus.verify()
    if corpus.tokenizer.hash != tokenizer.hash:
        raise DataError(
            "this corpus was spelled by another tokenizer than the run's, so its tokens mean something else",
            where=f"--text {folder}",
            hint="name the text itself",
        )
    return Corpus(folder, corpus.manifest, tokenizer, corpus.validation, corpus.validation, True)
