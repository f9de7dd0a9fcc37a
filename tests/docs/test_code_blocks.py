"""Commands, programs and configurations on the pages are executed, in the order in which a reader would.

Each page has a folder of its own that looks like a clone of the project with a few texts in it. Python runs as it
stands. So do `stackwise` commands, except that `train`, `demo` and `compare` get the overrides of SMALL at their end: a smaller
model, data and budget. `make`, `pip` and the like are not run here; that they are what the Makefile says is checked.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stackwise import StackWiseConfig
from stackwise.cli.main import main
from stackwise.data.tokenizers import open_tokenizer
from stackwise.interop.hf_export import write_model
from stackwise.model.factory import create_simple_rack
from stackwise.model.registry import FEED_FORWARDS
from stackwise.model.settings import FFN_TYPES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
TEXT = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(99, 0, -1))

SMALL = [
    "model.d_model=16",
    "model.n_heads=2",
    "training.batch_size=2",
    "training.seq_len=16",
    "training.max_steps=2",
    "training.warmup_steps=0",
    "training.dtype=float32",
    "data.max_bytes=20000",
    "evaluation.batches=1",
    "generation.max_new_tokens=4",
    "tracking.report=false",
]


# Folders of the Hugging Face format that pages read, in the shape that SMALL asks for.
LLAMA = {"rope": True, "norm": "rmsnorm", "ffn_type": "swiglu", "bias": False}
GPT2 = {"rope": False, "norm": "layernorm", "ffn_type": "gelu_tanh", "bias": True}
MODEL_FOLDERS = {"openai-community/gpt2": GPT2, "gpt2-folder": GPT2, "Llama-3.2-1B": LLAMA}


def write_model_folder(folder: Path, rope: bool, **block: Any) -> None:
    """A random model of four blocks with a tokenizer of bytes."""
    tokenizer = open_tokenizer("byte")
    rack = create_simple_rack(
        1,
        4,
        16,
        64,
        2,
        tokenizer.vocab_size,
        attention_preset="gpt_style",
        use_rope=rope,
        max_seq_len=64,
        **block,
    )
    write_model(rack, tokenizer, folder)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(m[2], m[3], page.read_text("utf-8")[: m.start()].count("\n") + 1) for m in found]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes and with texts to train on; the current one during the test."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "notes").mkdir()
    for name in ("my.txt", "notes/a.txt", "notes/b.txt"):
        (tmp_path / name).write_text(TEXT)
    for name, shape in MODEL_FOLDERS.items():
        write_model_folder(tmp_path / name, **shape)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda fd: None)  # that files reach the disk is tested elsewhere
    return tmp_path


@pytest.fixture
def _registry_as_it_was() -> Iterator[None]:
    """A page may register a part of its own; later tests shall not see it."""
    before = set(FFN_TYPES)
    yield
    for name in set(FFN_TYPES) - before:
        del FFN_TYPES[name], FEED_FORWARDS._entries[name]


@pytest.mark.usefixtures("_registry_as_it_was")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "yaml":
            accept(block, clone, where)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    monkeypatch.setattr("sys.stdin", io.StringIO("to be\n"))
                    run(words, where)
        else:
            assert block.language == "text", f"{where}: say what the block is; text is not run"


def accept(block: Block, folder: Path, where: str) -> None:
    """A configuration is valid; one that begins with its name in a comment is there for what follows."""
    name = re.match(r"# ([\w.-]+\.yaml)\n", block.text)
    path = folder / (name[1] if name else "block.yaml")
    path.write_text(block.text)
    try:
        StackWiseConfig.from_yaml(path)
    except ValueError as error:
        pytest.fail(f"{where}: {error}")


def run(words: list[str], where: str) -> None:
    """Run a `stackwise` command in this process; check any other against the files of the project."""
    if words[0] != "stackwise":
        check(words, where)
        return
    target = None
    if ">" in words:
        words, target = words[: words.index(">")], words[words.index(">") + 1]
    if words[1] in ("train", "demo", "compare"):
        words = [*words, *SMALL]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(words[1:])
    assert code == 0, (
        f"{where}: {shlex.join(words)} exits with {code}:\n{errors.getvalue()}{output.getvalue()}"
    )
    if target:
        Path(target).write_text(output.getvalue())


def check(words: list[str], where: str) -> None:
    """A command that is not run here is one that the project's own files stand behind."""
    command = Path(words[0]).name
    if command == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{t}:", MAKEFILE, re.MULTILINE) for t in targets), (
            f"{where}: no such target: {targets}"
        )
    elif words == ["source", ".venv/bin/activate"]:
        assert "VENV := .venv\n" in MAKEFILE
    elif "pip" in words or command == "uv":
        check_install(words, where)
    elif command == "python" and (words[1:3] == ["-m", "pytest"] or words[1].endswith(".py")):
        assert all((ROOT / word).exists() for word in words if "/" in word and word != words[0]), where
    else:
        assert command in ("pre-commit", "stackwise"), f"{where}: {words} is not checked; teach this test to"


def check_install(words: list[str], where: str) -> None:
    """The package is installed from this folder with extras that exist, torch at the version that is tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text().split()
    what = [
        w for w in words[words.index("install") + 1 :] if not w.startswith("-") and w != "constraints.txt"
    ]
    for item in what:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", item)
        if extras:
            assert set((extras[1] or "").split(",")) - {""} <= set(project["optional-dependencies"]), where
        else:
            assert item in constraints, f"{where}: {item} is not the version in constraints.txt"


def test_the_two_commands_are_on_the_front_page_and_ci_runs_the_second() -> None:
    commands = [b.text.split() for b in blocks(ROOT / "README.md") if b.language == "bash"]
    assert any("make" in words and "demo" in words for words in commands)
    assert any("make" in words and "test" in words for words in commands)
    assert "exec make test" in (ROOT / ".ci/run").read_text()
    assert re.search(r"^TORCH := \$\(shell grep '\^torch==' constraints.txt\)", MAKEFILE, re.MULTILINE)
    assert all("-c constraints.txt" in line for line in MAKEFILE.splitlines() if "$(PIP) install" in line)
