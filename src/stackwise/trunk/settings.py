"""Settings of the room; they are part of `training.progressive`."""

from typing import Literal

from stackwise.config.base import Settings
from stackwise.config.types import Flag, NonNegativeInt, PathText, PositiveInt

StorageDtype = Literal["float32", "bfloat16", "fp8"]


class TrunkKeys(Settings):
    """Keys of `training.progressive` that this room reads."""

    trunk_residency: Literal["resident", "streamed", "mapped"] = "resident"
    """Where frozen stacks live. resident: on the device. streamed: in host memory, from where blocks are copied to the device ahead of their use. mapped: the same from files in `cache_dir`, which are mapped into memory and go with the process."""
    cache_activations: Literal["auto"] | Flag = "auto"
    """Keep the outputs of the frozen trunk instead of computing them again at every visit of a sample. auto: where it is allowed, pays and fits; true: wherever it is allowed."""
    cache_dir: PathText = "./cache"
    """Folder of the stored outputs, which `stackwise cache` lists, checks and clears, and of mapped weights."""
    cache_max_bytes: PositiveInt | None = None
    """Bytes that the stored outputs may take in `cache_dir`; the oldest make room, what finds none is computed again. null: 80 % of the free disk."""
    cache_ram_bytes: NonNegativeInt = 1_000_000_000
    """Bytes of memory that are filled before anything goes to disk."""
    cache_dtype: StorageDtype = "bfloat16"
    """Number format of the stored outputs. float32 changes no loss; bfloat16 takes half and fp8 (with a scale per token) a quarter of the space, and what goes on from the boundary is rounded to it."""
