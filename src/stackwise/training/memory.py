"""Memory that runs out: what to say, and what would need less."""

from __future__ import annotations

import torch

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.tracking.environment import peak_rss_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Of the processor or the device. torch raises a plain RuntimeError for the first."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def peak_bytes(device: torch.device) -> int | None:
    """The most that was held so far: by the device's allocator, or by the process; null where nobody knows."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def advice(config: StackWiseConfig, stage: Stage, index: int, saving: bool) -> str:
    """Settings that need less. A step in smaller pieces is the same step; see `smaller_batch`."""
    training = config.training
    ways = []
    rows = stage.batch_size or training.batch_size
    smaller = smaller_batch(rows, training.gradient_accumulation_steps)
    if smaller is not None and training.optimizer.memory != "fused":
        key = "training.batch_size" if stage.batch_size is None else f"training.stages.{index}.batch_size"
        keys = f"{key},training.gradient_accumulation_steps"
        ways.append(
            f"{key}={smaller[0]} training.gradient_accumulation_steps={smaller[1]} (the same step in smaller pieces; "
            f"to resume: --allow-change {keys})"
        )
    if saving and config.checkpoint.asynchronous is not False:
        ways.append("checkpoint.asynchronous=false (no copy of what is saved)")
    if not training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing=true")
    if training.residency == "resident":
        ways.append("training.residency=streamed")
    return " or ".join(ways) or "a smaller model, or shorter rows"


def smaller_batch(rows: int, accumulation: int) -> tuple[int, int] | None:
    """The next smaller rows per micro-batch with the same rows per step, and how many there are then."""
    total = rows * accumulation
    smaller = next((n for n in range(rows - 1, 0, -1) if total % n == 0), None)
    return None if smaller is None else (smaller, total // smaller)
