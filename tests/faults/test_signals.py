"""Real signals at random times: the run saves and stops with its code, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted
from stackwise.training.interrupt import InterruptGuard
from stackwise.training.loop import Engine
from stackwise.training.run import train

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SIGNALS = 20
PATIENCE = 120
"""Seconds until a child that does not end is killed, which is a failure."""


def outcome(run: Path) -> tuple[dict[str, str], list[tuple]]:
    commit = Store(run / "store").latest()
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = [(e["event"], e["step"], e["loss"]) for e in events if e["event"] in ("step", "eval")]
    return {name: part.sha256 for name, part in commit.parts.items()}, kept


def when_heard(mark: Path) -> None:
    """In a child: touch `mark` once the guard has a signal."""
    handle = InterruptGuard._handle

    def hears(self, signum, frame):
        handle(self, signum, frame)
        mark.touch()

    InterruptGuard._handle = hears


def train_and_wait(config, steps: int, there: Path, heard: Path) -> None:
    """In a child: train, and in the step of this number stay until a signal has come. `there`: touched in that step."""
    when_heard(heard)
    original, left = Engine._train_step, [steps]

    def waits(self, stage):
        original(self, stage)
        left[0] -= 1
        if left[0] == 0:
            there.touch()
            while not heard.exists():
                time.sleep(0.002)

    Engine._train_step = waits
    train(config, sinks=[])


def end_before(path: Path, pid: int) -> int | None:
    """Wait for a file that a child makes: null, or the child's exit code where it ends without."""
    while not path.exists():
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def test_random_signals_end_in_a_save_and_change_nothing(tiny, tmp_path):
    """Half of them come inside a step, the others at any time. A signal before or behind the loop itself ends the
    process as signals do; also then nothing is lost.
    """

    from reliability import children

    seed = random.randrange(2**31)
    rng, sent = random.Random(seed), 0
    log, there, heard = tmp_path / "log", tmp_path / "there", tmp_path / "heard"
    settings = {"model__dropout": 0.1, "training__max_steps": 12, "checkpoint__save_interval": 7}
    train(tiny(training__run_id="warm"), sinks=[])
    started = time.perf_counter()
    train(tiny(**settings, training__run_id="whole"), sinks=[])
    seconds = time.perf_counter() - started
    runs = Path(tiny().checkpoint.dir)
    children.prepare_to_fork()
    round_ = 0
    while sent < SIGNALS:
        round_ += 1
        config = tiny(**settings, training__run_id=f"parts-{round_}")
        history: list[tuple[str, int]] = []
        for _ in range(100):
            there.unlink(missing_ok=True)
            heard.unlink(missing_ok=True)
            signum, inside = rng.choice([*CODES]), rng.random() < 0.5
            steps = rng.randint(1, 12) if inside else -1
            pid = children.fork(lambda n=steps, config=config: train_and_wait(config, n, there, heard), log)
            if inside:
                ended = end_before(there, pid)
            else:
                time.sleep(rng.uniform(0, 0.6 * seconds))
                gone, status = os.waitpid(pid, os.WNOHANG)
                ended = os.waitstatus_to_exitcode(status) if gone else None
            if ended is not None:
                assert ended == 0, f"seed {seed}: {log.read_text()}"
                break
            os.kill(pid, signum)
            sent += 1
            code = children.end_of(pid, kill_after=PATIENCE)
            history.append((signum.name, code))
            if inside:
                assert code == CODES[signum], f"seed {seed}: exit {code}: {log.read_text()}"
            if code == 0:
                break
            assert code in (CODES[signum], -signum, 1), f"seed {seed}: exit {code}: {log.read_text()}"
            if code == 1:  # Ctrl-C before the loop listens
                assert signum == signal.SIGINT, f"seed {seed}: {log.read_text()}"
                assert "KeyboardInterrupt" in log.read_text(), f"seed {seed}: {log.read_text()}"
        assert outcome(runs / config.training.run_id) == outcome(runs / "whole"), (
            f"seed {seed}, run {round_}: {history}"
        )


@pytest.mark.parametrize("signum", [*CODES])
def test_the_second_signal_ends_at_once_with_the_last_commit_whole(tiny, tmp_path, signum):

    from reliability import children

    log, mark, heard = tmp_path / "log", tmp_path / "mark", tmp_path / "heard"

    def hangs() -> None:
        when_heard(heard)
        original = Engine._train_step

        def step(self, stage):
            original(self, stage)
            if self.progress.step == 8:
                mark.touch()
                while True:  # a step that takes for ever
                    time.sleep(0.01)

        Engine._train_step = step
        train(tiny(), sinks=[])

    pid = children.fork(hangs, log)
    assert end_before(mark, pid) is None, log.read_text()
    os.kill(pid, signum)
    assert end_before(heard, pid) is None, "the first one waits for the step"
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert children.end_of(pid, kill_after=PATIENCE) == 143
    run = Path(tiny().checkpoint.dir) / "tiny"
    assert Store(run / "store").latest().step in (5, 6)  # the save of step 6 may have been under way
    train(tiny(), sinks=[])
    train(tiny(training__run_id="whole"), sinks=[])
    assert outcome(run) == outcome(run.parent / "whole")


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tiny):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.signum is None
            signal.raise_signal(signal.SIGTERM)
            assert guard.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("grace", "warns"), [(1e-6, 1), (3600.0, 0), (None, 0)])
def test_a_save_that_takes_half_of_the_grace_is_warned_of_once(tiny, grace, warns):
    result = train(tiny(checkpoint__grace_seconds=grace), sinks=[])
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    notes = [e["message"] for e in map(json.loads, lines) if e["event"] == "note"]
    assert sum("checkpoint.grace_seconds" in note for note in notes) == warns


@pytest.mark.parametrize(("signum", "code"), CODES.items())
def test_each_signal_has_its_code(signum, code):
    assert Interrupted(signum, "").exit_code == code
