"""What every curriculum promises while it runs: frozen is frozen, the optimizer has what trains, resume is exact."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.split import units_of
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run


def progressive(mode: str, **keys) -> dict:
    named = {f"training__progressive__{key}": value for key, value in keys.items()}
    return {"training__progressive__building_mode": mode, **named}


PROGRAMS = {
    "end_to_end": {"training__progressive__enabled": False},
    "append": progressive("append"),
    "append, by block": {
        **progressive("append", joint_tuning=False),
        "training__unit": "block",
        "model__architecture__blocks_per_stack": 2,
        "model__architecture__n_stacks": 2,
    },
    "append, gradual": progressive("append", joint_tuning_backbone="gradual", growth_optimizer="carry"),
    "append, frozen joint": progressive("append", joint_tuning_backbone="frozen"),
    "append, trainable trunk": progressive("append", trunk_strategy="trainable", growth_optimizer="copy"),
    "prepend": progressive("prepend", growth_optimizer="copy"),
    "prepend, joint": progressive("prepend", joint_tuning=True),
    "grow": progressive("grow", growth_optimizer="copy", growth_at=0.3, target_stacks=4),
    "grow, carried": progressive("grow", growth_optimizer="carry", target_stacks=2),
    "grow, last, shared schedule": progressive(
        "grow",
        growth_pattern="last",
        growth_schedule="shared",
        growth_at=0.5,
        growth_optimizer="copy",
        target_stacks=4,
    ),
    "grow, middle": progressive("grow", growth_pattern="middle", growth_at=0.5, target_stacks=4),
    "independent": progressive("independent"),
    "cyclic": progressive("cyclic"),
    "cyclic, carried": progressive("cyclic", growth_optimizer="carry", cycle_order="random", cycle_sweeps=2),
    "cyclic, backward": progressive("cyclic", cycle_order="backward", cycle_steps=1),
}
UNLIKE = {
    "model__stacks": [{}, {"d_ff": 32, "n_blocks": 2}, {"n_heads": 1}],
    "training__progressive__new_stack_init": "random",
}


def make(tiny, name: str, **changes) -> StackWiseConfig:
    base = {
        "training__max_steps": 3,
        "checkpoint__save_interval": 2,
        "training__run_id": name.replace(", ", "-"),
    }
    return tiny(
        **{
            **base,
            **PROGRAMS[name],
            **changes,
            "training__run_id": base["training__run_id"].replace(" ", "_"),
        }
    )


@pytest.fixture
def watched(monkeypatch):
    """Facts of every stage of a run: tensors before and after, the split, what the optimizer held."""
    facts = []
    set_up, finish, step = Engine._set_up, Engine._finish, Engine._train_step

    def on_set_up(self, stage, *followed):
        set_up(self, stage, *followed)
        before = {n: p.detach().clone() for n, p in self.rack.named_parameters()}
        facts.append({"stage": stage, "before": before, "reached": set(), "modes": {}})

    def on_step(self, stage):
        for name, module in self.rack.named_modules():
            facts[-1]["modes"][name] = module.training
        step(self, stage)
        facts[-1]["groups"] = [
            self.optimizers.names[p]
            for o in self.optimizers.optimizers
            for g in o.param_groups
            for p in g["params"]
        ]

    def on_finish(self, stage):
        facts[-1] |= {
            "after": {n: p.detach().clone() for n, p in self.rack.named_parameters()},
            "trains": {n for n, p in self.rack.named_parameters() if p.requires_grad},
            "grads": [n for n, p in self.rack.named_parameters() if p.grad is not None],
            "moments": set(self.optimizers.state()),
            "units": set(self.setup.units),
            "split": self.setup.split,
            "spec": self.rack.spec,
            "parked": set(self.parked),
        }
        finish(self, stage)

    monkeypatch.setattr(Engine, "_set_up", on_set_up)
    monkeypatch.setattr(Engine, "_train_step", on_step)
    monkeypatch.setattr(Engine, "_finish", on_finish)
    return facts


@pytest.mark.parametrize("name", [*PROGRAMS, "unlike cyclic", "unlike append", "unlike prepend"])
def test_only_what_a_stage_names_changes_and_the_optimizer_has_just_that(tiny, watched, name):
    program, changes = (name.removeprefix("unlike "), UNLIKE) if name.startswith("unlike") else (name, {})
    config = make(tiny, program, **changes)
    train(config, sinks=[])
    assert len(watched) == len(stages(config, 1))
    for fact in watched:
        wanted = {n for n in fact["after"] if units_of(n) & fact["units"]}
        assert fact["trains"] == wanted, fact["stage"].name
        assert sorted(fact["groups"]) == sorted(wanted)  # each once
        assert fact["moments"] == wanted
        assert fact["grads"] == []
        for n, tensor in fact["after"].items():
            if n not in wanted:
                assert torch.equal(tensor, fact["before"][n]), (fact["stage"].name, n)
        changed = {n for n in wanted if not torch.equal(fact["after"][n], fact["before"][n])}
        # Rows of the embedding that no batch holds stay; of all other tensors something must move.
        assert changed == wanted, (fact["stage"].name, wanted - changed)
        split, blocks = fact["split"], []
        for stack in fact["spec"].stacks:
            blocks += [{f"stack:{stack.uid}", f"block:{stack.uid}.{i}"} for i in range(len(stack.blocks))]
        blocks += [{"tail"}] * len(fact["spec"].tail)
        if fact["stage"].alone is None:
            first = next((i for i, names in enumerate(blocks) if names & fact["units"]), len(blocks))
            expected = 0 if "embedding" in fact["units"] else first + 1
            assert (split.prefix, split.start, split.stop) == (expected, max(0, expected - 1), None)
        frozen = [s for s in fact["spec"].stacks if not any(s.uid in unit for unit in fact["units"])]
        assert not any(fact["modes"][f"stacks.{s.uid}"] for s in frozen)


@pytest.mark.parametrize("name", ["cyclic", "cyclic, carried"])
def test_in_a_visit_one_unit_has_moments_and_the_others_wait_on_the_host(tiny, watched, name):
    train(make(tiny, name), sinks=[])
    for i, fact in enumerate(watched):
        stacks = {unit for unit in fact["units"] if unit.startswith("stack:")}
        assert fact["units"] == {"embedding", "norm", "head"} or (
            len(stacks) == 1 and fact["units"] == stacks
        )
        before = set().union(*(f["moments"] for f in watched[:i]))
        later = set().union(*(f["moments"] for f in watched[i + 1 :]))
        assert fact["parked"] == ((before & later) - fact["moments"] if "carried" in name else set())
    first = next(f for f in watched if f["units"] == {"stack:s0"})
    assert "stacks.s0.blocks.0.attn.q.weight" in first["moments"]  # gradient reaches the first stack


def test_a_visit_goes_on_with_the_moments_of_the_last_one(tiny, monkeypatch):
    """With carried moments the second visit's counter goes on, without them it begins anew."""
    counters = {}
    finish = Engine._finish

    def on_finish(self, stage):
        held = self.optimizers.state()
        name = next(iter(held))
        counters.setdefault(self.config.training.progressive.growth_optimizer, []).append(
            int(held[name]["step"])
        )
        finish(self, stage)

    monkeypatch.setattr(Engine, "_finish", on_finish)
    for how in ("reset", "carry"):
        config = make(tiny, "cyclic", training__progressive__growth_optimizer=how)
        config.training.run_id = how
        train(config, sinks=[])
    visits = len(counters["reset"]) // 2
    steps = counters["reset"][0]
    assert counters["reset"] == [steps] * 2 * visits
    assert counters["carry"] == [steps] * visits + [2 * steps] * visits


def hashes(path: str | Path) -> dict[str, str]:
    return {name: part.sha256 for name, part in Store(Path(path) / "store").latest().parts.items()}


@pytest.mark.parametrize(
    "name", ["prepend", "grow", "grow, middle", "independent", "cyclic, carried", "append, gradual"]
)
def test_resume_in_mid_stage_and_at_boundaries_changes_no_bit(tiny, monkeypatch, name):
    config = make(tiny, name, model__dropout=0.1)
    whole = train(config, sinks=[])
    total = whole["steps"]
    ends, at = [], 0
    for stage in open_run(whole["run_dir"]).meta["stages"]:
        at += stage["steps"]
        ends.append(at)
    stops = {ends[0], ends[0] + 1, ends[len(ends) // 2], total - 1}
    config.training.run_id += "-parts"
    original, armed = Engine._after_step, set(stops)

    def after(self, stage):
        original(self, stage)
        if self.progress.step in armed:
            armed.discard(self.progress.step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "_after_step", after)
    for _ in stops:
        with pytest.raises(Interrupted):
            train(config, sinks=[])
    parts = train(config, sinks=[])
    assert parts["resumed_from"] is not None
    assert hashes(parts["run_dir"]) == hashes(whole["run_dir"])


@pytest.mark.parametrize(
    "name", ["append", "prepend", "grow", "grow, middle", "independent", "cyclic, carried"]
)
def test_the_stages_of_a_curriculum_written_by_hand_give_the_same_hashes(tiny, name, tmp_path):
    config = make(tiny, name)
    mine = train(config, sinks=[])["run_dir"]
    records = [
        stage.to_record() for stage in stages(StackWiseConfig.from_yaml(Path(mine) / "config.yaml"), 1)
    ]
    data = config.to_dict()
    data["training"] |= {"stages": records, "run_id": "by-hand"}
    StackWiseConfig.from_dict(data).to_yaml(tmp_path / "by-hand.yaml")
    by_hand = StackWiseConfig.from_yaml(tmp_path / "by-hand.yaml")
    assert hashes(train(by_hand, sinks=[])["run_dir"]) == hashes(mine)


def test_a_length_curriculum_reshapes_the_rows_and_resumes_exactly(tiny, monkeypatch):
    listed = [
        {"train": ["all"], "max_steps": 2, "seq_len": 8, "batch_size": 6, "n_stacks": 2},
        {"train": ["all"], "max_tokens": 100, "optimizer_state": "carry"},
    ]
    options = {"training__stages": listed, "model__architecture__n_stacks": 2}
    whole = train(tiny(training__run_id="whole", **options), sinks=[])
    assert [h["tokens"] for h in whole["training_history"]] == [2 * 8 * 6, 3 * 16 * 3]
    shapes = []
    loss = Engine._loss

    def on_loss(self, example, *aims):
        shapes.append(tuple(example.input_ids.shape))
        if len(shapes) == 1:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, example, *aims)

    monkeypatch.setattr(Engine, "_loss", on_loss)
    with pytest.raises(Interrupted):
        train(tiny(training__run_id="parts", **options), sinks=[])
    parts = train(tiny(training__run_id="parts", **options), sinks=[])
    assert shapes == [(6, 8), (6, 8), (3, 16), (3, 16), (3, 16)]
    assert hashes(parts["run_dir"]) == hashes(whole["run_dir"])
