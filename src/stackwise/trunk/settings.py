"""Settings of the room; they are part of `training.progressive`."""

from stackwise.config.base import Settings


class TrunkKeys(Settings):
    """Keys of `training.progressive` that this room reads."""
