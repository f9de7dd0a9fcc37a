"""An imported model is a run like any other: it generates, starts other runs, grows and is planned."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.cli.main import main
from stackwise.config.errors import ConfigError
from stackwise.config.root import StackWiseConfig
from stackwise.interop.hf_import import read_model
from stackwise.tracking.folder import RunFolderError, list_runs
from stackwise.training.adopt import adopt
from stackwise.training.errors import IncompatibleResumeError
from stackwise.training.run import train
from stackwise.training.stored import open_run

Saved = Callable[..., tuple[Any, Path]]


def adopted(saved: Saved, tmp_path: Path, kind: str = "llama", **cut: int) -> Path:
    return adopt(read_model(saved(kind)[1], **cut), tmp_path / "runs" / kind).path


def overrides(path: Path, text_file: Path) -> list[str]:
    return [
        *("training.run_id=tuned", "training.max_steps=2", "training.seq_len=16", "training.batch_size=2"),
        *("data.source=text", f"data.path={text_file}", "training.dtype=float32", "training.device=cpu"),
        *("evaluation.batches=1", "tracking.report=false", "generation.max_new_tokens=2"),
    ]


def test_a_run_is_made_that_lists_and_opens(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved("llama")
    path = adopt(read_model(folder, stacks=3), tmp_path / "runs" / "llama").path
    opened = open_run(path)
    assert [stack.trained for stack in opened.rack.spec.stacks] == [True] * 3
    ids = torch.randint(0, 320, (1, 10))
    with torch.no_grad():
        torch.testing.assert_close(opened.rack(ids), model(ids).logits, atol=1e-4, rtol=0)
    (summary,) = list_runs(tmp_path / "runs")
    assert (summary.status, summary.damage) == ("done", None)
    with pytest.raises(RunFolderError, match="already holds a run"):
        adopt(read_model(folder), path)


def test_another_run_starts_from_it(saved: Saved, tmp_path: Path, text_file: Path) -> None:
    path = adopted(saved, tmp_path, stacks=3)
    config = StackWiseConfig.from_yaml(path / "config.yaml", overrides(path, text_file))
    train(config, sinks=[])
    before, after = open_run(path).rack.state_dict(), open_run(tmp_path / "runs" / "tuned").rack.state_dict()
    assert before.keys() == after.keys()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.01


def test_a_model_folder_itself_is_no_run(saved: Saved, tmp_path: Path, text_file: Path) -> None:
    path = adopted(saved, tmp_path)
    start = [f"checkpoint.init_from={tmp_path / 'hf-llama'}"]
    config = StackWiseConfig.from_yaml(path / "config.yaml", [*overrides(path, text_file), *start])
    with pytest.raises(ConfigError, match="stackwise import"):
        train(config, sinks=[])


def test_adapters_train_on_top_of_it(saved: Saved, tmp_path: Path, text_file: Path) -> None:
    path = adopted(saved, tmp_path, stacks=3)
    config = StackWiseConfig.from_yaml(
        path / "config.yaml",
        [
            *overrides(path, text_file),
            "training.progressive.trunk_strategy=qlora",
            "training.progressive.qlora_enabled=true",
        ],
    )
    train(config, sinks=[])
    rack = open_run(tmp_path / "runs" / "tuned").rack
    assert all([a.name for a in stack.adapters] == ["stack"] for stack in rack.stacks)


def test_it_grows(saved: Saved, tmp_path: Path, text_file: Path) -> None:
    path = adopted(saved, tmp_path, stacks=3)
    grow = {"op": "append", "n_blocks": 1, "init": "zero"}
    stages = [
        {"name": "old", "train": ["head"], "max_steps": 1, "n_stacks": 3},
        {"name": "new", "train": ["new"], "max_steps": 2, "grow": grow},
    ]
    config = StackWiseConfig.from_yaml(
        path / "config.yaml",
        [*overrides(path, text_file), f"training.stages={stages}", "model.architecture.n_stacks=4"],
    )
    train(config, sinks=[])
    grown, before = open_run(tmp_path / "runs" / "tuned").rack, open_run(path).rack.state_dict()
    assert len(grown.stacks) == 4
    after = grown.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("stacks."))


def test_training_goes_on_only_under_a_name_of_its_own(saved: Saved, tmp_path: Path, text_file: Path) -> None:
    path = adopted(saved, tmp_path)
    rest = [text for text in overrides(path, text_file) if text.startswith(("tracking", "evaluation"))]
    config = StackWiseConfig.from_yaml(path / "config.yaml", rest)
    with pytest.raises(IncompatibleResumeError, match=r"training\.run_id"):
        train(config, sinks=[])


def test_the_command(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = saved("gpt2")
    out = str(tmp_path / "gpt2")
    assert main(["import", str(folder), "-o", out, "--stacks", "3"]) == 0
    assert "blocks by stack: 1, 1, 1" in capsys.readouterr().out
    with redirect_stdout(io.StringIO()) as text:
        assert main(["generate", out, "-p", "to be", "-n", "5", "--greedy"]) == 0
    assert text.getvalue().startswith("to be")
    assert main(["plan", f"{out}/config.yaml", "training.max_steps=3"]) == 0
    assert "end to end" in capsys.readouterr().out
    assert main(["import", str(folder), "-o", out]) == 2
    assert main(["import", str(tmp_path / "nowhere")]) == 2
    assert main(["import", str(folder), "-o", str(tmp_path / "b"), "--stacks", "4"]) == 2
    assert "--stacks" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
