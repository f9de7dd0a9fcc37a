"""Optimizers by name: those of torch.optim, and one's own."""

from __future__ import annotations

import pytest
import torch

from stackwise import ConfigError
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.training.optim import Optimizers
from stackwise.training.optim_bytes import state_bytes


def settings(tiny, **changes):
    options = {f"training__optimizer__{key}": value for key, value in changes.items()}
    return tiny(model__d_model=64, model__vocab_size=80, **options)


def make(tiny, **changes) -> tuple[Rack, Optimizers]:
    config = settings(tiny, **changes)
    rack = Rack(rack_spec(config, 1), seed=3)
    stage = Stage("s", 1, ("all",), 10)
    apply_training(rack, trained_units(rack.spec, stage))
    return rack, Optimizers(rack, stage, config.training)


def step(rack: Rack, optimizers: Optimizers) -> None:
    rack(torch.randint(0, 80, (2, 12))).logsumexp(-1).square().mean().backward()
    optimizers.step()


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.0}),
        ("Adafactor", {}),
        ("NAdam", {}),
        ("Adagrad", {}),
        ("ASGD", {}),
        ("AdamW", {"custom_params": {"amsgrad": True}}),
        ("torch.optim:RMSprop", {"custom_params": {"momentum": 0.5}}),
    ],
)
def test_any_optimizer_steps_and_its_moments_are_planned_to_the_byte(tiny, kind, extra):
    rack, optimizers = make(tiny, optimizer_type=kind, **extra)
    before = {n: p.detach().clone() for n, p in rack.named_parameters()}
    step(rack, optimizers)
    assert all(not torch.equal(p, before[n]) for n, p in rack.named_parameters())
    opt = settings(tiny, optimizer_type=kind, **extra).training.optimizer
    state = optimizers.state()
    for name, parameter in rack.named_parameters():
        held = sum(t.nbytes for t in state.get(name, {}).values())
        assert held == sum(state_bytes(kind, "full", tuple(parameter.shape), opt)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_type": "nowhere.at.all:Lion"}, r"optimizer_type: nowhere\.at\.all cannot be imported"),
        ({"optimizer_type": "torch.optim:AdamV"}, r"torch\.optim has no optimizer AdamV.*did you mean 'Adam"),
        ({"optimizer_type": "pathlib:Path"}, "pathlib has no optimizer Path"),
        ({"optimizer_type": "torch.optim:LBFGS"}, "computes the loss several times per step"),
        (
            {"optimizer_type": "Rprop"},
            r"weight_decay: Rprop has no weight decay, got 0\.1; set .*weight_decay=0",
        ),
        ({"optimizer_type": "RAdam", "custom_params": {"nesterov": True}}, "is not accepted by RAdam"),
        (
            {"memory": "int8", "custom_params": {"amsgrad": True}},
            "is not accepted by AdamW with training.optimizer.memory int8",
        ),
    ],
)
def test_optimizers_that_cannot_be_used_are_config_errors(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(tiny, **changes)


def test_an_optimizer_of_ones_own_is_found_by_its_module(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Signs(torch.optim.Optimizer):\n"
        "    def __init__(self, params, lr=1.0, weight_decay=0.0, power=1.0):\n"
        "        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, power=power))\n"
        "    @torch.no_grad()\n"
        "    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n"
        "            for p in group['params']:\n"
        "                p.add_(p.grad.sign(), alpha=-group['lr'] * group['power'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"optimizer_type": "mine:Signs", "custom_params": {"power": 2.0}, "lr": 0.5}
    rack, optimizers = make(tiny, **options)
    before = rack.norm.weight.detach().clone()
    step(rack, optimizers)
    assert ((rack.norm.weight - before).abs() == 1.0).all()
    assert optimizers.state_bytes() == 0
