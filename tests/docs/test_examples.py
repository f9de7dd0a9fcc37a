"""The programs of examples/ run in their quick form, use public names alone, and stand in the list with their times."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
LIST = (ROOT / "examples" / "README.md").read_text("utf-8")

SHOWS = {
    "attention_comparison": r"latent, grouped, kernel +[\d,]+ +[\d.]+ +\d\.\d{3}\n",
    "checkpoints": r"straight through (\d\.\d+)\nstopped, resumed \1\n(.*\n)+ .*stage-04",
    "dual_lora": r"stack 3 +[\d,]+ +\d\.\d+ +[\d,]+ +\d\.\d+\n(.*\n)+.*0  stack 8, trunk 4\n(.*\n)+.*differ by at most \d.\de-0[5-9]",
    "gpt2": r"validation before [\d.]+ → after [\d.]+(.*\n)+[\d,]+ parameters, \d\.\d+ nats per byte\ndef ",
    "heterogeneous_rack": r"4 experts, 2 per token +[\d,]+ +[\d,]+ +\d.\d+ +\d.\d+ +\d\.\d+\n",
    "masked_diffusion": r"at most \d\.\d+ nats per character \(bound\)(.*\n)+23 steps  '    def add_argument\(self",
    "mlgka_classifier": r"accuracy \d+\.\d% of \d+ lines; the commoner kind 5\d(.*\n)+.*'kernel': 'laplacian'",
    "qlora": r"stored in 4 bits, adapters added +\d+ +[\d,]+ +\d.\d+ +\d.\d+\nadapters trained on prose +\d+",
    "tiny_bert": r"held-out loss of a hidden character: \d\.\d+(.*\n)+.*option_str#ngs.*%",
    "tiny_llama": r"4 stacks +4 +\d+ +[\d.]+ +[\d.]+ +\d\.\d+\nend to end +4 +\d+ +the same FLOPs",
}
"""What the reader gets to see of each program, as a regular expression."""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_shows_what_it_says(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda fd: None)  # that files reach the disk is tested elsewhere
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick"])
    assert re.search(SHOWS[program.stem], capfd.readouterr().out)
    written = {path.name for path in tmp_path.iterdir()}
    assert written <= {"runs"}, "nothing is written but run folders"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_uses_public_names_alone(program: Path) -> None:
    """So that it goes on working when rooms change."""
    tree = ast.parse(program.read_text("utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert [module for module in modules if module.startswith("stackwise.")] == []
    assert "stackwise" in modules
    assert ast.get_docstring(tree)
    assert "Shows:" in (ast.get_docstring(tree) or "")


def test_the_list_names_every_example_with_its_time() -> None:
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\((\w+)\.py\) \| .+ \| (\d+) \|$", LIST, re.MULTILINE)
    assert [name for name, _, _ in rows] == [link for _, link, _ in rows]
    assert sorted(name for name, _, _ in rows) == [program.stem for program in PROGRAMS] == sorted(SHOWS)
    assert all(int(seconds) < 120 for _, _, seconds in rows)
