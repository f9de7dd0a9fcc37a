"""Settings of evaluation on the held-out split."""

from stackwise.config.base import Settings
from stackwise.config.types import PositiveInt


class EvaluationSettings(Settings):
    """When and on how much to evaluate."""

    interval: PositiveInt | None = None
    """Steps between evaluations. null: around each growth and at the end of each stage."""
    batches: PositiveInt | None = None
    """Batches per evaluation. null: the whole split."""
    passes: PositiveInt = 4
    """Passes over the split for objectives that hide tokens: other tokens are hidden in each."""
    batch_size: PositiveInt | None = None
    """Rows per batch; it changes speed and memory, not the result. null: `training.batch_size`."""
