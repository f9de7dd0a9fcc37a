"""A model folder: its configuration and its tensors, read one by one. Nothing in it is ever run or unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stackwise.interop.errors import InterchangeError

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = WEIGHTS + ".index.json"
_MAX_JSON = 64 * 2**20
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = (CONFIG, GENERATION, "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json")


def locate(name: str | Path) -> Path:
    """The folder that PATH_OR_ID stands for; an id of the Hugging Face hub is fetched, without any code files."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    if path.stat().st_size > _MAX_JSON:
        raise InterchangeError(f"{path} is larger than {_MAX_JSON} bytes, too large for a description")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InterchangeError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InterchangeError(f"{path} holds a {type(data).__name__}, not an object")
    return data


class ModelFolder:
    """Configuration and tensors of a folder. `shapes` and `dtypes` are known without reading a tensor.

    Raises InterchangeError for a folder without usable weights, FileNotFoundError for one without configuration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = locate(path)
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"{self.path} has no {CONFIG}, so it is no model folder")
        self.config = read_json(self.path / CONFIG)
        generation = self.path / GENERATION
        self.generation = read_json(generation) if generation.is_file() else {}
        self._files = self._find()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in sorted(set(self._files.values())):
            self._read_header(name)

    def get(self, name: str) -> Tensor:
        """One tensor, from the disk at the moment it is asked for."""
        with safe_open(self.path / self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _find(self) -> dict[str, str]:
        """Tensor -> file of the folder; for a single file, filled in when its header is read."""
        if (self.path / INDEX).is_file():
            files = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise InterchangeError(f"{self.path / INDEX} has no weight_map")
            for name in set(files.values()):
                if not isinstance(name, str) or Path(name).name != name:
                    raise InterchangeError(
                        f"{self.path / INDEX} names {name!r}, which is no file of the folder"
                    )
                if not (self.path / name).is_file():
                    raise InterchangeError(f"{self.path} lacks {name}, which {INDEX} names; fetch it again")
            return dict(files)
        if (self.path / WEIGHTS).is_file():
            return {"": WEIGHTS}
        pickled = sorted(file.name for pattern in _PICKLED for file in self.path.glob(pattern))
        if pickled:
            raise InterchangeError(
                f"{self.path} holds its weights as {pickled[0]}, a pickle: loading one can run any code, so it is "
                "refused. Convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise InterchangeError(f"{self.path} has no weights: neither {WEIGHTS} nor {INDEX}")

    def _read_header(self, name: str) -> None:
        single = self._files == {"": WEIGHTS}
        try:
            with safe_open(self.path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(key)
                    if single or self._files.get(key) == name:
                        self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise InterchangeError(f"{self.path / name} is no readable safetensors file: {error}") from None
        if single:
            self._files = dict.fromkeys(self.shapes, name)
