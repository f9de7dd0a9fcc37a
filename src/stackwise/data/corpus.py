"""A prepared corpus: memory-mapped token shards, their tokenizer and a manifest."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.tokenizers import Tokenizer, load_tokenizer
from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.regular import open_regular, read_json
from stackwise.storage.sums import damaged

FORMAT = "stackwise-corpus"
VERSION = 2
SPLITS = ("train", "validation")
DTYPES = ("<u2", "<u4")
"""Number formats of stored tokens."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The tokens of one split, in order, and where each document starts.

    tokens [n_tokens] uint16 or uint32, doc_starts [n_documents] int64 and rising from 0, n_bytes of
    UTF-8 text the tokens spell (separators not counted). A split that lies in a folder is
    memory-mapped, and a worker process that receives it maps the same file.
    """

    name: str
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    doc_starts: npt.NDArray[np.int64]
    n_bytes: int
    max_id: int
    """The largest token id, -1 when there is none."""
    folder: Path | None = field(default=None, repr=False)

    @classmethod
    def from_arrays(
        cls,
        tokens: npt.ArrayLike,
        doc_starts: npt.ArrayLike = (0,),
        n_bytes: int = 0,
        name: str = "train",
    ) -> "TokenSplit":
        """A split held in memory."""
        ids = np.asarray(tokens, np.uint32)
        return cls(
            name,
            ids,
            np.asarray(doc_starts, np.int64),
            n_bytes,
            int(ids.max()) if ids.size else -1,
        )

    @classmethod
    def open(cls, folder: Path, name: str, counts: dict[str, Any], dtype: str) -> "TokenSplit":
        """Map the files `NAME.bin` and `NAME.documents.bin`, whose sizes must be those of the manifest."""
        numbers = [counts[key] for key in ("tokens", "documents", "bytes", "max_id")]
        if any(type(n) is not int or not -1 <= n < 2**62 for n in numbers) or min(numbers[:3]) < 0:
            raise ValueError(f"the counts of {name} are {numbers}")
        if dtype not in DTYPES:
            raise ValueError(f"tokens of dtype {dtype!r:.80}")
        return cls(
            name,
            _map(folder / f"{name}.bin", np.dtype(dtype), counts["tokens"]),
            _map(folder / f"{name}.documents.bin", np.dtype("<i8"), counts["documents"]),
            counts["bytes"],
            counts["max_id"],
            folder,
        )

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.doc_starts)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError, with file and position, when a token id is not below `vocab_size`."""
        if self.max_id < vocab_size:
            return
        at = int((self.tokens >= vocab_size).argmax())
        raise DataError(
            f"token {at} is id {int(self.tokens[at])}, outside a vocabulary of {vocab_size}",
            where=str(self.folder / f"{self.name}.bin") if self.folder else f"the {self.name} split",
            hint=f"set model.vocab_size to at least {self.max_id + 1} or null",
        )

    def check_batch(self, ids: npt.NDArray[np.integer[Any]], places: npt.NDArray[np.integer[Any]]) -> None:
        """Raise DamagedDataError for ids above the largest one of the split; `places` are those of the ids in it.

        On the CPU, before anything is looked up: on a GPU an id outside of an embedding ends the process.
        """
        if ids.size == 0 or int(ids.max()) <= self.max_id:
            return
        at = int(places.reshape(-1)[int((ids > self.max_id).argmax())])
        raise DamagedDataError(
            f"token {at}, at byte {at * self.tokens.itemsize}, is id {int(self.tokens[at])}, "
            f"but the largest in this file was {self.max_id} when it was written",
            where=str(self.folder / f"{self.name}.bin") if self.folder else f"the {self.name} split",
            hint=_AGAIN.format(self.folder) if self.folder else "",
        )

    def check_documents(self) -> None:
        """Raise DamagedDataError unless documents start at 0 and one after the other inside of the split."""
        starts = self.doc_starts
        if not len(starts):
            return
        # Compared, not subtracted: the difference of two numbers of 64 bits may not fit into 64 bits.
        right = np.ones(len(starts), bool)
        right[0] = starts[0] == 0
        right[1:] = starts[1:] > starts[:-1]
        right &= starts < self.n_tokens
        if right.all():
            return
        at = int((~right).argmax())
        raise DamagedDataError(
            f"document {at}, at byte {8 * at}, does not start after the one before it and before token {self.n_tokens}",
            where=str(self.folder / f"{self.name}.documents.bin")
            if self.folder
            else f"the {self.name} split",
            hint=_AGAIN.format(self.folder) if self.folder else "",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            return TokenSplit, (self.name, self.tokens, self.doc_starts, self.n_bytes, self.max_id)
        counts = {
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "bytes": self.n_bytes,
            "max_id": self.max_id,
        }
        return TokenSplit.open, (self.folder, self.name, counts, self.tokens.dtype.str)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A folder written by `prepare`: `train` and `validation` tokens, the tokenizer that made them, the manifest."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit
    reused: bool = False
    """True when the folder was there before."""

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical manifest, in hex: equal for equal text, tokenizer and settings."""
        return sha256_of(self.manifest)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, reused: bool = False) -> "Corpus":
        """Map a prepared corpus; sizes are checked, contents by `verify`.

        Raises: FileNotFoundError; DamagedDataError naming the file that does not fit the manifest.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        try:
            manifest = read_json(path)
            if manifest["format"] != FORMAT or manifest["version"] != VERSION:
                raise ValueError(f"format {manifest['format']} {manifest['version']}")
            splits = [
                TokenSplit.open(folder, name, manifest["splits"][name], manifest["dtype"]) for name in SPLITS
            ]
            tokenizer_hash = manifest["tokenizer"]["hash"]
        except (DamagedDataError, UnsafeInputError):
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDataError(
                f"this is not the manifest of a prepared corpus ({type(error).__name__}: {error})",
                where=str(path),
                hint=_AGAIN.format(folder),
            ) from error
        tokenizer = load_tokenizer(
            folder / "tokenizer.json", expected=str(tokenizer_hash), hint=_AGAIN.format(folder)
        )
        return cls(folder, manifest, tokenizer, splits[0], splits[1], reused)

    def verify(self) -> None:
        """Read every file and compare it with the SHA-256 that was noted. Raises: DamagedDataError naming the file."""
        shards = (f"{name}{ending}" for name in SPLITS for ending in (".bin", ".documents.bin"))
        wrong = damaged(self.folder, ["manifest.json", "tokenizer.json", *shards])
        if wrong is not None:
            raise DamagedDataError(wrong[1], where=str(wrong[0]), hint=_AGAIN.format(self.folder))


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_AGAIN = "delete the folder {} and prepare the data again"


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    expected = count * dtype.itemsize
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        raise DamagedDataError(
            "the file is missing", where=str(path), hint=_AGAIN.format(path.parent)
        ) from None
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size != expected:
            raise DamagedDataError(
                f"the file has {size} bytes, its manifest says {expected}",
                where=str(path),
                hint=_AGAIN.format(path.parent),
            )
        if count == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        # The plain array over the mapping: indexing a np.memmap pays for its bookkeeping in every batch.
        return np.asarray(np.memmap(file, dtype, mode="r"))
