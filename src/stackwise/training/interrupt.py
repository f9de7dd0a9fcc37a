"""Ctrl-C, SIGTERM and SIGHUP: finish the step, save, then stop. A second signal stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from stackwise.data.loader import STOP_SIGNALS


class InterruptGuard:
    """While active, the first signal only sets `signum`; the handlers before it come back at the end.

    A signal that the process was started to ignore stays ignored (`nohup`). Handlers can be set in the main thread only;
    elsewhere the guard watches nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)  # the second one: the last commit is whole, nothing needs tidying
        self.signum = signum

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            heard = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
