"""The loss that holds a prepended stack to what the stacks behind it were trained to receive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.masked import Vocabulary
from stackwise.training.consistency import Consistency, consistency_of, distance
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run

MASK = 49
CPU = torch.device("cpu")


def rack_of(dropout=0.0, positions="learned"):
    block = BlockSpec(16, 2, dropout=dropout)
    stacks = tuple(StackSpec(f"s{i}", (block, block), i) for i in range(2))
    return Rack(RackSpec(50, 16, stacks, max_seq_len=16, positions=positions, dropout=dropout)).double()


def diffusion():
    return Diffusion(Vocabulary(50, MASK, ()), 7, "absorbing")


def batch(rows=3, tokens=12, padded=False):
    made = {"input_ids": torch.randint(0, 49, (rows, tokens)), "sample_ids": torch.arange(rows)}
    if padded:
        made["attention_mask"] = torch.arange(tokens) < torch.tensor([[tokens], [5], [3]])
    return made


def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("padded", [False, True])
def test_the_distance_is_its_formula(padded):
    rack, objective, data = rack_of(), diffusion(), batch(padded=padded)
    lighter = objective.corrupt(data, (0.2, 0.4))
    hidden = torch.randn(3, 12, 16, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for row, mask in enumerate(data.get("attention_mask", torch.ones(3, 12))):
        for t in mask.nonzero().flatten().tolist():
            aim = rack.embedding.weight[lighter.input_ids[row, t]] + rack.positions.weight[t]
            expected = expected + (unit(hidden[row, t]) - unit(aim.detach())).square().sum() / 16
    found = distance(rack, objective, hidden, lighter)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    found.backward()
    assert hidden.grad.abs().max() > 0
    assert rack.embedding.weight.grad is None


def test_it_is_zero_at_its_target_whatever_the_scale_and_dropout():
    rack, objective = rack_of(dropout=0.5), diffusion()
    lighter = objective.corrupt(batch(), (0.2, 0.4))
    with torch.no_grad():
        rack.eval()
        aim = rack.embed(lighter.input_ids, rack.make_context(lighter.input_ids))
        rack.train()
    assert distance(rack, objective, aim, lighter) == 0
    assert rack.dropout.training
    assert distance(rack, objective, 3e3 * aim, lighter) < 1e-6 < distance(rack, objective, -aim, lighter)


def test_masks_of_the_aim_lie_inside_those_that_the_new_stack_reads():
    objective, data = diffusion(), batch(rows=20)
    heavy = objective.corrupt(data, (0.5, 1.0)).input_ids == MASK
    (aim,) = Consistency(0.1, 2, (0.0, 0.5)).aims(objective, [data], torch.tensor(1.0), CPU)
    light = aim.lighter.input_ids == MASK
    assert light.sum() < heavy.sum()
    assert not (light & ~heavy).any()


def test_the_term_does_not_depend_on_how_a_step_is_cut():
    rack, objective, data = rack_of(), diffusion(), batch(padded=True)
    held, hidden = Consistency(0.3, 2, (0.0, 0.5)), torch.randn(3, 12, 16, dtype=torch.float64)

    def total(*cuts):
        parts = [{name: tensor[a:b] for name, tensor in data.items()} for a, b in cuts]
        aims = held.aims(objective, parts, torch.tensor(5.0), CPU)
        pairs = zip(aims, cuts, strict=True)
        terms = [aim.factor * distance(rack, objective, hidden[a:b], aim.lighter) for aim, (a, b) in pairs]
        return torch.stack(terms).sum() / 5

    torch.testing.assert_close(total((0, 3)), total((0, 1), (1, 3)), rtol=1e-6, atol=0)


def test_it_is_for_the_stack_that_was_prepended_last_and_takes_the_noise_of_the_stage_before(tiny):
    config, rack = tiny(training__progressive__consistency_weight=0.1), rack_of()
    prepended, appended = Growth("prepend", 2), Growth("append", 2)
    first = Stage("1", 1, ("all",), 5, noise=(0.0, 0.5))
    halves = [
        Stage("2", 2, (f"block:0.{i}",), 5, noise=(0.5, 1.0), grow=(prepended, None)[i]) for i in (0, 1)
    ]
    held = Consistency(0.1, 2, (0.0, 0.5))

    def of(units, stages, index, settings=config):
        return consistency_of(settings, stages, index, rack.spec, units)

    assert of({"stack:s0", "norm"}, [first, halves[0]], 1) == held
    assert of({"block:s0.1"}, [first, *halves], 2) == held
    assert of({"lora.stack:s0"}, [first, *halves], 2) == held
    assert of({"stack:s0"}, [first, *halves], 0) is None
    assert of({"stack:s0", "stack:s1"}, [first, *halves], 2) is None
    assert of({"stack:s1"}, [first, *halves], 2) is None
    assert of({"stack:s0"}, [first, replace(halves[0], grow=appended)], 1) is None
    assert of({"stack:s0"}, [first, replace(halves[0], alone=1)], 1) is None
    assert of({"stack:s0"}, [first, halves[0]], 1, tiny()) is None


def prepending(tiny, **keys):
    return tiny(
        training__progressive__building_mode="prepend",
        training__progressive__new_stack_init="random",
        **keys,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_runs_hold_new_stacks_to_it_and_no_others(tiny, monkeypatch, masked):
    keys = {"model__attention_preset": "bert_style", "training__progressive__training_objective": "diffusion"}
    seen = []
    train_step = Engine._train_step

    def watched(self, stage):
        held = self.setup.consistency
        seen.append((self.progress.stage, held and (held.weight, held.blocks)))
        train_step(self, stage)

    monkeypatch.setattr(Engine, "_train_step", watched)
    far = {}
    for weight in (0.0, 30.0):
        seen.clear()
        config = prepending(
            tiny,
            training__run_id=f"w{weight:g}",
            training__max_steps=12,
            training__progressive__joint_tuning=True,
            training__progressive__consistency_weight=weight,
            **(keys if masked else {}),
        )
        run = open_run(train(config, sinks=[])["run_dir"])
        held = {stage: (weight, 1) if weight and stage in (1, 2) else None for stage in range(4)}
        assert set(seen) == set(held.items()), "the joint phase moves everything"
        ids = torch.randint(0, 20, (4, 16))
        new = run.rack.run(run.rack.look_up(ids), run.rack.make_context(ids), 0, 1)
        far[weight] = distance(run.rack, CausalLM(), new, CausalLM().corrupt({"input_ids": ids}))
    if not masked:
        assert far[30.0] < 0.9 * far[0.0]


def test_a_resumed_run_ends_with_the_same_bytes_and_frozen_stacks_keep_theirs(tiny, monkeypatch):
    keys = {"training__progressive__consistency_weight": 0.5, "training__progressive__joint_tuning": False}
    whole = open_run(train(prepending(tiny, training__run_id="whole", **keys), sinks=[])["run_dir"])
    after = Engine._after_step

    def interrupted(self, stage):
        after(self, stage)
        if self.progress.step == 7:
            self._save(None)
            raise Interrupted(2, "test")

    part = prepending(tiny, training__run_id="part", **keys)
    monkeypatch.setattr(Engine, "_after_step", interrupted)
    with pytest.raises(Interrupted):
        train(part, sinks=[])
    monkeypatch.setattr(Engine, "_after_step", after)
    resumed = open_run(train(part, sinks=[])["run_dir"])
    for name, tensor in whole.rack.state_dict().items():
        assert torch.equal(tensor, resumed.rack.state_dict()[name]), name
    from stackwise.checkpoint.store import Store

    commits = Store(whole.folder.store).commits()
    assert len({c.parts["stack:s0/weights"].sha256 for c in commits if c.step > 5}) == 1
