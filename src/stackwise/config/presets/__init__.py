"""Named configurations: the commented YAML files in this folder."""

import os
from pathlib import Path

from stackwise.config.errors import did_you_mean

FOLDER = Path(__file__).parent
_LISTED = 8  # files named where none is spelt nearly so


def preset_names() -> list[str]:
    """The names that stand for a shipped configuration."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_preset_name(text: str) -> bool:
    """Whether the text is meant as a preset's name rather than as a path."""
    return Path(text).suffix not in (".yaml", ".yml") and Path(text).name == text


def locate(name_or_path: str | os.PathLike[str], folder: Path = Path()) -> Path:
    """The file behind a preset's name or a path, which may be relative to `folder`.

    Raises FileNotFoundError, naming what is spelt nearly so, or what there is.
    """
    text = os.fspath(name_or_path)
    if is_preset_name(text) and text in preset_names():
        return FOLDER / f"{text}.yaml"
    path = folder / Path(os.path.expanduser(text))
    if path.exists():
        return path
    names = preset_names()
    presets = f"the presets are {', '.join(names)}"
    if is_preset_name(text):
        hint = did_you_mean(text, names) or presets
        raise FileNotFoundError(f"no preset and no configuration file {text!r}; {hint}")
    beside = _configurations(path.parent)
    hint = did_you_mean(path.name, beside) or (
        f"{str(path.parent)!r} holds {', '.join(beside[:_LISTED])}" if beside else presets
    )
    raise FileNotFoundError(f"no configuration file {str(path)!r}; {hint}")


def _configurations(folder: Path) -> list[str]:
    """The names of the YAML files in a folder; none where it is missing or closed to us."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except OSError:
        return []
