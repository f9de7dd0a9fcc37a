"""`StackWiseConfig`: the settings of every room in one tree, read from YAML and written back."""

import os
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path as FilePath
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from stackwise.checkpoint.settings import CheckpointSettings
from stackwise.config import (  # they add their rules
    adapter_rules,  # noqa: F401
    attention_rules,  # noqa: F401
    embedding_rules,  # noqa: F401
    generation_rules,  # noqa: F401
    growth_rules,  # noqa: F401
    guard_rules,  # noqa: F401
    model_rules,  # noqa: F401
    moe_rules,  # noqa: F401
    objective_rules,  # noqa: F401
    optimizer_rules,  # noqa: F401
    precision_rules,  # noqa: F401
    residency_rules,  # noqa: F401
    time_rules,  # noqa: F401
)
from stackwise.config.base import Settings
from stackwise.config.deprecated import translate_deprecated
from stackwise.config.document import Document, dump, is_text
from stackwise.config.errors import ConfigError, Problem
from stackwise.config.load import apply_overrides, load_file, with_bases
from stackwise.config.notes import notes_of
from stackwise.config.presets import locate
from stackwise.config.rules import broken_rules
from stackwise.config.shape import Path, problems_of, section_of, value_at
from stackwise.data.settings import DataSettings
from stackwise.evaluation.settings import EvaluationSettings
from stackwise.inference.settings import GenerationSettings
from stackwise.model.settings import ModelSettings
from stackwise.objectives.settings import ObjectiveSettings
from stackwise.storage.ops import replace_text
from stackwise.tracking.settings import TrackingSettings
from stackwise.training.settings import TrainingSettings


class StackWiseConfig(Settings):
    """Everything a run needs to know.

    Built from keywords, only the shape is checked; `from_yaml`, `from_dict` and `validate` also check
    the rules that join keys. All of them raise one ConfigError that lists every problem.
    """

    model: ModelSettings = Field(default_factory=ModelSettings)
    """The finished model."""
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    """What is corrupted and how the loss is weighted."""
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    """The training loop, its optimizer and the growth of the model."""
    data: DataSettings = Field(default_factory=DataSettings)
    """Where text comes from and how it becomes rows of tokens."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Run folders and resume points."""
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    """When and on how much to evaluate."""
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    """How text is sampled."""
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    """What a run shows and writes about itself."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, or a preset by its name, with `section.key=value` overrides on top.

        An empty file gives the defaults. Raises FileNotFoundError, or ConfigError with every problem.
        """
        document = load_file(locate(path))
        apply_overrides(document, overrides, cls)
        return cls._from_document(document)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from nested maps with the keys of the YAML file. Raises ConfigError with every problem."""
        if not isinstance(data, Mapping):
            raise TypeError(f"from_dict takes a mapping of sections, not {type(data).__name__}")
        return cls._from_document(with_bases(Document(_plain(data)), FilePath()))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, ready for JSON; `from_dict` gives back an equal configuration."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write every key; `from_yaml` gives back an equal configuration."""
        replace_text(FilePath(path), dump(self.to_dict()))

    def validate(self) -> None:  # type: ignore[override]
        """Check shape and rules. Raises ConfigError with every problem.

        Assignments are checked one by one; this also finds what only several of them break, and what
        was changed inside a list or a map.
        """
        data = self.model_dump(warnings=False)
        problems, wrong = _shape_problems(type(self), Document(data))
        if problems := problems + broken_rules(self, {}, wrong):
            raise ConfigError(problems)

    def notes(self) -> list[str]:
        """Keys that are set but without effect in the chosen mode, and choices worth a word."""
        return notes_of(self)

    @classmethod
    def _from_document(cls, document: Document) -> Self:
        _drop_empty_sections(document.data, cls)
        translate_deprecated(document, cls)
        problems, wrong = _shape_problems(cls, document)
        # The rules run on what has the right shape, so that one report holds everything.
        for path in wrong:
            _drop(document.data, path)
        while incomplete := _shape_problems(cls, document)[
            1
        ]:  # sections that lack a key they cannot be without
            for path in incomplete:
                _drop(document.data, path[:-1])
        config = cls.model_validate(document.data)
        problems = document.problems + problems + broken_rules(config, document.sources, wrong)
        if problems:
            raise ConfigError(problems)
        return config


def _drop(data: dict[str, Any], path: Path) -> None:
    section = value_at(data, path[:-1])
    if isinstance(section, dict):
        section.pop(path[-1], None)


def _shape_problems(cls: type[Settings], document: Document) -> tuple[list[Problem], set[Path]]:
    """What pydantic finds, and the keys it finds wrong (for an item of a list, the list)."""
    try:
        cls.model_validate(document.data)
    except ValidationError as error:
        problems = problems_of(error, cls, document.data, document.sources)
    else:
        return [], set()
    return list(problems.values()), {tuple(takewhile(_is_name, path)) or path for path in problems}


def _is_name(part: str | int) -> bool:
    return isinstance(part, str)


def _plain(data: Any) -> Any:
    """A copy in which every map is a dict with text as keys, as YAML would give it."""
    if isinstance(data, Mapping):
        if wrong := [str(key) for key in data if not is_text(str(key))]:
            raise ConfigError(Problem(ascii(wrong[0]), "holds half of a character, so it is no key"))
        return {str(key): _plain(value) for key, value in data.items()}
    return [_plain(item) for item in data] if isinstance(data, list | tuple) else data


def _drop_empty_sections(data: Any, cls: type[BaseModel]) -> None:
    """Take `training:` with nothing under it, which YAML reads as null, for a section left out."""
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        if not isinstance(data, dict) or section is None or name not in data:
            continue
        if data[name] is None and field.annotation is section:
            del data[name]
        else:
            _drop_empty_sections(data[name], section)
