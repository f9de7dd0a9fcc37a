"""Settings of progress, samples, the report and trackers."""

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from stackwise.config.base import Settings
from stackwise.config.types import Flag, PositiveInt, Text


class TrackingSettings(Settings):
    """What a run shows and writes about itself."""

    log_interval: PositiveInt = 10
    """Steps between lines of metrics."""
    report: Flag = True
    """Write plots and one self-contained report.html at the end."""
    sample_interval: PositiveInt | None = None
    """Steps between text samples. null: at the end of each stage. Where stacks own intervals of noise, the last stage alone writes any."""
    sample_prompt: str = ""
    """Text that the samples continue."""
    sinks: list[Literal["csv", "tensorboard", "trackio", "wandb"]] = []
    """Trackers that are given the figures too, each at most once; see docs/tracking.md."""
    project: Text = "stackwise"
    """Project that the run belongs to in trackio and wandb."""

    @field_validator("sinks")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise PydanticCustomError("unknown_name", "names a tracker twice")
        return names
