"""What the loop reports: the fields of each event, taken from where the run stands."""

from __future__ import annotations

import math
from typing import Any

from stackwise.curriculum.split import Split
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.tracking.environment import rss_bytes
from stackwise.training.progress import Progress


def stage_start(
    rack: Rack, split: Split | None, p: Progress, stage: Stage, grown: list[str]
) -> dict[str, Any]:
    """A stage begins or is taken up; `grown` are the stacks that were added for it."""
    assert split is not None
    return {
        "event": "stage_start",
        "stage": p.stage,
        "name": stage.name,
        "n_stacks": stage.n_stacks,
        "steps": stage.steps,
        "params": rack.get_parameter_count(),
        "trainable_params": rack.get_trainable_parameter_count(),
        "prefix_blocks": split.prefix_blocks,
        "total_blocks": split.n_blocks,
        "new_stack": ", ".join(grown) or None,
    }


def step(p: Progress, lr: float, grad_norm: float, tokens_per_s: float) -> dict[str, Any]:
    """The mean loss since the last such line, and what it took to get here."""
    return {
        "event": "step",
        "step": p.step,
        "stage": p.stage,
        "stage_step": p.stage_step,
        "loss": p.loss_sum / p.loss_count if p.loss_count else math.nan,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": p.tokens,
        "flops": p.flops,
        "tokens_per_s": tokens_per_s,
        "seconds": p.seconds,
        "rss_bytes": rss_bytes(),
    }


def evaluation(p: Progress, when: str, result: dict[str, Any]) -> dict[str, Any]:
    """A held-out loss; `result` holds "loss" in nats per token and may hold "bits_per_byte"."""
    loss = result["loss"]
    return {
        "event": "eval",
        "step": p.step,
        "stage": p.stage,
        "when": when,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": result.get("bits_per_byte"),
        "label": result.get("label", "exact"),
        "tokens": p.tokens,
        "flops": p.flops,
        "seconds": p.seconds,
    }


def stored(report: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    """What the open stores hold, and what happened since `before`; both reports of `MemoryManager`."""
    stores = report["stores"].values()
    return {
        **{name: sum(store[name] for store in stores) for name in ("entries", "ram_bytes", "disk_bytes")},
        **{name: report[name] - before[name] for name in ("hits", "evicted")},
    }


def stage_end(rack: Rack, p: Progress, stage: Stage, eval_loss: float | None) -> dict[str, Any]:
    """A finished stage: its own losses, costs and counted bytes, and what it kept of its frozen trunk."""
    return {
        "stage": p.stage,
        "name": stage.name,
        "n_stacks": stage.n_stacks,
        "step": p.step,
        "loss_first": p.loss_first,
        "loss_last": p.loss_last,
        "eval_loss": eval_loss,
        "seconds": p.stage_seconds,
        "tokens": p.stage_tokens,
        "flops": p.stage_flops,
        "trainable_params": rack.get_trainable_parameter_count(),
        "bytes": {**p.bytes, "host": sum(p.bytes["host"].values())},
        "stored": p.stored or None,
    }
