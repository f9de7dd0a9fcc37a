"""What a run reports: the kinds of event, their fields, and the Tracker that hands them to sinks.

An event is a flat JSON-able dict with ``event`` (its kind) and ``time`` (seconds since 1970). The kinds and
their fields are the table ``FIELDS``; this is also the format of ``metrics.jsonl``. Units: losses in nats per
token, sizes in bytes, ``seconds`` of training, ``stored`` the stored outputs of the frozen trunk (null: none were). ``tokens``, ``flops`` and ``seconds`` count the run so far, in
``stage_end`` the stage alone. ``seconds`` of a checkpoint are those from the copy to the durable commit, ``blocked_seconds`` how long
training stood still for it. ``step`` is global and 1-based, ``stage`` 0-based. In an ``eval`` around a growth,
``stage`` is the stage that begins. ``final_loss`` is the last validation loss, or the last training loss of a run
without evaluation. A note just before ``run_end`` says why a run failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from stackwise.config.errors import did_you_mean

__all__ = ["FIELDS", "EventError", "Sink", "Tracker", "check_event"]

# A trailing "?" allows null. "float" also takes an int, never a bool.
_STAGE: dict[str, str] = {
    "name": "str",
    "n_stacks": "int",
    "steps": "int",
    "params": "int",
    "trainable_params": "int",
    "trains": "list of str",
}
_BYTES: dict[str, str] = {
    "parameters": "int",
    "gradients": "int",
    "moments": "int",
    "activations": "int",
    "buffers": "int",
    "total": "int",
    "peak": "int",
    "host": "int",
    "allocated": "int?",
}
_STORED: dict[str, str] = {
    "entries": "int",
    "ram_bytes": "int",
    "disk_bytes": "int",
    "hits": "int",
    "evicted": "int",
}

FIELDS: dict[str, dict[str, str]] = {
    "run_start": {
        "run_id": "str",
        "stages": "list of stages",
        "total_steps": "int",
        "device": "str",
        "dtype": "str",
        "n_params": "int",
        "start_step": "int",
        "vocab_size": "int",
        "seq_len": "int",
        "batch_tokens": "int",
    },
    "stage_start": {
        "stage": "int",
        "name": "str",
        "n_stacks": "int",
        "steps": "int",
        "params": "int",
        "trainable_params": "int",
        "prefix_blocks": "int",
        "total_blocks": "int",
        "new_stack": "str?",
    },
    "step": {
        "step": "int",
        "stage": "int",
        "stage_step": "int",
        "loss": "float",
        "lr": "float",
        "grad_norm": "float",
        "tokens": "int",
        "flops": "float",
        "tokens_per_s": "float",
        "seconds": "float",
        "rss_bytes": "int?",
    },
    "experts": {
        "step": "int",
        "stage": "int",
        "max_load": "float",
        "min_load": "float",
        "loss": "float",
    },
    "eval": {
        "step": "int",
        "stage": "int",
        "when": "before_growth | after_growth | interval | stage_end | final",
        "loss": "float",
        "perplexity": "float",
        "bits_per_byte": "float?",
        "label": "exact | bound | part of a bound | pseudo",
        "tokens": "int",
        "flops": "float",
        "seconds": "float",
    },
    "sample": {"step": "int", "stage": "int", "prompt": "str", "text": "str"},
    "checkpoint": {
        "step": "int",
        "stage": "int",
        "commit": "str",
        "bytes_written": "int",
        "bytes_total": "int",
        "seconds": "float",
        "blocked_seconds": "float?",
    },
    "note": {"message": "str"},
    "stage_end": {
        "stage": "int",
        "name": "str",
        "n_stacks": "int",
        "step": "int",
        "loss_first": "float?",
        "loss_last": "float?",
        "eval_loss": "float?",
        "seconds": "float",
        "tokens": "int",
        "flops": "float",
        "trainable_params": "int",
        "bytes": "bytes by item",
        "stored": "stored outputs?",
    },
    "run_end": {
        "step": "int",
        "seconds": "float",
        "final_loss": "float?",
        "status": "done | stopped | failed",
        "tokens": "int",
        "flops": "float",
        "peak_rss_bytes": "int?",
    },
}


class EventError(ValueError):
    """An event lacks a field of its kind, has one too many, or holds a value of the wrong type."""


class Sink(Protocol):
    """Whatever takes events: the metrics file, the console, a list in a test."""

    def emit(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Checks each event, stamps its time and hands it to every sink in order.

    >>> with Tracker([MetricsFile(run), ConsoleProgress()]) as tracker:
    ...     tracker.emit({"event": "note", "message": "hello"})

    Put the metrics file first: what the console shows has then been recorded.
    """

    def __init__(self, sinks: Iterable[Sink], *, clock: Callable[[], float] = time.time) -> None:
        self.sinks = list(sinks)
        self._clock = clock

    def emit(self, event: Mapping[str, Any]) -> None:
        """Raise ``EventError`` for a malformed event, before any sink has seen it."""
        stamped = {"event": event.get("event"), "time": event.get("time", self._clock()), **event}
        check_event(stamped)
        for sink in self.sinks:
            sink.emit(stamped)

    def close(self) -> None:
        """Close every sink, also when one of them fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - the remaining sinks must be closed; raised below
                failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_event(event: Mapping[str, Any], *, stored: bool = False) -> None:
    """Raise ``EventError`` naming every problem of ``event`` (see ``FIELDS``).

    ``stored``: it was written by this or an earlier version, which may not have known a field that may be null.
    """
    kind = event.get("event")
    if not isinstance(kind, str) or kind not in FIELDS:
        hint = did_you_mean(str(kind), FIELDS)
        raise EventError(
            " ".join(filter(None, [f"unknown event {kind!r};", hint, f"allowed: {', '.join(FIELDS)}"]))
        )
    fields = FIELDS[kind]
    if stored:
        fields = {name: kind for name, kind in fields.items() if name in event or not kind.endswith("?")}
    problems = _mapping_problems("", event, {"event": "str", "time": "float", **fields})
    if problems:
        raise EventError(f"event {kind!r}: " + "; ".join(problems))


def _mapping_problems(prefix: str, values: Mapping[str, Any], fields: Mapping[str, str]) -> list[str]:
    problems = [f"{prefix}{name} is missing ({fields[name]})" for name in fields if name not in values]
    for name, value in values.items():
        if name not in fields:
            hint = did_you_mean(str(name), fields)
            problems.append(f"{prefix}{name} is not a field" + (f", {hint}" if hint else ""))
        else:
            problems += _value_problems(f"{prefix}{name}", value, fields[name])
    return problems


def _value_problems(name: str, value: Any, wanted: str) -> list[str]:
    if wanted.endswith("?"):
        if value is None:
            return []
        wanted = wanted[:-1]
    if wanted == "list of stages" and isinstance(value, list):
        return [
            problem
            for i, stage in enumerate(value)
            for problem in (
                _mapping_problems(f"{name}[{i}].", stage, _STAGE)
                if isinstance(stage, Mapping)
                else [f"{name}[{i}] is {_shown(stage)}, expected a map"]
            )
        ]
    if wanted == "bytes by item" and isinstance(value, Mapping):
        return _mapping_problems(f"{name}.", value, _BYTES)
    if wanted == "stored outputs" and isinstance(value, Mapping):
        return _mapping_problems(f"{name}.", value, _STORED)
    if wanted == "list of str":
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif wanted == "str":
        good = isinstance(value, str)
    elif wanted == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif wanted == "float":
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = isinstance(value, str) and value in wanted.split(" | ")
    return [] if good else [f"{name} is {_shown(value)}, expected {wanted}"]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
