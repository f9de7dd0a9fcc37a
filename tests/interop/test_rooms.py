"""Transformers is imported by its wrapper alone, and every family's description holds together."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from subprocess import run

import pytest
import torch

import stackwise
from stackwise.interop.families import families
from stackwise.interop.family import ABSENT, COMMON
from stackwise.interop.hf_import import read_model

SOURCE = Path(stackwise.__file__).parent


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_only_the_wrapper_imports_transformers() -> None:
    wrapper = SOURCE / "interop" / "transformers.py"
    assert [p for p in SOURCE.rglob("*.py") if "transformers" in imports_of(p)] == [wrapper]


def test_reading_and_writing_need_no_transformers(saved, tmp_path: Path) -> None:
    _, folder = saved("llama")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from stackwise.interop.hf_import import read_model\n"
        "from stackwise.interop.hf_export import write_model\n"
        f"m = read_model({str(folder)!r})\n"
        f"print(write_model(m.rack, m.tokenizer, {str(tmp_path / 'out')!r}).family)"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "llama\n", done.stderr


@pytest.mark.parametrize("name", families())
def test_no_key_is_both_read_and_passed_over(name: str) -> None:
    family = families()[name]
    read = {key.theirs for key in family.keys}
    assert len(read) == len(family.keys)
    assert not read & (COMMON | family.ignored | family.fixed.keys() | ABSENT.keys())
    assert not family.ignored & family.fixed.keys()


@pytest.mark.parametrize("name", families())
def test_the_table_names_every_tensor_once(name: str, saved) -> None:
    read = read_model(saved(name)[1], stacks=2)
    rows = read.family.rows(read.rack.spec)
    ours = [tensor for row in rows for tensor in row.ours]
    theirs = [tensor for row in rows for tensor in row.theirs]
    assert sorted(ours) == sorted(read.rack.state_dict())
    assert len(set(theirs)) == len(theirs)
    for row in rows:
        tensors = [read.rack.state_dict()[tensor] for tensor in row.ours]
        for before, after in zip(tensors, row.change.load(row.change.save(tensors)), strict=True):
            assert torch.equal(before, after)
