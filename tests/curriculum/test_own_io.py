"""Independent stacks as denoisers of their own: around them what is shared or their own, and a start they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackwise.config.errors import ConfigError
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.growth import plain_tensors
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training import loop
from stackwise.training.merge import merge
from stackwise.training.run import train
from stackwise.training.stored import open_run

TIED = [{}, {"model__tie_embeddings": False}]


@pytest.fixture
def config(tiny):
    def make(name: str = "tiny", **changes) -> StackWiseConfig:
        return tiny(
            **{
                "training__run_id": name,
                "model__attention_preset": "bert_style",
                "training__max_steps": 3,
                "training__progressive__training_objective": "diffusion",
                "training__progressive__building_mode": "independent",
                "evaluation__passes": 1,
                **changes,
            }
        )

    return make


@pytest.fixture
def run(config):
    return lambda name, **changes: train(config(name, **changes), sinks=[])["run_dir"]


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return open_run(path).rack.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("options", TIED)
def test_stacks_of_their_own_train_a_copy_of_what_is_around_and_leave_the_rest(run, options, monkeypatch):
    held = {}
    original = loop.Engine._begin

    def begin(self, stage):
        original(self, stage)
        held[stage.alone] = {n: t.clone() for n, t in self.rack.state_dict().items()}

    monkeypatch.setattr(loop.Engine, "_begin", begin)
    rack = open_run(run("a", **options)).rack
    tied = options == {}
    assert [stack.io is None for stack in rack.stacks] == [False, False, True]
    parts = rack.parts()
    assert any(".io.embedding" in name for name in parts["stack:s1"])
    assert any(".io.head" in name for name in parts["stack:s1"]) != tied
    end = rack.state_dict()
    for built in (1, 2):
        prefix = f"stacks.s{built}.io."
        for name in [n for n in end if n.startswith(prefix)]:
            rest = name.removeprefix(prefix)
            assert torch.equal(held[built][name], end[rest]), (
                "starts as the copy of what the first stage trained"
            )
            assert not torch.equal(end[name], end[rest]), "and trains"
    assert rack.is_tied == tied


@pytest.mark.parametrize("io", ["own", "shared"])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_two_orders_and_two_processes_give_the_same_bits(run, tmp_path, io, start):
    options = {
        "training__progressive__independent_io": io,
        "training__progressive__shared_start_fraction": start,
    }
    whole = run("whole", **options)
    if start:  # three steps of three stacks, of which three tenths are one stack's
        alone = {"training__progressive__enabled": False, "model__architecture__n_stacks": 1}
        begun = run("begun", **alone, training__max_steps=3)
        options["checkpoint__init_from"] = begun
    a = run("a", **options, training__progressive__train_stacks=[2, 0])
    more = {} if start else {"checkpoint__init_from": a}
    b = run("b", **{**options, **more}, training__progressive__train_stacks=[1])
    merged = merge([b, a], tmp_path / "merged")
    other = run("other", **options, training__progressive__train_stacks=[2, 0, 1])
    assert same(weights(merged.folder.path), weights(other))
    if not start:
        assert same(weights(other), weights(whole))
    else:
        assert weights(whole).keys() == weights(other).keys()


def test_a_shared_start_costs_its_share_and_all_stacks_begin_as_it_ended(config, monkeypatch):
    run = config(training__max_steps=10, training__progressive__shared_start_fraction=0.4)
    listed = stages(run)
    assert [(s.name, s.steps, s.n_stacks, s.alone) for s in listed] == [
        ("shared start", 12, 1, None),
        ("stack 1", 6, 2, 0),
        ("stack 2", 6, 3, 1),
        ("stack 3", 6, 3, 2),
    ]
    assert [s.data_start for s in listed] == [0, 12, 18, 24]
    assert listed[0].scored_noise is None
    begun = []
    original = loop.Engine._begin

    def begin(self, stage):
        original(self, stage)
        rack = self.rack
        stack = next(s for s in rack.stacks if s.build_index == (stage.alone or 0))
        begun.append({n: t.clone() for n, t in plain_tensors(stack).items()})
        if stage.alone is None:
            return
        around = {f"io.{n}": t for n, t in rack.state_dict().items() if not n.startswith("stacks.")}
        assert all(torch.equal(t, around[n]) for n, t in begun[-1].items() if n.startswith("io."))

    monkeypatch.setattr(loop.Engine, "_begin", begin)
    train(run, sinks=[])
    assert not same(begun[0], begun[1])
    assert same(begun[1], begun[2])
    assert same(begun[2], begun[3])


@pytest.mark.parametrize("io", ["own", "shared"])
def test_a_merged_stack_speaks_on_its_interval_as_it_does_alone(run, tmp_path, io):
    a = run("a", training__progressive__train_stacks=[2, 1], training__progressive__independent_io=io)
    b = run(
        "b",
        training__progressive__train_stacks=[0],
        training__progressive__independent_io=io,
        checkpoint__init_from=a,
    )
    merged = open_run(merge([a, b], tmp_path / "merged").folder.path)
    denoiser = denoiser_of(merged.rack, merged.config)
    assert denoiser.intervals is not None
    vocabulary = merged.rack.spec.vocab_size
    ids = torch.randint(0, vocabulary - 1, (6, 12))
    shares = torch.tensor([1, 12, 5, 8, 3, 10], dtype=torch.float64) / 12
    for row, share in enumerate(shares):
        hidden = torch.randperm(12)[: round(float(share) * 12)]
        ids[row, hidden] = denoiser.mask_id
    at = (ids == denoiser.mask_id).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        together = denoiser.logits(ids, at)
        for source in (a, b):
            opened = open_run(source)
            for stack in opened.rack.stacks:
                opened.rack.span = span_of(opened.rack, stack)
                logits = opened.rack(ids).float().flatten(0, 1)[at]
                logits[:, denoiser.mask_id] = -torch.inf
                owners = torch.tensor([denoiser.intervals.owner(float(share)) for share in shares])
                mine = owners[at // 12] == stack.build_index
                assert bool(mine.any())
                torch.testing.assert_close(together[mine], logits[mine], rtol=1e-5, atol=1e-5)


def span_of(rack, stack) -> tuple[int, int]:
    start = sum(len(s.blocks) for s in list(rack.stacks)[: stack.stack_id])
    return start, start + len(stack.blocks)


def test_a_joint_phase_leaves_one_embedding(run):
    rack = open_run(
        run("joint", training__progressive__joint_tuning=True, training__progressive__independent_io="auto")
    ).rack
    assert all(stack.io is None for stack in rack.stacks)


def test_a_run_with_own_parts_goes_on_where_it_stopped(config, monkeypatch, tmp_path):
    whole = weights(train(config("whole"), sinks=[])["run_dir"])

    class Killed(BaseException):
        pass

    original, count = loop.Engine._train_step, iter(range(100))

    def step(self, stage):
        if next(count) == 5:
            raise Killed
        original(self, stage)

    monkeypatch.setattr(loop.Engine, "_train_step", step)
    stopped = config("stopped", checkpoint__save_interval=1)
    with pytest.raises(Killed):
        train(stopped, sinks=[])
    assert same(weights(train(stopped, sinks=[])["run_dir"]), whole)


def test_wrong_choices_are_named(config, run):
    with pytest.raises(ConfigError, match="is of no use to a joint phase"):
        config(training__progressive__joint_tuning=True, training__progressive__independent_io="own")
    with pytest.raises(ConfigError, match=r"set checkpoint\.init_from to that run"):
        config(training__progressive__shared_start_fraction=0.2, training__progressive__train_stacks=[2])
    with pytest.raises(ConfigError, match="has 3 stacks, and a shared start is a run of one"):
        run(
            "b",
            checkpoint__init_from=run("a"),
            training__progressive__shared_start_fraction=0.2,
        )
    stage = {"train": ["stack:0", "io:0"], "max_steps": 1}
    with pytest.raises(ConfigError, match="which does not run alone in it; set alone to 0"):
        config(training__progressive__building_mode="append", training__stages=[stage])
