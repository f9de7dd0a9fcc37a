"""Where text comes from: the standard library of Python, text, JSONL and Parquet files, the Hugging Face hub.

A source is read as a stream of documents, in an order that depends on its files only. Files are looked
up, and mistakes in their names reported, before anything is read.
"""

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stackwise.config.errors import did_you_mean, show
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.files import file_sha256, find_files, stdlib_files
from stackwise.data.settings import DataSettings

STDLIB_MAX_BYTES = 4_000_000
"""Cap of the standard library's text when `data.max_bytes` is null: enough for a demo, read in a moment."""
MAX_LINE = 256 * 2**20
"""Bytes of a row of JSONL: one document, which is held in memory."""


@dataclass(frozen=True)
class Document:
    """One text, and the place it was read from, for error messages."""

    text: str
    where: str


class Source(Protocol):
    """A stream of documents that can be read again and again, always in the same order."""

    def recipe(self) -> dict[str, Any]:
        """What identifies the text, JSON-able and the same in every folder and on every machine."""

    def documents(self) -> Iterator[Document]:
        """Every document in order, empty ones included.

        Raises: DataError for a row that has no text; DamagedDataError for broken UTF-8 or JSON.
        """


@dataclass(frozen=True)
class FileSource:
    """Documents of local files: a text file is one document, a row of JSONL or Parquet is one."""

    kind: str
    files: tuple[Path, ...]
    text_key: str = "text"
    max_bytes: int | None = None

    def recipe(self) -> dict[str, Any]:
        folder = Path(os.path.commonpath([file.parent for file in self.files]))
        recipe: dict[str, Any] = {"kind": self.kind, "max_bytes": self.max_bytes}
        if self.kind == "stdlib":
            recipe["python"] = platform.python_version()
        if self.kind in ("jsonl", "parquet"):
            recipe["text_key"] = self.text_key
        recipe["files"] = [
            {
                "name": file.relative_to(folder).as_posix(),
                "bytes": file.stat().st_size,
                "sha256": file_sha256(file),
            }
            for file in self.files
        ]
        return recipe

    def documents(self) -> Iterator[Document]:
        read = _READERS[self.kind]
        found = itertools.chain.from_iterable(read(file, self.text_key) for file in self.files)
        return _capped(found, self.max_bytes)


@dataclass(frozen=True)
class HubSource:
    """Rows of one split of a dataset on the Hugging Face hub, streamed; needs the `hf` extra."""

    name: tuple[str, ...]
    split: str
    text_key: str = "text"
    max_bytes: int | None = None

    def recipe(self) -> dict[str, Any]:
        return {
            "kind": "hf",
            "name": list(self.name),
            "split": self.split,
            "text_key": self.text_key,
            "max_bytes": self.max_bytes,
        }

    def documents(self) -> Iterator[Document]:
        return _capped(self._rows(), self.max_bytes)

    def _rows(self) -> Iterator[Document]:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "data.source hf needs the package datasets", hint="pip install 'stackwise[hf]'"
            ) from error
        title = ":".join(self.name)
        try:
            rows = datasets.load_dataset(*self.name, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the split {self.split!r} of the dataset {title!r} cannot be loaded ({error})",
                where="data.path",
                hint="check the name, [name, config] and the network, or use local files",
            ) from error
        for number, row in enumerate(rows, start=1):
            where = f"{title} {self.split} row {number}"
            yield Document(_text_of(row, self.text_key, where), where)


def open_source(settings: DataSettings) -> Source:
    """The training text that `data.source` and `data.path` name.

    Raises: FileNotFoundError naming `data.path` when a path or pattern finds no file; DataError when
    the path is missing from the configuration or is a folder.
    """
    if settings.source == "stdlib":
        cap = STDLIB_MAX_BYTES if settings.max_bytes is None else settings.max_bytes
        return FileSource("stdlib", stdlib_files(cap), max_bytes=cap)
    names = [settings.path] if isinstance(settings.path, str) else list(settings.path or ())
    if not names:
        raise DataError(
            f"data.path is {show(settings.path)}, but data.source {settings.source} reads from it",
            hint="give a path, or data.source=stdlib for the built-in text",
        )
    if settings.source == "hf":
        return HubSource(tuple(names), "train", settings.text_key, settings.max_bytes)
    files = find_files("data.path", names)
    if settings.source == "text":
        files = _enough(files, settings.max_bytes)
    return FileSource(settings.source, files, settings.text_key, settings.max_bytes)


def open_eval_source(settings: DataSettings) -> Source | None:
    """The held-out text of `data.eval_path`, read whole, or None when it is cut from the training text.

    With `data.source` hf it names another split of the same dataset, such as `validation`. With stdlib
    it names text files. Raises as `open_source`.
    """
    if settings.eval_path is None:
        return None
    names = [settings.eval_path] if isinstance(settings.eval_path, str) else list(settings.eval_path)
    if settings.source == "hf":
        name = (settings.path,) if isinstance(settings.path, str) else tuple(settings.path or ())
        return HubSource(name, "+".join(names), settings.text_key)
    kind = "text" if settings.source == "stdlib" else settings.source
    return FileSource(kind, find_files("data.eval_path", names), settings.text_key)


def _enough(files: tuple[Path, ...], max_bytes: int | None) -> tuple[Path, ...]:
    """The leading files that hold `max_bytes`, so that files nobody reads are not hashed either."""
    if max_bytes is None:
        return files
    before = itertools.accumulate((file.stat().st_size for file in files), initial=0)
    return tuple(file for file, start in zip(files, before, strict=False) if start < max_bytes)


def _capped(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents up to `max_bytes` of UTF-8; the one that crosses the cap ends at its last whole character."""
    left = max_bytes
    for document in documents:
        if left is not None:
            data = document.text.encode()
            if len(data) >= left:
                yield Document(data[:left].decode(errors="ignore"), document.where)
                return
            left -= len(data)
        yield document


def _read_text(path: Path, text_key: str) -> Iterator[Document]:
    yield Document(_decode(path.read_bytes(), path), str(path))


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as stream:
        for number in itertools.count(1):
            line = stream.readline(MAX_LINE + 1)
            if not line:
                return
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise DataError(
                    f"this line has more than {MAX_LINE:,} bytes",
                    where=f"{where}, byte {offset}",
                    hint="split the document into rows, or read it with data.source=text",
                )
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
                raise DamagedDataError(
                    f"this line is not JSON ({error})", where=where, hint="each line holds one JSON object"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"this row is {show(row)}, not an object",
                    where=where,
                    hint=f'write {{"{text_key}": "..."}}',
                )
            yield Document(_text_of(row, text_key, where), where)


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "data.source parquet needs the package pyarrow", hint="pip install 'stackwise[parquet]'"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DamagedDataError(f"this is not a Parquet file ({error})", where=str(path)) from error
    with table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise _missing_key(text_key, columns, str(path))
        rows = (
            text for batch in table.iter_batches(columns=[text_key]) for text in batch.column(0).to_pylist()
        )
        for number, text in enumerate(rows, start=1):
            where = f"{path}: row {number}"
            yield Document(_text_of({text_key: text}, text_key, where), where)


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    "stdlib": _read_text,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    if offset == 0 and data.startswith(_COMPRESSED):
        raise DamagedDataError("this is a compressed file", where=str(path), hint="unpack it first")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedDataError(
            f"0x{data[error.start]:02x} is not valid UTF-8 here ({error.reason})",
            where=f"{path}: byte {offset + error.start}",
            hint="convert the file, for example with `iconv -f latin1 -t utf-8`",
        ) from error
    if (at := data.find(0)) >= 0:
        raise DamagedDataError(
            "a zero byte: this is a binary file, or text in UTF-16",
            where=f"{path}: byte {offset + at}",
            hint="convert the file, for example with `iconv -f utf-16 -t utf-8`, or take the zeros out",
        )
    return text


_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh9", b"\xfd7zXZ")
"""How gzip, zstd, zip, bzip2 and xz begin."""


def _text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in row:
        raise _missing_key(text_key, list(row), where)
    text = row[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"the value of {text_key!r} is {show(text)}, not text",
            where=where,
            hint="data.text_key names the text",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DamagedDataError(
            f"character {error.start} of {text_key!r} is half of a surrogate pair, which is not text",
            where=where,
            hint="repair the escape \\ud800-\\udfff in this row",
        ) from error
    return text


def _missing_key(text_key: str, present: list[str], where: str) -> DataError:
    hint = f"present: {', '.join(present) or 'nothing'}; set data.text_key"
    near = did_you_mean(text_key, present)
    return DataError(
        f"there is no key {text_key!r} (data.text_key)", where=where, hint=f"{near} {hint}".strip()
    )
