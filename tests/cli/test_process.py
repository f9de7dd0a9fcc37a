"""The command line as a process of its own: imports, signals, pipes, completion."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stackwise.checkpoint.store import Store

COMMAND = [sys.executable, "-m", "stackwise"]


def start(*words: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_help_and_mistakes_import_no_heavy_package(folder):
    """What answers at once must not load torch; what prints no table needs no rich either."""
    code = f"""
import contextlib, io, sys
from stackwise.cli.main import main
def run(*words, imports=frozenset()):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(words)
    heavy = {{"torch", "numpy", "tokenizers", "matplotlib", "safetensors", "rich"}} - imports
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
for words in {[
        ["--help"], ["train", "--help"], ["demo", "--help"], ["generate", "--help"], ["trian"], ["train"],
        ["config", "show", "demo"], ["config", "validate", "demo"], ["config", "schema"],
        ["plan", "demo", "model.d_modl=3"], ["train", "nope.yaml"], ["train", "tiny.yaml", "--resume"],
        ["generate", "nope"], ["runs"],
    ]}:
    run(*words)
run("runs", "ls", ".", imports={{"rich"}})
"""  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_and_the_printed_command_continues(signum, folder, cli):
    words = ["train", "tiny.yaml", "training.max_steps=300", "training.progressive.joint_tuning=false"]
    process = start(*words)
    metrics = folder / "runs/tiny/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"event":"step"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else 143), err
    again = shlex.join(["stackwise", *words, "--resume"])
    assert err.startswith("stopped after step ")
    assert err.endswith(f"the state is saved. To continue:\n  {again}\n")
    assert "stopped  " in out

    store = Store(folder / "runs/tiny/store")
    commit = store.latest()
    assert commit is not None
    assert 0 < commit.step < 600
    store.verify(commit)

    resumed = cli(*shlex.split(again)[1:], "--quiet")
    assert resumed.code == 0, resumed.err
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 601))
    assert events[-1]["status"] == "done"


def test_a_signal_before_training_begins_leaves_nothing_half_done(folder):
    for turn in range(8):  # on a busy machine the work may be done before the process is stopped in it
        size = 400_000 * 2 ** min(turn, 3)
        (folder / "big.txt").write_text(f"all work and no play makes jack {turn} dull boys\n" * size)
        process = start("data", "prepare", "tiny.yaml", "data.path=big.txt")
        while process.poll() is None and not list(folder.glob("runs/.data/.*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        if process.poll() is None:
            os.waitpid(process.pid, os.WUNTRACED)
        # It moves no more: what is true now stays so until the signal is there.
        amid = list(folder.glob("runs/.data/.*"))
        process.terminate()
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=120)
        assert not list(folder.glob("runs/.data/.*"))
        if amid:
            break
    assert process.returncode == 143, err


def test_a_reader_that_leaves_is_no_error(folder):
    script = f"{shlex.join(COMMAND)} config schema | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("base: ")
    assert done.stderr == ""


def test_output_that_the_terminal_cannot_spell_ends_no_command(run_folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*COMMAND, "runs", "show", "tiny"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train de", {"demo"}),
        ("train ti", {"tiny.yaml"}),
        ("train tiny.yaml training.optimizer.l", {"training.optimizer.lr="}),
        ("runs show ti", {"tiny"}),
        ("config schema training.prog", {"training.progressive", "training.progressive.enabled"}),
    ],
)
def test_the_shell_completes(line, expected, run_folder):
    words = ["stackwise", *line.split()]
    environment = {
        **os.environ,
        "_STACKWISE_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment, check=False)
    assert expected <= set(done.stdout.split())


def test_the_module_and_the_installed_command_are_one():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert 'stackwise = "stackwise.cli.main:run"' in pyproject.read_text()
