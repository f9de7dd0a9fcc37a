"""The command line in a folder of its own: `cli("train", "tiny.yaml")` gives exit code, output and errors."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from stackwise.cli.main import main

TINY = """\
model:
  d_model: 16
  n_heads: 2
  max_seq_len: 32
  architecture: {n_stacks: 2, blocks_per_stack: 1}
training:
  run_id: tiny
  batch_size: 2
  seq_len: 16
  max_steps: 3
  dtype: float32
data:
  source: text
  path: text.txt
  tokenizer: char
evaluation:
  batches: 1
tracking:
  log_interval: 1
  report: false
generation:
  max_new_tokens: 4
"""
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


class Result(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def make_folder(folder: Path) -> Path:
    """A folder with a text and a configuration that trains in a moment."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing files to disk is tested in tests/checkpoint."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with tiny.yaml and text.txt."""
    monkeypatch.chdir(make_folder(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder after `stackwise train tiny.yaml`; not to be changed."""
    folder = make_folder(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        assert main(["train", "tiny.yaml", "--quiet"]) == 0
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of one's own with the finished run runs/tiny."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process; `stdin` is what it reads from a pipe."""

    def call(*words: str | Path, stdin: str | bytes | None = None) -> Result:
        if stdin is not None:
            data = stdin.encode() if isinstance(stdin, str) else stdin
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def damaged(run_folder: Path) -> SimpleNamespace:
    """A finished run that can be hurt: `damaged.object()` flips a byte in each stored object."""

    def flip() -> None:
        for path in (run_folder / "runs/tiny/store/objects").rglob("*"):
            if path.is_file():
                path.chmod(0o600)
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(bytes(data))

    return SimpleNamespace(folder=run_folder, object=flip)
