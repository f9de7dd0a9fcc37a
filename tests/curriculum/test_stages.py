"""The curricula as functions: which stages a config comes to, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stackwise.config.errors import ConfigError
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.growth import grow
from stackwise.curriculum.joint import short_phase
from stackwise.curriculum.layout import grow_spec
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.describe import rack_spec
from stackwise.model.flops import step_units
from stackwise.model.rack import Rack


def config_of(tiny, mode: str = "append", **changes):
    named = {"model__vocab_size": 31, "training__max_steps": 100}
    for key, value in changes.items():
        named[key if "__" in key else f"training__progressive__{key}"] = value
    if mode == "end_to_end":
        return tiny(**named, training__progressive__enabled=False)
    return tiny(**named, training__progressive__building_mode=mode)


def specs_of(config):
    listed = stages(config, 1)
    return listed, stage_specs(config, listed, first_spec(config, listed), "fp32")


# --- which stages there are


def test_grow_multiplies_the_stacks_at_its_share_of_the_tokens(tiny):
    listed, specs = specs_of(config_of(tiny, "grow", target_stacks=8, growth_factor=4))
    assert [stage.n_stacks for stage in listed] == [2, 8]
    assert [stage.steps for stage in listed] == [120, 680]
    assert all(stage.trains == ("all",) for stage in listed)
    assert [stack.uid for stack in specs[1].stacks] == [f"s{i}" for i in range(8)]


def test_the_factor_is_4_from_8_blocks_up_else_2_or_what_divides(tiny):
    def depths(stacks: int, blocks: int) -> list[int]:
        config = config_of(tiny, "grow", target_stacks=stacks, model__architecture__blocks_per_stack=blocks)
        return [stage.n_stacks for stage in stages(config)]

    assert [depths(8, 1), depths(4, 1), depths(2, 4), depths(9, 1)] == [[2, 8], [2, 4], [1, 2], [3, 9]]


def test_middle_growth_inserts_copies_of_the_middle_stack_one_by_one(tiny):
    config = config_of(tiny, "grow", target_stacks=6, growth_factor=2, growth_pattern="middle", growth_at=0.4)
    listed, specs = specs_of(config)
    assert [stage.n_stacks for stage in listed] == [3, 4, 5, 6]
    assert [stage.steps for stage in listed] == [40, 80, 120, 360]  # 40 % in proportion 1 : 2 : 3
    assert [[s.uid for s in spec.stacks] for spec in specs] == [
        ["s0", "s1", "s2"],
        ["s0", "s1", "s3", "s2"],
        ["s0", "s1", "s4", "s3", "s2"],
        ["s0", "s1", "s4", "s5", "s3", "s2"],
    ]


def test_last_growth_puts_copies_of_the_last_stack_next_to_the_head_under_one_schedule(tiny):
    keys = {"growth_factor": 2, "growth_pattern": "last", "growth_at": 0.5}
    listed, specs = specs_of(config_of(tiny, "grow", target_stacks=6, **keys))
    assert [stage.n_stacks for stage in listed] == [3, 4, 5, 6]
    assert [stage.steps for stage in listed] == [100, 100, 100, 300]
    assert [stage.schedule for stage in listed] == [(0, 600), (100, 600), (200, 600), (300, 600)]
    assert [[s.uid for s in spec.stacks] for spec in specs] == [
        ["s0", "s1", "s2"],
        ["s0", "s1", "s2", "s3"],
        ["s0", "s1", "s2", "s3", "s4"],
        ["s0", "s1", "s2", "s3", "s4", "s5"],
    ]
    own = stages(config_of(tiny, "grow", target_stacks=4, growth_schedule="own"))
    assert {stage.schedule for stage in own} == {None}


def test_cyclic_shares_out_the_steps_of_all_stacks_in_one_schedule(tiny):
    listed = stages(config_of(tiny, "cyclic", cycle_sweeps=2, cycle_order="backward"))
    assert [stage.trains for stage in listed[:4]] == [
        ("embedding", "norm", "head"),
        ("stack:2",),
        ("stack:1",),
        ("stack:0",),
    ]
    assert {stage.steps for stage in listed} == {300 // 8}
    assert [stage.schedule for stage in listed] == [(37 * i, 37 * 8) for i in range(8)]
    once = stages(config_of(tiny, "cyclic", cycle_order="random", training__seed=1))
    again = stages(config_of(tiny, "cyclic", cycle_order="random", training__seed=1))
    other = stages(config_of(tiny, "cyclic", cycle_order="random", training__seed=2))
    assert once == again != other
    assert sorted(s.trains for s in once) == sorted(s.trains for s in other)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("trainable", [{"embedding", "stack:s0", "stack:s1", "stack:s2", "tail", "norm", "head"}]),
        ("frozen", [{"stack:s2", "tail", "norm", "head"}]),
        (
            "gradual",
            [
                {"stack:s2", "tail", "norm", "head"},
                {"stack:s1", "stack:s2", "tail", "norm", "head"},
                {"embedding", "stack:s0", "stack:s1", "stack:s2", "tail", "norm", "head"},
            ],
        ),
        ("qlora", [{"lora.stack:s0", "lora.stack:s1", "lora.stack:s2", "tail", "head"}]),
    ],
)
def test_the_joint_phase_trains_what_its_backbone_says_for_its_share(tiny, backbone, expected):
    config = config_of(tiny, joint_tuning_backbone=backbone, qlora_enabled=backbone == "qlora", joint_lr=0.5)
    listed, specs = specs_of(config)
    joint = [(s, spec) for s, spec in zip(listed, specs, strict=True) if s.name.startswith("joint")]
    assert [trained_units(spec, stage) for stage, spec in joint] == expected
    assert all((s.lr, s.trunk_lr, s.io_lr, s.adapter_lr) == (0.5,) * 4 for s, _ in joint)
    costs = stage_flops(config, listed)
    assert sum(costs[-len(joint) :]) / sum(costs) == pytest.approx(0.25, abs=0.02)
    if backbone == "gradual":
        steps = joint[0][0].steps
        assert [stage.schedule for stage, _ in joint] == [
            (0, 3 * steps),
            (steps, 3 * steps),
            (2 * steps, 3 * steps),
        ]


@pytest.mark.parametrize("mode", ["prepend", "grow", "independent", "cyclic"])
def test_the_joint_phase_is_there_only_when_asked_for(tiny, mode):
    assert not any(stage.name == "joint" for stage in stages(config_of(tiny, mode)))
    assert stages(config_of(tiny, mode, joint_tuning=True))[-1].name == "joint"


@pytest.mark.parametrize(
    ("steps", "fraction", "noted"),
    [
        (400, 0.25, True),  # the default share of the FLOPs is an eighth of the steps
        (400, 0.45, False),
        (300, 0.05, False),  # 900 steps before it: nobody expects much of such a run
        (9000, 0.10, False),  # a small share, and more than a thousand steps
        (9000, 0.01, True),
    ],
)
@pytest.mark.parametrize("backbone", ["trainable", "gradual"])
def test_a_joint_phase_of_few_steps_is_noted(tiny, steps, fraction, noted, backbone):
    keys = {"joint_tuning_fraction": fraction, "joint_tuning_backbone": backbone}
    config = config_of(tiny, training__max_steps=steps, **keys)
    listed = stages(config)
    note = short_phase(config, listed)
    if not noted:
        assert note is None
        return
    count = 3 if backbone == "gradual" else 1
    joint, total = sum(stage.steps for stage in listed[-count:]), sum(stage.steps for stage in listed)
    assert note.startswith(
        f"training.progressive.joint_tuning_fraction {fraction:g} leaves {joint:,} of the run's"
    )
    assert joint < min(1000, 0.2 * total)
    advised = note.rpartition(". ")[2].split()
    config.training.progressive.joint_tuning_fraction = float(advised[0])
    longer = sum(stage.steps for stage in stages(config)[-count:])
    assert longer >= int(advised[-1].replace(",", ""))
    assert short_phase(config, stages(config)) is None


def test_without_a_joint_phase_nothing_is_noted_about_it(tiny):
    for mode in ("append", "prepend", "grow", "cyclic", "end_to_end"):
        config = config_of(tiny, mode, training__max_steps=400, joint_tuning=False)
        assert short_phase(config, stages(config)) is None
    listed = [{"train": ["all"], "max_steps": 1000}, {"name": "joint", "train": ["all"], "max_steps": 1}]
    config = tiny(model__vocab_size=31, training__stages=listed)
    assert short_phase(config, stages(config)) is None


def test_stages_survive_json_and_yaml(tiny):
    blocks = rack_spec(config_of(tiny)).stacks[0].blocks
    stage = Stage(
        "a", 3, ("new", "head"), 4, Growth("append", 1, "zero", blocks=blocks), schedule=(1, 9), cache=True
    )
    assert Stage.from_dict(stage.to_dict()) == stage
    for mode in ("append", "prepend", "grow", "independent", "cyclic", "end_to_end"):
        listed = stages(config_of(tiny, mode, joint_tuning=True))
        again = config_of(tiny, mode)
        again.training.stages = [stage.to_record() for stage in listed]
        assert stages(again) == listed


# --- what is wrong with hand-written ones


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"train": ["stack:1"]}, {"train": ["new"], "grow": {"op": "append"}}], "stack:1.*matches nothing in a rack of 1"),
        ([{"train": ["block:0.1"]}], r"matches nothing.*block:<stack>.<block>"),
        ([{"train": ["embeding"]}], "did you mean 'embedding'"),
        ([{"train": ["lora:stack"]}], "matches nothing"),
        ([{"train": ["all"], "grow": {"op": "append"}}], "nothing before the first stage"),
        ([{"train": ["all"]}, {"train": ["all"], "grow": {"op": "duplicate", "factor": 13}}], "max_stacks is 12; raise it"),
        ([{"train": ["all"]}, {"train": ["all"], "grow": {"op": "duplicate", "layers": [0, 7]}}], r"the blocks \[7\]"),
        ([{"train": ["all"]}, {"train": ["new"], "grow": {"op": "append"}, "n_stacks": 5}], "the rack has 2 stacks"),
        ([{"train": ["all"], "alone": 7, "n_stacks": 2}], "build index 7 alone; there are 0, 1"),
        ([{"train": ["all"], "alone": 0, "n_stacks": 2}], "trains stack:s1, tail, which does not run"),
        ([{"train": ["all"], "grow": {"op": "append", "blocks": [{"d_fff": 3}]}}], "did you mean 'd_ff'"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_run_is_a_config_error(tiny, records, message):
    listed = [{"max_steps": 3, **record} for record in records]
    with pytest.raises(ConfigError, match=message):
        tiny(model__vocab_size=31, training__stages=listed)


def test_all_problems_of_a_program_are_listed(tiny):
    listed = [{"train": ["heads"], "max_steps": 1}, {"train": ["stack:9"], "max_steps": 1}]
    with pytest.raises(ConfigError) as caught:
        tiny(model__vocab_size=31, training__stages=listed)
    assert [problem.key for problem in caught.value.problems] == ["training.stages.0", "training.stages.1"]


def test_a_tied_head_alone_trains_nothing(tiny):
    spec = rack_spec(config_of(tiny, model__tie_embeddings=True), 2)
    with pytest.raises(ValueError, match="trains nothing"):
        trained_units(spec, Stage("s", 2, ("head",), 1))


# --- growth


def rack_of(tiny, n_stacks: int = 3, **changes) -> Rack:
    rack = Rack(rack_spec(config_of(tiny, **changes), n_stacks), seed=3)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return rack


def block_states(rack: Rack) -> list[dict[str, torch.Tensor]]:
    return [block.state_dict() for stack in rack.stacks for block in stack.blocks]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(
    "layers", [None, (0, 0, 1, 1, 2, 2), (2, 1, 0, 0, 1, 2), (1, 1, 1, 1), (0, 1, 2, 0, 1, 2, 1)]
)
def test_a_duplicated_rack_equals_its_map(tiny, layers):
    rack = rack_of(tiny)
    before, modules = block_states(rack), list(rack.stacks)
    grown, copies = grow(rack, Growth("duplicate", 1, layers=layers), seed=0)
    listed = layers or (0, 1, 2, 0, 1, 2)
    assert all(equal(state, before[i]) for state, i in zip(block_states(grown), listed, strict=True))
    uids = [stack.uid for stack in grown.stacks]
    assert len(set(uids)) == len(uids)
    pointers = [p.data_ptr() for p in grown.parameters()]
    assert len(set(pointers)) == len(pointers)  # no copy shares its source's memory
    kept = [stack for stack in grown.stacks if stack in modules]
    assert [stack.uid for stack in kept] == [f"s{i}" for i in dict.fromkeys(listed)]
    assert len(copies) == len(listed) - len(kept)
    assert [stack.spec for stack in grown.stacks] == list(grown.spec.stacks)


@pytest.mark.parametrize("op", ["append", "prepend", "duplicate"])
def test_zero_growth_leaves_the_logits_bit_for_bit(tiny, op):
    rack = rack_of(tiny)
    ids = torch.randint(0, 31, (2, 9))
    before = rack(ids)
    grown, copies = grow(rack, Growth(op, 1, "zero"), seed=0)
    assert torch.equal(grown(ids), before)
    assert copies == {}


def test_a_prepended_copy_equals_its_neighbour(tiny):
    rack = rack_of(tiny)
    grown, copies = grow(rack, Growth("prepend", 1), seed=0)
    assert grown.stacks[0].uid == "s3"
    assert equal(grown.stacks[0].state_dict(), grown.stacks[1].state_dict())
    assert copies == {"stacks.s3.blocks.0.": "stacks.s0.blocks.0."}


def test_wrong_growth_is_refused(tiny):
    spec = rack_spec(config_of(tiny), 2)
    for growth, message in [
        (Growth("insert", 1), "append, prepend, duplicate"),
        (Growth("append", 1, "mean"), "copy, zero, random"),
        (Growth("append", 0), "n_blocks must be at least 1"),
        (Growth("duplicate", layers=(0, 2)), r"names the blocks \[2\], but the rack has blocks 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            grow_spec(spec, growth)
    other = tuple(replace(block, d_ff=24) for block in spec.stacks[0].blocks)
    with pytest.raises(ValueError, match="whose shape is another; set new_stack_init to random"):
        grow(Rack(spec), Growth("append", 1, blocks=other), seed=0)
    assert grow(Rack(spec), Growth("append", 1, "random", blocks=other), seed=0)[0].spec.blocks[2].d_ff == 24


# --- cost


def units_of_run(config, count: int) -> list[float]:
    """Cost of each stage in forward passes of the whole rack of `count` blocks."""
    listed, specs = specs_of(config)
    return [
        step_units(replace(spec, tail=()), trained_units(replace(spec, tail=()), stage), alone=stage.alone)
        / count
        for stage, spec in zip(listed, specs, strict=True)
    ]


@pytest.mark.parametrize("count", [2, 4, 5])
def test_costs_are_the_closed_forms(tiny, count):
    """In units of 2N FLOP per token: N parameters in S stacks, every stage sees the same tokens."""

    def total(mode: str, **changes) -> float:
        keys = {"target_stacks": count, "global_head_blocks": 0, "joint_tuning": False, **changes}
        return 2 * sum(units_of_run(config_of(tiny, mode, **keys), count))

    assert total("append") == pytest.approx(count + 5)
    # The first stage trains the stack next to the head, and nothing else is there.
    assert total("prepend") == pytest.approx(2 * count + 4)
    assert total("independent") == pytest.approx(6)
    config = config_of(
        tiny, "cyclic", target_stacks=count, cycle_sweeps=1, train_embedding="never", train_head="never"
    )
    visits = units_of_run(config, count)
    # A visit to position p: 1 for each frozen stack before it, 3 for itself, 2 for each behind it.
    assert 2 * sum(visits) / count == pytest.approx(3 + 3 / count)


def test_grow_costs_less_by_the_share_of_its_small_rack(tiny):
    config = config_of(tiny, "grow", target_stacks=4, growth_factor=4, growth_at=0.2)
    listed = stages(config)
    small, full = units_of_run(config, 4)
    spent = (
        2
        * sum(s.steps * u for s, u in zip(listed, (small, full), strict=True))
        / sum(s.steps for s in listed)
    )
    assert spent == pytest.approx(6 * (1 - 0.2 + 0.2 / 4))
