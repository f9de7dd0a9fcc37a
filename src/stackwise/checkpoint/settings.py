"""Settings of checkpoints: where, how often, how many, and what to do with a run that exists."""

from typing import Literal

from stackwise.config.base import Settings
from stackwise.config.types import Flag, NonNegativeInt, PathText, PositiveFloat, PositiveInt


class CheckpointSettings(Settings):
    """Run folders and resume points."""

    dir: PathText = "./runs"
    """Folder of the run folders; a run's own is `dir/run_id`."""
    save_interval: PositiveInt = 100
    """Steps between resume points. The end of a stage is always saved."""
    asynchronous: Literal["auto"] | Flag = "auto"
    """Hash and write beside the training, from a copy of what trains (weights and moments, in main memory). auto: except where the device is the processor itself and the copy would exceed 256 MB."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """When a resume point cannot be written (a full disk, say): stop the run, or note it, train on and try again at the next one. What is saved already stays intact either way."""
    grace_seconds: PositiveFloat | None = 30.0
    """Seconds between a request to stop (SIGTERM) and the end by force, as schedulers have it. A save that takes more than half of them is warned of once. null: no warning."""
    keep_last: PositiveInt = 5
    """Resume points to keep, besides the stage ends. `training.spike_policy: rollback` keeps as many more as it needs."""
    keep_best: NonNegativeInt = 0
    """Resume points with the lowest validation losses to keep besides; only those count that were evaluated at the step of their save."""
    keep_every: PositiveInt | None = None
    """Keep resume points whose step is a multiple of this besides, a multiple of save_interval. null: none."""
    resume: PathText = "auto"
    """auto goes on with the run of this `run_id` where its stored configuration agrees; never starts only in an empty folder; a path resumes that run folder."""
    init_from: PathText | None = None
    """Run folder whose newest weights the new run starts from: every tensor of the first stage's rack that the run holds by name. null: random."""
    full_precision_backup: Flag = True
    """Keep the fp32 weights of a stack in the checkpoint when it is stored in another format."""
    overwrite: Flag = False
    """Start afresh in a run folder that is not empty, deleting what it holds."""
