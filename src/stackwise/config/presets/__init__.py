"""Named configurations: the commented YAML files in this folder."""

import os
from pathlib import Path

from stackwise.config.errors import did_you_mean

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """The names that stand for a shipped configuration."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_preset_name(text: str) -> bool:
    """Whether the text is meant as a preset's name rather than as a path."""
    return Path(text).suffix not in (".yaml", ".yml") and Path(text).name == text


def locate(name_or_path: str | os.PathLike[str], folder: Path = Path()) -> Path:
    """The file behind a preset's name or a path, which may be relative to `folder`.

    Raises FileNotFoundError, naming the presets where the text could be one.
    """
    text = os.fspath(name_or_path)
    if is_preset_name(text) and text in preset_names():
        return FOLDER / f"{text}.yaml"
    path = folder / Path(os.path.expanduser(text))
    if path.exists():
        return path
    if not is_preset_name(text):
        raise FileNotFoundError(f"no configuration file {str(path)!r}")
    names = preset_names()
    hint = did_you_mean(text, names) or f"the presets are {', '.join(names)}"
    raise FileNotFoundError(f"no preset and no configuration file {text!r}; {hint}")
