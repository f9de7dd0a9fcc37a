"""Where a run ran: versions, processor, memory, source commit; and the memory this process holds.

No package beyond the standard library: versions come from the installed metadata, so torch is not imported,
and memory from ``/proc`` where there is one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["environment", "memory_bytes", "package_version", "peak_rss_bytes", "rss_bytes"]

_PACKAGES = (
    "stackwise",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "pydantic",
    "pyyaml",
    "rich",
    "matplotlib",
    "transformers",
    "datasets",
)


def environment() -> dict[str, Any]:
    """A JSON-able record of what the run ran on.

    Keys: ``python``, ``packages`` (installed versions), ``os``, ``machine``, ``cpu`` (model name), ``cpus`` (usable
    by this process), ``memory_bytes`` (of the machine, or the smaller limit of the container; null if unknown),
    ``threads`` (the variables that steer thread counts, as set), ``command``, and ``git`` ({commit, modified} when
    the package runs from a checkout of its source, else null).
    """
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name)) is not None},
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "threads": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
        },
        "command": shlex.join(sys.argv),
        "git": _git(),
    }


def rss_bytes() -> int | None:
    """Resident memory of this process now, in bytes.

    Linux: ``/proc/self/statm``. Elsewhere the standard library only knows the *peak* (``getrusage``), and that is
    what is returned; null where not even that exists (Windows).
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes; null on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def package_version(package: str) -> str | None:
    """The installed version; null where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of memory of the machine, or the smaller limit of the container; null if unknown."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # names that some systems do not know
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for cgroup in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(cgroup).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits, default=None)


def _git() -> dict[str, Any] | None:
    folder = Path(__file__).resolve().parent
    # An installed copy may lie inside somebody else's repository; only a tracked file makes the commit ours.
    if _git_output(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git_output(folder, "rev-parse", "HEAD")
    changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def _git_output(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
