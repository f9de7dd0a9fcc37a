"""What the page of ``stackwise watch`` shows: the report of a run and its figures of this moment, read and never written."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from stackwise.tracking import units
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.follow import Follower
from stackwise.tracking.history import RunHistory
from stackwise.tracking.page import ReportedRun, html_page, text
from stackwise.tracking.progress import Progress
from stackwise.tracking.report import render

__all__ = ["LiveRun"]

_SHARE = 0.1  # of one processor that drawing the page may take while a run writes all the time


class LiveRun:
    """One run folder, for any number of viewers at once. The run may not have begun, may be over, or be deleted."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = RunFolder(path)
        self._clock = clock
        self._follower = Follower(self.folder.metrics)
        self._history = RunHistory()
        self._at = 0.0  # what the clock of the progress says: the time of an event, or now
        self._progress = Progress(clock=lambda: self._at)
        self._lock = threading.Lock()
        self._seen = False
        self._drawn: tuple[str, str] = ("none", "")  # version, body
        self._rest_until = float("-inf")
        self._closed = False

    def state(self) -> dict[str, Any]:
        """Figures of this moment, JSON-able. ``status``: waiting, gone, or that of ``RunHistory``.

        ``version`` names what the page would show, ``quiet`` is the time since the last event in seconds, and
        ``seconds_left`` is null where nobody knows or nothing is left. ``figures``: the most telling ones in words.
        """
        with self._lock:
            self._read()
            history, events, progress = self._history, self._follower.log.events, self._progress
            self._at = now = self._clock()
            left = progress.seconds_left if self._going() and history.steps else None
            state = {
                "run": history.run_id or self.folder.path.name,
                "status": self._status(),
                "version": self._version(),
                "step": history.step,
                "total_steps": history.total_steps,
                "stage": progress.stage + 1 if progress.stages else None,
                "stages": len(progress.stages) or None,
                "loss": _finite(history.loss),
                "eval_loss": _finite(history.eval_loss),
                "tokens": history.latest("tokens"),
                "flops": history.latest("flops"),
                "seconds": history.latest("seconds"),
                "tokens_per_s": progress.tokens_per_s,
                "seconds_left": left,
                "quiet": max(0.0, now - events[-1]["time"]) if events else None,
            }
        return {**state, "figures": _words(state)}

    def page(self) -> tuple[str, str]:
        """(version, HTML of the report's body). While a run writes all the time it may lie a little behind."""
        with self._lock:
            self._read()
            version = self._version()
            due = version != self._drawn[0] and not self._closed
            if due and (self._clock() >= self._rest_until or not self._going()):
                began = time.perf_counter()
                self._drawn = (version, self._body())
                self._rest_until = self._clock() + (time.perf_counter() - began) / _SHARE
            return self._drawn

    def close(self) -> None:
        """Wait for a page that is being drawn, and draw none after it.

        Viewers are served by threads that may outlive the main one, and a thread inside a library's own code while
        Python shuts down aborts the process.
        """
        with self._lock:
            self._closed = True

    def whole_page(self, nonce: str) -> str:
        """The page that a browser loads first. Its script, which bears the nonce, keeps it up to date."""
        version, body = self.page()
        style, script = (_resource(name) for name in ("live.css", "live.js"))
        frame = (
            f"<style>{style}</style>\n"
            '<div id="live" role="status"><b></b><span></span></div>\n'
            f'<div id="report" data-version="{text(version)}">{body}</div>\n'
            f'<script nonce="{nonce}">\n{script}</script>'
        )
        return html_page(self.folder.path.name, frame)

    def _read(self) -> None:
        if self._follower.update():
            events = self._follower.log.events
            self._history, self._progress = RunHistory.from_events(events), Progress(clock=lambda: self._at)
            for event in events:
                self._at = event["time"]
                self._progress.update(event)
        self._seen = self._seen or bool(self._follower.version)

    def _going(self) -> bool:
        return bool(self._follower.version) and self._history.status == "unfinished"

    def _status(self) -> str:
        if not self._follower.version:
            return "gone" if self._seen else "waiting"
        return self._history.status

    def _version(self) -> str:
        return self._follower.version or self._status()

    def _body(self) -> str:
        status, path = self._status(), text(str(self.folder.path))
        if status == "waiting":
            return f'<p class="notice">There is no run in {path} yet. This page shows it as soon as it begins.</p>'
        if status == "gone":
            return f'<p class="notice">The run in {path} was deleted.</p>'
        page = render(ReportedRun(self.folder, self._follower.log, self._history))
        return page.partition("<main>")[2].rpartition("</main>")[0]


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _words(state: dict[str, Any]) -> list[str]:
    if not state["stages"]:
        return []
    total = f" of {units.steps(state['total_steps'])}" if state["total_steps"] else ""
    found = [f"step {units.steps(state['step'])}{total}", f"stage {state['stage']} of {state['stages']}"]
    for name, figure in (("loss", state["loss"]), ("validation", state["eval_loss"])):
        if figure is not None:
            found.append(f"{name} {units.loss(figure)}")
    if state["status"] == "unfinished":
        if state["tokens_per_s"] is not None:
            found.append(units.rate(state["tokens_per_s"]))
        if state["seconds_left"] is not None:
            found.append(f"{units.remaining(state['seconds_left'])} left")
    return found


def _resource(name: str) -> str:
    return resources.files("stackwise.tracking").joinpath(name).read_text("utf-8")
