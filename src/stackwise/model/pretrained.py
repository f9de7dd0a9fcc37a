"""Embedding tables of pretrained models: found by a folder's headers, and read alone.

A family is the path of a model folder (config.json and safetensors files, sharded or not), a short name (`SHORT_NAMES`)
or an id of the Hugging Face hub. Nothing in a folder is run or unpickled; of its weights one tensor is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.storage.errors import DamagedFileError
from stackwise.storage.header import read_header
from stackwise.storage.regular import check_file_name, read_json, refuse_pickles

KEY = "model.tokenizer_embedding.family"
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "bert": "google-bert/bert-base-uncased",
    "modernbert": "answerdotai/ModernBERT-base",
    "llama3": "meta-llama/Llama-3.2-1B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "gemma3": "google/gemma-3-1b-pt",
}
_EMBEDDED = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "bert.embeddings.word_embeddings.weight",
    "embeddings.word_embeddings.weight",
    "model.embeddings.tok_embeddings.weight",
    "embeddings.tok_embeddings.weight",
)
_HEADS = ("lm_head.weight", "cls.predictions.decoder.weight", "decoder.weight")
NAMES = {"embed_tokens": _EMBEDDED, "lm_head": _HEADS}
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Table:
    """A table [rows, width] that has not been read."""

    family: str
    file: Path
    name: str
    rows: int
    width: int

    def read(self) -> Any:
        """The tensor, in the dtype of the file."""
        from stackwise.model.files import open_tensors

        with open_tensors(self.file) as file:
            return file.get_tensor(self.name)


def find_table(family: str, option: str = "embed_tokens") -> Table:
    """The table of a family: its embedding, or its head (that of a tied model is the embedding). ConfigError if none."""
    if option not in NAMES:
        close = did_you_mean(option, NAMES)
        raise ConfigError(
            Problem(
                "model.tokenizer_embedding.embedding_option", "is no table", option, ", ".join(NAMES), close
            )
        )
    source = _Folder(family) if Path(os.path.expanduser(family)).is_dir() else _Hub(family)
    tied = bool(source.config.get("tie_word_embeddings", True))
    wanted = (*NAMES[option], *(_EMBEDDED if option == "lm_head" and tied else ()))
    held = source.tensors()
    name = next((n for n in wanted if n in held), None)
    if name is None:
        like = sorted(n for n in held if "emb" in n or "wte" in n or "head" in n)[:8]
        message = f"has none of the tables known as {option}; what comes near: {', '.join(like) or 'nothing'}"
        raise ConfigError(Problem(KEY, message, family, ", ".join(NAMES[option])))
    return _header(family, source.fetch(held[name]), name)


def _header(family: str, path: Path, name: str) -> Table:
    try:
        rows = read_header(path).rows
    except (DamagedFileError, OSError) as error:
        raise ConfigError(Problem(KEY, f"cannot be read: {path} ({error})", family)) from None
    if name not in rows:
        raise ConfigError(Problem(KEY, f"cannot be read: {path} lacks {name}, which its index names", family))
    shape = rows[name].shape
    if len(shape) != 2:
        raise ConfigError(Problem(KEY, f"holds {name} of shape {list(shape)}, which is no table", family))
    return Table(family, path, name, *shape)


class _Folder:
    """A model folder on this machine."""

    def __init__(self, family: str) -> None:
        self.family, self.path = family, Path(os.path.expanduser(family))
        self.config = self._json("config.json")

    def fetch(self, name: str) -> Path:
        if not (self.path / check_file_name(name, f"{self.path / _INDEX}")).is_file():
            raise ConfigError(Problem(KEY, f"has no file {name!r}", self.family))
        return self.path / name

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def tensors(self) -> dict[str, str]:
        """Tensor -> file; the weights are not read."""
        if self.has(_INDEX):
            listed = self._json(_INDEX).get("weight_map")
            if not isinstance(listed, dict):
                raise ConfigError(Problem(KEY, f"has an {_INDEX} without a weight_map", self.family))
            return {str(tensor): str(file) for tensor, file in listed.items()}
        if not self.has(_WEIGHTS):
            refuse_pickles(self.path, _WEIGHTS)
            message = f"has no weights: neither {_WEIGHTS} nor {_INDEX} (pickled weights are not read)"
            raise ConfigError(Problem(KEY, message, self.family))
        try:
            return dict.fromkeys(read_header(self.fetch(_WEIGHTS)).rows, _WEIGHTS)
        except DamagedFileError as error:
            raise ConfigError(Problem(KEY, f"holds a damaged {_WEIGHTS} ({error})", self.family)) from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.fetch(name))
        except DamagedFileError as error:
            raise ConfigError(Problem(KEY, f"has a damaged {name} ({error})", self.family)) from None


class _Hub(_Folder):
    """A model of the hub; only the files that are asked for are fetched."""

    def __init__(self, family: str) -> None:
        self.id = SHORT_NAMES.get(family, family)
        try:
            from huggingface_hub import hf_hub_download
        except ModuleNotFoundError:
            raise self._unknown(
                family, 'fetching it needs huggingface_hub; pip install "stackwise[hf]"'
            ) from None
        self._download = hf_hub_download
        self.family = family
        try:
            self.path = Path(hf_hub_download(self.id, "config.json")).parent
        except (OSError, ValueError) as error:
            raise self._unknown(family, str(error).partition("\n")[0]) from None
        self.config = self._json("config.json")

    def fetch(self, name: str) -> Path:
        from huggingface_hub.errors import EntryNotFoundError

        check_file_name(name, f"{_INDEX} of {self.family}")
        try:
            return Path(self._download(self.id, name))
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(Problem(KEY, f"cannot be fetched: {name} ({reason})", self.family)) from None

    def has(self, name: str) -> bool:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            self._download(self.id, name)
        except EntryNotFoundError:
            return False
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(Problem(KEY, f"cannot be fetched: {name} ({reason})", self.family)) from None
        return True

    @staticmethod
    def _unknown(family: str, reason: str) -> ConfigError:
        close = did_you_mean(family, SHORT_NAMES)
        names = ", ".join(SHORT_NAMES)
        hint = "give the path of a model folder with config.json and its safetensors files"
        return ConfigError(
            Problem(
                KEY,
                f"is no folder here and cannot be fetched ({reason})",
                family,
                f"a folder, an id of the Hugging Face hub, or one of {names}",
                f"{close}; {hint}" if close else hint,
            )
        )
