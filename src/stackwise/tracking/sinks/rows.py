"""Events as rows of named figures on the axes steps, tokens and FLOP: what every tracker is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stackwise.tracking.units import printable

__all__ = ["Row", "Rows"]

_FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "step": ("train", ("loss", "lr", "grad_norm", "tokens_per_s", "seconds", "rss_bytes")),
    "experts": ("experts", ("max_load", "min_load", "loss")),
    "eval": ("validation", ("loss", "perplexity", "bits_per_byte")),
    "checkpoint": ("checkpoint", ("bytes_written", "bytes_total", "seconds", "blocked_seconds")),
    "stage_start": ("stage", ("n_stacks", "params", "trainable_params", "prefix_blocks", "total_blocks")),
    "stage_end": ("stage", ("seconds", "tokens", "flops", "loss_first", "loss_last", "eval_loss")),
}
"""Event -> the group its figures go to, and which of its fields are figures."""


@dataclass(frozen=True)
class Row:
    """Figures of one event. `step`, `tokens` and `flops` of the run so far; `time` in seconds since 1970."""

    step: int
    tokens: int
    flops: float
    time: float
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Rows:
    """Reads events in order and keeps what an event does not say itself: where the run stands."""

    def __init__(self) -> None:
        self._step, self._tokens, self._flops = 0, 0, 0.0
        self._before: Mapping[str, Any] | None = None  # the evaluation that a growth is measured against

    def of(self, event: Mapping[str, Any]) -> Row | None:
        """The row of an event; null where it has nothing to show."""
        kind = event["event"]
        if kind in ("step", "eval"):
            self._step, self._tokens, self._flops = event["step"], event["tokens"], event["flops"]
        scalars, texts = self._scalars(event), self._texts(event)
        if not scalars and not texts:
            return None
        return Row(self._step, self._tokens, self._flops, event["time"], scalars, texts)

    def _scalars(self, event: Mapping[str, Any]) -> dict[str, float]:
        kind = event["event"]
        if kind == "eval" and event["when"] in ("before_growth", "after_growth"):
            return self._growth(event)
        group, names = _FIGURES.get(kind, ("", ()))
        found = {f"{group}/{name}": event.get(name) for name in names}
        if kind == "stage_start":
            found["stage/index"] = event["stage"] + 1
        elif kind == "stage_end":
            found |= {f"bytes/{item}": event["bytes"][item] for item in sorted(event["bytes"])}
        elif kind == "eval":
            self._before = event
        return {name: float(value) for name, value in found.items() if value is not None}

    def _growth(self, event: Mapping[str, Any]) -> dict[str, float]:
        """Validation just before a growth and just after it, on the same text."""
        before, self._before = self._before, event
        if event["when"] == "before_growth":
            return {"growth/before": event["loss"]}
        found = {"growth/after": event["loss"]}
        if before is not None and before["step"] == event["step"]:
            found["growth/change"] = event["loss"] - before["loss"]
        return found

    def _texts(self, event: Mapping[str, Any]) -> dict[str, str]:
        kind = event["event"]
        if kind == "sample":
            return {"sample": printable(event["prompt"] + event["text"])}
        if kind == "stage_start":
            return {"stage": f"stage {event['stage'] + 1}: {printable(event['name'])}"}
        if kind == "run_end":
            return {"end": f"{event['status']} after step {event['step']}"}
        return {}
