"""Stacks that train alone: in any order, in several processes, and united."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.errors import CheckpointError
from stackwise.cli.errors import exit_code
from stackwise.config.errors import ConfigError
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.tracking.folder import RunFolderError
from stackwise.training import loop
from stackwise.training.merge import merge
from stackwise.training.run import train
from stackwise.training.stored import open_run

DROPOUT = {"model__dropout": 0.1, "training__max_steps": 3}  # so that a step draws at random


@pytest.fixture
def run(tiny):
    """Train some of three independent stacks under a name; returns the run folder."""

    def go(name: str, stacks: list[int] | None = None, **changes) -> str:
        config = tiny(
            training__run_id=name,
            training__progressive__building_mode="independent",
            training__progressive__train_stacks=stacks,
            **{**DROPOUT, **changes},
        )
        return train(config, sinks=[])["run_dir"]

    return go


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return open_run(path).rack.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_the_order_of_training_changes_no_bit(run):
    assert same(weights(run("a")), weights(run("b", [2, 0, 1])))


def test_two_processes_merged_equal_one(run, tmp_path):
    whole = weights(run("whole"))
    a = run("a", [2, 0])
    b = run("b", [1], checkpoint__init_from=a)
    merged = merge([a, b], tmp_path / "runs" / "merged")
    assert same(weights(merged.folder.path), whole)
    assert merged.positions == {0: Path(a), 1: Path(b), 2: Path(a)}
    assert same(weights(merge([b, a], tmp_path / "other").folder.path), whole)


def test_each_stack_runs_alone_between_embedding_and_head(run, monkeypatch):
    seen = []
    original = loop.Engine._train_step

    def step(self, stage):
        original(self, stage)
        split = self.setup.split
        seen.append((stage.alone, split.prefix, split.start, split.stop, sorted(self.setup.units)))

    def evaluate(self, when):
        spans.append(self.rack.span)
        return evaluated(self, when)

    spans, evaluated = [], loop.Engine._evaluate
    monkeypatch.setattr(loop.Engine, "_train_step", step)
    monkeypatch.setattr(loop.Engine, "_evaluate", evaluate)
    rack = open_run(run("a", training__max_steps=1)).rack
    assert seen == [
        (0, 0, 2, 3, ["embedding", "head", "norm", "stack:s0"]),
        (1, 1, 1, 2, ["stack:s1"]),
        (2, 1, 0, 1, ["stack:s2"]),
    ]
    assert [stack.uid for stack in rack.stacks] == ["s2", "s1", "s0"]
    assert spans == [(2, 3), (1, 2), (0, 1)]


def test_a_stack_alone_gives_the_logits_of_a_rack_that_has_no_other(tiny):
    from stackwise.curriculum.split import apply_training
    from stackwise.model.describe import rack_spec
    from stackwise.model.rack import Rack

    spec = rack_spec(tiny(model__vocab_size=31, training__progressive__building_mode="independent"), 3)
    rack = Rack(spec, seed=1)
    only = Rack(spec.with_stacks(spec.stacks[1:2]), seed=1)
    ids = torch.randint(0, 31, (2, 9))
    apply_training(rack, {"stack:s1"}, alone=1)
    assert torch.equal(rack(ids), only(ids))
    sampled = [r.generate(ids[:, :4], max_new_tokens=5, temperature=0.0) for r in (rack, only)]
    assert torch.equal(*sampled)
    apply_training(rack, {"stack:s1"})
    assert not torch.equal(rack(ids), only(ids))


def test_a_merged_run_goes_on_with_the_joint_phase_of_the_whole(run, tmp_path):
    joint = {"training__progressive__joint_tuning": True}
    whole = run("whole", **joint)
    a = run("a", [2, 1], **joint)
    b = run("b", [0], checkpoint__init_from=a, **joint)
    assert len(open_run(a).meta["stages"]) == 2
    merged = merge([a, b], tmp_path / "runs" / "merged")
    assert merged.goes_on
    result = train(StackWiseConfig.from_yaml(merged.folder.config), sinks=[])
    assert [h["name"] for h in result["training_history"]] == ["stack 1", "stack 2", "stack 3", "joint"]
    assert same(weights(merged.folder.path), weights(whole))


def test_what_does_not_fit_together_is_named(run, tmp_path, tiny):
    a = run("a", [2, 0])
    b = run("b", [1], checkpoint__init_from=a)
    out = tmp_path / "merged"
    with pytest.raises(
        CheckpointError, match=r"position 2 is in .*a and in .*a; no run has trained the position 1"
    ):
        merge([a, a], out)
    with pytest.raises(CheckpointError, match="no run has trained the position 0, 2"):
        merge([b, b], out)
    other = run("other", [1], checkpoint__init_from=a, training__optimizer__lr=1e-2)
    with pytest.raises(CheckpointError, match=r"training\.optimizer\.lr: 0\.01, not 0\.003"):
        merge([a, other], out)
    plain = train(tiny(training__run_id="plain"), sinks=[])["run_dir"]
    with pytest.raises(CheckpointError, match="building_mode is append") as caught:
        merge([a, plain], out)
    assert exit_code(caught.value) == 7, "these runs do not fit, and nothing is damaged"
    stray = run("stray", [1], checkpoint__init_from=run("elsewhere", training__max_steps=1))
    with pytest.raises(
        CheckpointError, match=r"another embedding than .*a, which trained it: train its stacks"
    ):
        merge([a, stray], out)
    assert not out.exists()
    merge([a, b], out)
    with pytest.raises(RunFolderError, match="already holds a run"):
        merge([a, b], out)


def test_the_verb_merges_and_has_the_exit_codes_of_the_others(run, tmp_path, capsys):
    from stackwise.cli.main import main

    a = run("a", [2, 0], training__max_steps=1)
    b = run("b", [1], checkpoint__init_from=a, training__max_steps=1)
    out = str(tmp_path / "merged")
    assert main(["merge", a, "-o", out]) == 2
    assert "two runs or more" in capsys.readouterr().err
    assert main(["merge", a, str(tmp_path / "nowhere"), "-o", out]) == 2
    assert main(["merge", a, a, "-o", out]) == 7
    assert main(["merge", a, b, "-o", out]) == 0
    assert f"stack 1  from {b}" in capsys.readouterr().out
    assert main(["merge", a, b, "-o", out]) == 2
    assert main(["runs", "show", out]) == 0


def test_an_unfinished_run_is_not_merged(run, tmp_path, monkeypatch):
    a = run("a", [2, 0])

    class Killed(BaseException):
        pass

    def step(self, stage):
        raise Killed

    b = run("b", [1], checkpoint__init_from=a)
    original = loop.Engine._train_step
    count = iter(range(100))
    monkeypatch.setattr(
        loop.Engine, "_train_step", lambda s, g: original(s, g) if next(count) < 2 else step(s, g)
    )
    with pytest.raises(Killed):
        run("c", [1], checkpoint__init_from=a, checkpoint__save_interval=1)
    with pytest.raises(CheckpointError, match=r"not finished \(stage 1 of 1, step 2 of 3\)"):
        merge([a, str(Path(b).parent / "c")], tmp_path / "merged")


def test_the_stack_next_to_the_head_comes_first_or_from_another_run(tiny):
    def config(**progressive):
        return tiny(**{f"training__progressive__{k}": v for k, v in progressive.items()})

    with pytest.raises(ConfigError, match="put 2 first"):
        config(building_mode="independent", train_stacks=[0, 2])
    listed = stages(config(building_mode="independent", train_stacks=[2, 0]))
    assert [(s.alone, s.trains[0], s.data_start) for s in listed] == [(0, "embedding", 0), (2, "stack:0", 10)]
