"""Every wrong input ends with its promised exit code and a message that names the cause and the way out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from stackwise.checkpoint.lock import WriterLock
from stackwise.storage import ops


class Case(NamedTuple):
    """Words of a command line, its exit code, pieces of its message, and what has to be there first."""

    command: str
    code: int
    says: tuple[str, ...]
    make: Callable[[Path], object] = lambda folder: None


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def put_all(**contents: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / f"{name}.yaml").write_text(text) for name, text in contents.items()]


FOUR_MISTAKES = """\
model: {d_model: 30, n_heads: 4, n_kv_heads: 8, attention_preset: brt_style}
training: {progressive: {max_stacks: -1}}
"""
TWICE = "training:\n  progressive: {max_stacks: 3}\n  seed: 1\n  progressive: {max_stacks: 4}\n"

CONFIGURATION = {
    "a file that is not there": Case("config validate nope.yaml", 2, ("no configuration file 'nope.yaml'",)),
    "a file misspelt": Case(
        "plan sub/mine.yml",
        2,
        ("no configuration file 'sub/mine.yml'; did you mean 'my-mine.yaml'?",),
        lambda folder: [(folder / "sub").mkdir(), (folder / "sub/my-mine.yaml").touch()],
    ),
    "a file beside others": Case(
        "plan qqq.yaml",
        2,
        ("no configuration file 'qqq.yaml'; '.' holds first.yaml, third.yaml",),
        put_all(first="", third=""),
    ),
    "a word in place of a number": Case("watch demo --port abc", 2, ("'--port'", "integer", "got 'abc'")),
    "a number that is too large": Case("watch demo --port 70000", 2, ("'--port'", "65535", "got '70000'")),
    "no such choice": Case(
        "compare demo --match flop", 2, ("'--match': 'flop' is not one of 'flops', 'tokens'\n",)
    ),
    "no such command": Case("cache xyz", 2, ("No such command 'xyz'; there are ls, ",)),
    "a preset misspelt": Case("config show dmeo", 2, ("no preset", "did you mean 'demo'?")),
    "a folder": Case("train .", 2, ("CONFIG must be a YAML file or a preset", "is a folder")),
    "a run folder": Case(
        "train old",
        2,
        ("its configuration is old/config.yaml",),
        lambda folder: [(folder / "old").mkdir(), (folder / "old/config.yaml").touch()],
    ),
    "no configuration before the overrides": Case(
        "train training.max_steps=3",
        2,
        ("CONFIG is missing", "'training.max_steps=3' is an override", "demo"),
    ),
    "four mistakes at once": Case(
        "config validate bad.yaml",
        2,
        (
            "4 problems",
            "bad.yaml:1: model.n_heads",
            "model.n_kv_heads",
            "did you mean 'bert_style'?",
            "got -1",
        ),
        put("bad.yaml", FOUR_MISTAKES),
    ),
    "a key twice": Case(
        "train twice.yaml",
        2,
        ("training.progressive: written twice, in lines 2 and 4",),
        put("twice.yaml", TWICE),
    ),
    "not YAML": Case(
        "plan broken.yaml", 2, ("broken.yaml:1", "not YAML"), put("broken.yaml", "model: {d_model: 3")
    ),
    "not a map": Case("plan list.yaml", 2, ("must be a map of sections",), put("list.yaml", "- model\n")),
    "not text": Case(
        "plan raw.yaml", 2, ("raw.yaml", "not UTF-8 text at byte 0"), put("raw.yaml", b"\xff\xfe")
    ),
    "parents in a cycle": Case(
        "plan a.yaml",
        2,
        ("base", "form a cycle: a.yaml -> b.yaml -> a.yaml"),
        put_all(a="base: b.yaml\n", b="base: a.yaml\n"),
    ),
    "an unknown key": Case(
        "train tiny.yaml training.optimzer.lr=1e-3",
        2,
        ("command line: training.optimzer.lr: unknown key", "did you mean 'training.optimizer.lr'?"),
    ),
    "an unknown section": Case(
        "train tiny.yaml optimzer.lr=1e-3", 2, ("optimzer.lr: unknown key", "training.optimizer.lr")
    ),
    "text for a number": Case(
        "train tiny.yaml training.optimizer.lr=fast", 2, ("training.optimizer.lr", "got 'fast'", "number > 0")
    ),
    "an override without a value": Case(
        "train tiny.yaml training.max_steps", 2, ("training.max_steps: not an override", "section.key=value")
    ),
    "more stacks than allowed": Case(
        "plan tiny.yaml training.progressive.target_stacks=99", 2, ("target_stacks", "got 99", "12")
    ),
    "budgets for another number of stacks": Case(
        "train tiny.yaml training.progressive.stage_weights=[1]",
        2,
        ("stage_weights", "one number per stack, 2 in all", "got [1.0]"),
    ),
    "a device that is not here": Case(
        "train tiny.yaml training.device=cuda:99",
        2,
        ("training.device", "got 'cuda:99'", "allowed: auto, cpu"),
    ),
    "a format the processor lacks": Case(
        "train tiny.yaml training.dtype=float16 training.device=cpu",
        2,
        ("training.dtype", "cannot be used on a CPU", "bfloat16"),
    ),
    "a section that is not there": Case(
        "config schema training.optimzer",
        2,
        ("no key or section 'training.optimzer'", "'training.optimizer'"),
    ),
}

DATA = {
    "a text that is not there": Case(
        "train tiny.yaml data.path=txet.txt", 2, ("data.path: there is no file 'txet.txt'", "'text.txt'")
    ),
    "a folder for a text": Case(
        "data prepare tiny.yaml data.path=.", 2, ("data.path names the folder '.'", "*.txt")
    ),
    "no path": Case("data prepare tiny.yaml data.path=null", 2, ("data.path", "got null", "set data.path=")),
    "an empty text": Case(
        "train tiny.yaml data.path=empty.txt",
        2,
        ("empty.txt: the training text is empty",),
        put("empty.txt", ""),
    ),
    "a text shorter than a row": Case(
        "train tiny.yaml data.path=short.txt", 2, ("training.seq_len",), put("short.txt", "too short")
    ),
    "a text that is not UTF-8": Case(
        "train tiny.yaml data.path=latin.txt",
        3,
        ("latin.txt: byte 3", "0xe9 is not valid UTF-8", "iconv"),
        put("latin.txt", b"caf\xe9 au lait"),
    ),
    "a line that is not JSON": Case(
        "data prepare tiny.yaml data.source=jsonl data.path=rows.jsonl",
        3,
        ("rows.jsonl:2", "not JSON"),
        put("rows.jsonl", '{"text": "good"}\n{"text": \n'),
    ),
    "rows under another key": Case(
        "data prepare tiny.yaml data.source=jsonl data.path=rows.jsonl",
        2,
        ("there is no key 'text'", "did you mean 'texts'?", "data.text_key"),
        put("rows.jsonl", '{"texts": "good"}\n'),
    ),
    "a tokenizer file that is not there": Case(
        "train tiny.yaml data.tokenizer=./bpe.json",
        2,
        ("there is no file './bpe.json'", "stackwise tokenizer train"),
    ),
    "a tokenizer that is none": Case(
        "train tiny.yaml data.tokenizer=bpe.json", 3, ("bpe.json", "not a tokenizer"), put("bpe.json", "{}")
    ),
    "a tokenizer misspelt": Case(
        "train tiny.yaml data.tokenizer=bytes", 2, ("'bytes'", "did you mean 'byte'?")
    ),
    "a vocabulary too small for the tokenizer": Case(
        "train tiny.yaml data.tokenizer=byte model.vocab_size=100",
        2,
        ("model.vocab_size", "got 100", ">= 258"),
    ),
    "a tokenizer below its least size": Case(
        "tokenizer train tiny.yaml --vocab-size 100", 2, ("vocab_size is 100", "ask for 258 or more")
    ),
    "a tokenizer that would be overwritten": Case(
        "tokenizer train tiny.yaml --out text.txt", 2, ("text.txt exists already", "--force")
    ),
}

RUNS = {
    "a folder of runs that is not there": Case(
        "runs ls nowhere", 2, ("nowhere: No such file", "check the spelling")
    ),
    "a run misspelt": Case("runs show tinny", 2, ("there is no run 'tinny'", "did you mean 'tiny'?")),
    "a run without a name like it": Case("report xxxxxx", 2, ("there is no run 'xxxxxx'", "runs holds tiny")),
    "a path without a run": Case("eval runs/nope", 2, ("runs/nope is not a folder", "stackwise runs")),
    "a file for a run": Case("generate text.txt", 2, ("text.txt is not a folder",)),
    "a folder without a run": Case("report runs", 2, ("runs holds no run", "stackwise runs")),
    "a run without a save": Case(
        "generate fresh",
        2,
        ("fresh has no commit yet", "stackwise train"),
        lambda folder: [(folder / "fresh").mkdir(), (folder / "fresh/config.yaml").touch()],
    ),
    "metrics that are damaged": Case(
        "runs show tiny",
        3,
        ("metrics.jsonl line 1", "delete line 1"),
        lambda folder: (folder / "runs/tiny/metrics.jsonl").write_text('{"event": "nonsense"}\n{}\n'),
    ),
    "removal that nobody confirms": Case("runs rm tiny", 2, ("removing runs/tiny needs a yes", "--yes")),
    "nothing to resume": Case(
        "train tiny.yaml training.run_id=other --resume",
        2,
        ("--resume: runs/other holds no run", "training.run_id"),
    ),
    "a run to resume that was never saved": Case(
        "train tiny.yaml --resume",
        2,
        ("ended before its first save", "leave --resume out"),
        lambda folder: (folder / "runs/tiny/store").rename(folder / "gone"),
    ),
    "a path to resume that holds no run": Case(
        "train tiny.yaml checkpoint.resume=elsewhere", 2, ("elsewhere is not a folder",)
    ),
    "a run that is there and must not be resumed": Case(
        "train tiny.yaml checkpoint.resume=never", 2, ("already holds a run", "checkpoint.overwrite=true")
    ),
    "a run of other settings": Case(
        "train tiny.yaml training.seed=7",
        7,
        ("training.seed: 42 there, 7 here", "another training.run_id", "checkpoint.overwrite=true"),
    ),
    "a batch of no rows": Case(
        "eval tiny --batch-size 0", 2, ("'--batch-size'", "greater than or equal to 1")
    ),
    "a negative temperature": Case(
        "generate tiny --temperature -1", 2, ("--temperature: wrong value, got -1.0", "number >= 0")
    ),
    "a probability above one": Case(
        "generate tiny --top-p 2", 2, ("--top-p: wrong value, got 2.0", "number > 0 and <= 1")
    ),
    "no tokens to generate": Case(
        "generate tiny --max-new-tokens 0", 2, ("--max-new-tokens: wrong value, got 0", "whole number >= 1")
    ),
    "a prompt with a character the model has never seen": Case(
        "generate tiny --prompt Ω", 2, ("'Ω'", "U+03A9", "not among")
    ),
}

USAGE = {
    "no configuration": Case("train", 2, ("Missing argument 'CONFIG'", "stackwise train --help")),
    "an unknown verb": Case("trian", 2, ("No such command 'trian'", "'train'", "stackwise --help")),
    "an unknown option": Case("train tiny.yaml --resum", 2, ("No such option: --resum", "--resume")),
    "no threads": Case("train tiny.yaml --threads 0", 2, ("--threads", "stackwise train --help")),
    "an unknown command of a group": Case(
        "runs remove tiny", 2, ("No such command 'remove'", "stackwise runs --help")
    ),
}


def check(case: Case, cli, folder: Path) -> None:
    case.make(folder)
    result = cli(*case.command.split(), stdin="")
    assert result.code == case.code, result.err
    assert result.err.startswith("error: ")
    for piece in case.says:
        assert piece in result.err
    assert "Traceback" not in result.err
    assert "--debug" not in result.err


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in (CONFIGURATION | DATA | USAGE).items()]
)
def test_a_mistake_is_explained(case, cli, folder):
    check(case, cli, folder)
    assert not (folder / "runs/tiny/store/commits").exists(), "nothing was trained"


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in RUNS.items()])
def test_a_mistake_about_a_run_is_explained(case, cli, run_folder):
    check(case, cli, run_folder)


@pytest.mark.parametrize("verb", ["generate", "eval", "train"])
def test_a_damaged_checkpoint_names_the_part_and_hands_out_nothing(verb, cli, damaged):
    damaged.object()
    result = cli(verb, "tiny.yaml" if verb == "train" else "tiny")
    assert result.code == 3
    assert "/weights' of commit" in result.err
    assert "is damaged" in result.err


@pytest.mark.parametrize(
    "words", [("train", "tiny.yaml"), ("runs", "rm", "tiny", "--yes")], ids=["train", "rm"]
)
def test_a_run_in_use_is_left_alone(words, cli, run_folder):
    with WriterLock(run_folder / "runs/tiny/store/LOCK") as lock:
        lock.acquire()
        result = cli(*words)
    assert result.code == 4
    assert "another process is writing to runs/tiny/store" in result.err
    assert "pid" in result.err
    assert (run_folder / "runs/tiny/config.yaml").exists()


def test_a_loss_that_is_not_finite_names_step_stage_and_rate(cli, folder):
    result = cli(
        "train", "tiny.yaml", "training.optimizer.optimizer_type=SGD", "training.optimizer.lr=1e30", "-q",
        "training.max_grad_norm=0",
    )  # fmt: skip
    assert result.code == 5
    assert "stopped at step 2, stage 1 (stack 1), learning rate" in result.err
    assert "lower training.optimizer.lr" in result.err


@pytest.mark.parametrize("where", ["", "/second/store/"], ids=["everywhere", "in the store"])
def test_a_full_disk_keeps_what_is_stored(cli, run_folder, monkeypatch, where):
    original = ops.write

    def full(fd, data):
        if not where or where in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, data)

    if where and not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(ops, "write", full)
    result = cli("train", "tiny.yaml", "training.run_id=second", "-q")
    assert result.code == 6
    assert "space" in result.err
    assert cli("eval", "tiny").code == 0


def test_a_full_disk_outside_of_the_store_is_told_too(cli, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/.data")

    monkeypatch.setattr("stackwise.data.prepare.prepare", full)
    result = cli("data", "prepare", "tiny.yaml")
    assert result.code == 6
    assert result.err == (
        "error: runs/.data: No space left on device; free some space, or set checkpoint.dir to a folder on another "
        "disk\n"
    )


def test_memory_that_runs_out_says_what_to_lower(cli, folder, monkeypatch):
    def greedy(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes.\nat 0x1"
        )

    monkeypatch.setattr("stackwise.data.prepare.prepare", greedy)
    result = cli("data", "prepare", "tiny.yaml")
    assert result.code == 1
    assert (
        "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000"
        in result.err
    )
    assert "training.batch_size" in result.err
    assert "\nat 0x1" not in result.err


def test_an_unforeseen_error_is_short_and_its_traceback_is_a_flag_away(cli, folder, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("stackwise.data.prepare.prepare", broken)
    result = cli("data", "prepare", "tiny.yaml")
    assert result.code == 1
    assert result.err.splitlines() == [
        "error: ZeroDivisionError: division by zero",
        "This was not foreseen. For the traceback: stackwise --debug data prepare tiny.yaml",
    ]
    assert "Traceback (most recent call last)" in cli("--debug", "data", "prepare", "tiny.yaml").err
    monkeypatch.setenv("STACKWISE_DEBUG", "1")
    assert "in broken" in cli("data", "prepare", "tiny.yaml").err


def test_a_prompt_that_is_not_text_is_refused(cli, run_folder):
    result = cli("generate", "tiny", "--prompt", "-", stdin=b"caf\xe9")
    assert result.code == 2
    assert "standard input" in result.err
    assert "byte 3" in result.err


def test_a_run_of_a_newer_format_says_so(cli, run_folder):
    """The newest commit is rewritten under the name its new content demands."""
    import hashlib

    commits = run_folder / "runs/tiny/store/commits"
    newest = sorted(commits.iterdir())[-1]
    record = json.loads(newest.read_text())
    record["meta"]["format"] = 99
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    newest.unlink()
    identity = f"{newest.name[:9]}-{hashlib.sha256(text).hexdigest()[:16]}"
    (commits / f"{identity}.json").write_bytes(text)
    latest = commits.parent / "refs" / "latest"
    latest.unlink()
    latest.write_text(f"{identity}\n")
    result = cli("generate", "tiny")
    assert result.code == 3
    assert "format 99" in result.err
