"""A model folder: its configuration and its tensors, read one by one. Nothing in it is ever run or unpickled."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from stackwise.interop.errors import InterchangeError
from stackwise.interop.limits import check_config
from stackwise.model.files import open_tensors
from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.header import Header, read_header
from stackwise.storage.regular import PICKLES, check_file_name, read_json, refuse_pickles
from stackwise.storage.sums import FILE as SUMS
from stackwise.storage.sums import check_sums

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = WEIGHTS + ".index.json"
HUB_FILES = (CONFIG, GENERATION, "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json", SUMS)


def locate(name: str | Path) -> Path:
    """The folder that PATH_OR_ID stands for; an id of the Hugging Face hub is fetched, without any code files."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    text = str(name)
    if path.is_file() and path.name.endswith(PICKLES):
        raise UnsafeInputError(
            f"{path} is a pickle: loading one can run any code, so it is never opened. Name a model folder with "
            f"{CONFIG} and {WEIGHTS}"
        )
    if path.exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(
            f"{text!r} is no model folder (a folder with {CONFIG} and {WEIGHTS}), nor an id of the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise InterchangeError(
            f'{text!r} is no folder here, and fetching it needs huggingface_hub; pip install "stackwise[hf]"'
        ) from None
    try:
        return Path(snapshot_download(text, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise InterchangeError(
            f"{text!r} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({str(error).partition(chr(10))[0]}); give the path of a model folder"
        ) from error


class ModelFolder:
    """Configuration and tensors of a folder. `shapes` and `dtypes` are known without reading a tensor.

    Raises InterchangeError for a folder without usable weights, FileNotFoundError for one without configuration,
    DamagedFileError for a file that is not whole and UnsafeInputError for what must not be read: pickles, files that
    are no regular files of the folder, descriptions that name code, tensors that lie in two files. Where the folder has
    the SHA256SUMS that an export writes, what will be read is compared with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = locate(path)
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"{self.path} has no {CONFIG}, so it is no model folder")
        self.config = read_json(self.path / CONFIG)
        check_config(self.config, str(self.path / CONFIG))
        generation = self.path / GENERATION
        self.generation = read_json(generation) if generation.is_file() else {}
        self._files = self._find()
        names = sorted(set(self._files.values())) or [WEIGHTS]
        self._headers: dict[str, Header] = {name: read_header(self.path / name) for name in names}
        self._check_places()
        check_sums(self.path, [CONFIG, GENERATION, INDEX, "tokenizer.json", *names])
        rows = {key: row for header in self._headers.values() for key, row in header.rows.items()}
        self._files = self._files or dict.fromkeys(rows, WEIGHTS)
        self.shapes: dict[str, tuple[int, ...]] = {key: row.shape for key, row in rows.items()}
        self.dtypes: dict[str, str] = {key: row.dtype for key, row in rows.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, from the disk at the moment it is asked for."""
        file = self._files[name]
        with open_tensors(self.path / file, self._headers[file]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def _find(self) -> dict[str, str]:
        """Tensor -> file of the folder, as the index says; empty where a single file holds all."""
        if (self.path / INDEX).is_file():
            where = str(self.path / INDEX)
            files = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise InterchangeError(f"{where} has no weight_map")
            names = {check_file_name(name, where) for name in files.values()}
            plain: dict[str, str] = {}
            for name in sorted(names):
                other = plain.setdefault(name.lower(), name)
                if other != name:
                    raise UnsafeInputError(
                        f"{where} names {other} and {name}, which are one file on some disks"
                    )
                if name.endswith(PICKLES):
                    raise UnsafeInputError(f"{where} names {name}, a pickle, which is never opened")
                if not (self.path / name).exists():
                    raise InterchangeError(f"{self.path} lacks {name}, which {INDEX} names; fetch it again")
            return dict(files)
        if (self.path / WEIGHTS).exists():
            return {}
        refuse_pickles(self.path, WEIGHTS)
        raise InterchangeError(f"{self.path} has no weights: neither {WEIGHTS} nor {INDEX}")

    def _check_places(self) -> None:
        """Each tensor lies in the one file that the index names for it."""
        for name, header in self._headers.items():
            for key in header.rows:
                if self._files and self._files.get(key) != name:
                    other = self._files.get(key)
                    place = f"says that it is in {other}" if other else "does not know it"
                    raise UnsafeInputError(
                        f"{self.path / name} holds the tensor {key!r}, but {INDEX} {place}"
                    )
        lost = [key for key, name in self._files.items() if key not in self._headers[name].rows]
        if lost:
            raise InterchangeError(
                f"{self.path / self._files[lost[0]]} lacks the tensor {lost[0]!r}, which {INDEX} names"
            )
