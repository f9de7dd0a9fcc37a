"""Shared by all tests: one thread, no network, and a run small enough for a second."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from stackwise.storage import ops

# A busy machine is no failure: property tests have no deadline, neither for a case nor for drawing it.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Text for a terminal is the same in any: as wide, and without colours that somebody asked for.
os.environ["COLUMNS"] = "80"
for _name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)

# Who starts the tests in the background may have had these ignored, and a run leaves ignored signals ignored.
for _signum, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, _handler)

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 40


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws depends on its name, not on what ran before it; another STACKWISE_TEST_SEED draws anew."""
    import torch

    run = os.environ.get("STACKWISE_TEST_SEED", "0")
    torch.manual_seed(zlib.crc32(f"{run} {item.nodeid}".encode()))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tiny(tmp_path: Path, text_file: Path) -> Callable[..., Any]:
    """Make a config of a tiny append run; keyword arguments are dotted keys with `__` for the dots."""
    from stackwise.config.root import StackWiseConfig

    base: dict[str, Any] = {
        "model.d_model": 16,
        "model.n_heads": 2,
        "model.max_seq_len": 64,
        "model.architecture.n_stacks": 3,
        "model.architecture.blocks_per_stack": 1,
        "training.batch_size": 3,
        "training.seq_len": 16,
        "training.max_steps": 5,
        "training.run_id": "tiny",
        "training.dtype": "float32",
        "training.device": "cpu",
        "training.optimizer.lr": 3e-3,
        "data.source": "text",
        "data.path": str(text_file),
        "data.tokenizer": "char",
        "checkpoint.dir": str(tmp_path / "runs"),
        "checkpoint.save_interval": 3,
        "evaluation.batches": 1,
        "tracking.log_interval": 1,
        "tracking.report": False,
        "generation.max_new_tokens": 2,
    }

    def make(**changes: Any) -> StackWiseConfig:
        data: dict[str, Any] = {}
        for key, value in {**base, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
            *sections, name = key.split(".")
            level = data
            for section in sections:
                level = level.setdefault(section, {})
            level[name] = value
        return StackWiseConfig.from_dict(data)

    return make


def in_child(action: Callable[[], object], crash_at: str | None = None) -> int:
    """Run `action` in a forked process; its exit code, negative for a signal, 1 for an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: torch may have threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if crash_at is not None:
                os.environ[ops.CRASH_VARIABLE] = crash_at
            action()
            code = 0
        except BaseException:  # noqa: BLE001 nothing may unwind into the parent's pytest
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def child() -> Callable[..., int]:
    return in_child


@pytest.fixture
def killed() -> int:
    return -signal.SIGKILL
