"""What a tracker is, and the wrapper that keeps its failures from the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Guarded", "TrackerSink"]

Event = Mapping[str, Any]


class TrackerSink(Protocol):
    """Takes the events of a run, possibly from several processes, one after the other.

    `open`: `events` is all that metrics.jsonl holds by then, and `config` the resolved configuration without secrets.
    What an earlier process wrote of a later step is void or stays, but no step is there twice. `rewind`: the run went
    back to an earlier commit, and `events` is what is left of it.
    """

    name: str

    def open(self, events: Sequence[Event], config: Mapping[str, Any]) -> None: ...
    def emit(self, event: Event) -> None: ...
    def rewind(self, events: Sequence[Event]) -> None: ...
    def close(self) -> None: ...


class Guarded:
    """A sink around a tracker. The first failure is said once, then the tracker is left alone; the run goes on."""

    def __init__(self, tracker: TrackerSink, say: Callable[[str], None]) -> None:
        """`say` is told what went wrong, in a sentence."""
        self.tracker, self.say = tracker, say
        self.failure: str | None = None
        self._opened = False

    def open(self, events: Sequence[Event], config: Mapping[str, Any], *, must: bool) -> None:
        """`must`: a tracker that cannot be opened raises, for nothing has begun that it could lose."""
        self._opened = True
        if must:
            self.tracker.open(events, config)
        else:
            self._try(lambda: self.tracker.open(events, config), "could not be taken up again")

    def emit(self, event: Event) -> None:
        if self._opened:  # what came before is in metrics.jsonl, from which the tracker was opened
            self._try(lambda: self.tracker.emit(event), "failed")

    def rewind(self, events: Sequence[Event]) -> None:
        self._try(lambda: self.tracker.rewind(events), "failed")

    def close(self) -> None:
        if self._opened and self.failure is None:
            try:
                self.tracker.close()
            except Exception as error:  # noqa: BLE001 - whatever a library raises, the run is done and stored
                warnings.warn(
                    f"tracking.sinks: {self.tracker.name} failed at its end: {_said(error)}", stacklevel=2
                )

    def last_words(self) -> str | None:
        """What to say at the end of the run; null where all is well."""
        if self.failure is None:
            return None
        return f"tracking.sinks: {self.tracker.name} has not seen the whole run: {self.failure}. metrics.jsonl has it all"

    def _try(self, action: Callable[[], None], what: str) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a library raises, it must not end the run
            self.failure = f"it {what} ({_said(error)})"
            self.say(
                f"tracking.sinks: {self.tracker.name} {what} and is left out from here on: {_said(error)}"
            )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
