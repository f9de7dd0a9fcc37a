"""Optimizers and schedules against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stackwise import ConfigError
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.training.muon import Muon, orthogonalise
from stackwise.training.optim import Optimizers, carried, is_block_matrix
from stackwise.training.schedule import lr_factor


def make(tiny, trains=("all",), n_stacks=2, stage_options=None, **changes):
    config = tiny(model__vocab_size=31, **changes)
    rack = Rack(rack_spec(config, n_stacks))
    stage = Stage("s", n_stacks, trains, 10, **(stage_options or {}))
    apply_training(rack, trained_units(rack.spec, stage))
    return rack, Optimizers(rack, stage, config.training)


def groups(optimizers: Optimizers) -> dict[str, dict]:
    return {
        optimizers.names[p]: {**group, "kind": type(o).__name__}
        for o in optimizers.optimizers
        for group in o.param_groups
        for p in group["params"]
    }


def test_every_trainable_parameter_is_covered_once_and_no_other(tiny):
    rack, optimizers = make(tiny, ("new", "tail", "norm", "head"))
    covered = groups(optimizers)
    assert set(covered) == {n for n, p in rack.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("embedding", "stacks.s0")) for name in covered)


def test_muon_takes_the_matrices_of_blocks_and_adam_the_rest(tiny):
    options = {
        "training__optimizer__optimizer_type": "Muon",
        "training__optimizer__lr": 0.02,
        "training__optimizer__adam_lr": 0.005,
        "model__short_conv": 3,
    }
    rack, optimizers = make(tiny, **options)
    for name, group in groups(optimizers).items():
        matrix = "attn." in name or "ffn." in name
        assert matrix == is_block_matrix(name, dict(rack.named_parameters())[name]), name
        assert (group["kind"], group["lr"]) == (("Muon", 0.02) if matrix else ("AdamW", 0.005)), name


def test_norms_biases_embeddings_and_convolutions_do_not_decay(tiny):
    _, optimizers = make(tiny, model__bias=True, model__short_conv=2)
    for name, group in groups(optimizers).items():
        free = "norm" in name or name.endswith("bias") or name.startswith("embedding") or "_conv" in name
        assert group["weight_decay"] == (0.0 if free else 0.1), name


def test_new_stack_and_trunk_have_their_own_rates(tiny):
    _, optimizers = make(tiny, ("all",), stage_options={"lr": 0.5, "trunk_lr": 0.25})
    rates = {name: group["lr"] for name, group in groups(optimizers).items()}
    assert rates["stacks.s1.blocks.0.attn.q.weight"] == 0.5
    assert rates["stacks.s0.blocks.0.attn.q.weight"] == 0.25
    assert rates["head.weight"] == rates["tail.0.attn.q.weight"] == 3e-3


def test_embedding_tail_norm_and_head_share_the_rate_of_input_and_output(tiny):
    _, optimizers = make(tiny, ("all",), stage_options={"lr": 0.5, "io_lr": 0.125})
    for name, group in groups(optimizers).items():
        inside = name.startswith("stacks.")
        assert group["lr"] == (0.5 if "stacks.s1" in name else 3e-3 if inside else 0.125), name


def test_groups_override_rates_and_an_unmatched_one_is_an_error(tiny):
    _, optimizers = make(
        tiny, training__optimizer__groups=[{"match": "^head", "lr": 0.7, "weight_decay": 0.3}]
    )
    head = groups(optimizers)["head.weight"]
    assert (head["lr"], head["weight_decay"]) == (0.7, 0.3)
    with pytest.raises(ConfigError, match=r"groups\.0\.match.*matches no parameter"):
        make(tiny, training__optimizer__groups=[{"match": "haed", "lr": 1.0}])


def test_an_option_the_optimizer_does_not_know_is_a_config_error(tiny):
    with pytest.raises(ConfigError, match=r"custom_params.*is not accepted by AdamW"):
        make(tiny, training__optimizer__custom_params={"nesterovs": True})


def test_state_goes_by_name_and_is_reset_carried_or_copied(tiny):
    rack, optimizers = make(tiny)
    rack(torch.randint(0, 31, (2, 8))).sum().backward()
    optimizers.step()
    state = optimizers.state()
    new = "stacks.s1.blocks.0.attn.q.weight"
    old = "stacks.s0.blocks.0.attn.q.weight"
    copies = {"stacks.s1.blocks.0.": "stacks.s0.blocks.0."}
    assert carried(state, "reset", copies) == {}
    without = {n: m for n, m in state.items() if not n.startswith("stacks.s1")}
    assert carried(without, "carry", copies).keys() == without.keys()
    copied = carried(without, "copy", copies)
    assert torch.equal(copied[new]["exp_avg"], state[old]["exp_avg"])
    _, fresh = make(tiny)
    fresh.load(state)
    loaded = fresh.state()
    assert all(torch.equal(loaded[n][k], state[n][k]) for n in state for k in state[n])


def test_orthogonalise_flattens_the_singular_values():
    x = torch.randn(3, 24, 40)
    singular = torch.linalg.svdvals(orthogonalise(x, dtype=torch.float32))
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        (u @ vt).flatten(1), orthogonalise(x, dtype=torch.float32).flatten(1)
    )
    assert (cosine > 0.97).all()


def test_muon_step_equals_its_formula_for_tall_and_wide_matrices():
    for shape in ((6, 10), (10, 6), (8, 8)):
        p = torch.nn.Parameter(torch.randn(shape))
        before, momentum = p.detach().clone(), torch.zeros(shape)
        muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.2)
        for _ in range(3):
            p.grad = torch.randn(shape)
            momentum.lerp_(p.grad, 0.1)
            update = p.grad.lerp(momentum, 0.9)
            wide = shape[0] <= shape[1]
            direction = orthogonalise((update if wide else update.mT)[None])[0].float()
            direction = direction if wide else direction.mT
            before = before * (1 - 0.1 * 0.2) - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * direction
            muon.step()
            torch.testing.assert_close(p.detach(), before, atol=2e-3, rtol=2e-3)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_and_end_where_they_say(kind):
    factors = [lr_factor(i, 100, kind=kind, warmup=10, min_ratio=0.1, decay_fraction=0.3) for i in range(100)]
    assert all(a < b for a, b in itertools.pairwise(factors[:11]))
    assert factors[10] == pytest.approx(1.0, abs=0.02)
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    if kind == "wsd":
        assert factors[69] == 1.0 > factors[70]
    if kind == "cosine":
        assert factors[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)), abs=1e-9)


def test_schedule_of_a_stage_shorter_than_its_warm_up_only_rises():
    assert [lr_factor(i, 2, warmup=3) for i in range(2)] == [0.25, 0.5]
