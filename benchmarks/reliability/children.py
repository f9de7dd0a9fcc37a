"""Processes that are made to die: forked from one that has imported torch, warm and in milliseconds."""

from __future__ import annotations

import functools
import gc
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from stackwise.tracking import environment, folder

RAM_DISK = Path("/dev/shm")


class Spent:
    """Time since it was made: on the wall, and of processors by this process and the children that have ended."""

    def __init__(self) -> None:
        self._begin = self._now()

    def since(self) -> dict[str, float]:
        seconds, cpu = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}

    @staticmethod
    def _now() -> tuple[float, float]:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def prepare_to_fork() -> None:
    """What every child would otherwise do again: one thread, and the versions looked up once."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in the child would write to, and so copy, every page of the parent
    # Looking up eleven packages and the source commit takes longer than a training step here.
    folder.environment = functools.cache(environment.environment)  # type: ignore[attr-defined]


def fork(action: Callable[[], object], log: Path) -> int:
    """Start `action` in a child of its own; it exits with 0, or with 1 after writing its traceback to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: torch may have threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:  # noqa: BLE001 nothing may unwind into the parent
            code = getattr(error, "exit_code", 1)
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return pid


def end_of(pid: int, kill_after: float | None = None) -> int:
    """The exit code of a child, negative for a signal. `kill_after`: seconds until it is killed by SIGKILL."""
    if kill_after is not None and not _ends_within(pid, kill_after):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _ends_within(pid: int, seconds: float) -> bool:
    if hasattr(os, "pidfd_open"):
        fd = os.pidfd_open(pid)
        try:
            return bool(select.select([fd], [], [], seconds)[0])
        finally:
            os.close(fd)
    # No way to wait for a process and a time at once: a child that has ended is then killed as a zombie, to no effect.
    time.sleep(seconds)
    return False


def in_child(action: Callable[[], object], log: Path, environment: dict[str, str] | None = None) -> int:
    """Run `action` in a child with more environment variables; its exit code, negative for a signal."""

    def with_variables() -> None:
        os.environ.update(environment or {})
        action()

    return end_of(fork(with_variables, log))
