"""Settings of progress, samples and the report."""

from stackwise.config.base import Settings
from stackwise.config.types import Flag, PositiveInt


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
