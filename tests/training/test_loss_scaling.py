"""The loss is scaled wherever gradients pass something that computes in float16, and nowhere else.

A CPU is refused float16 for being slow at it; here it may.
"""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted, NumericError
from stackwise.training.loop import Engine
from stackwise.training.optim import Optimizers
from stackwise.training.run import train

GROW = {"train": ["new", "tail", "norm", "head"], "max_steps": 3}
STAGES = [
    {"train": ["all"], "max_steps": 3},
    {**GROW, "grow": {"op": "append"}, "precision": "half"},
    {**GROW, "grow": {"op": "append"}},
    {"train": ["new"], "grow": {"op": "prepend"}, "max_steps": 3},
]
SCALED = [False, True, False, True]
"""The third reads what the float16 stack gives; the gradients of the fourth pass it on their way to the input side."""


@pytest.fixture(autouse=True)
def _float16_anywhere(monkeypatch):
    monkeypatch.setattr("stackwise.training.device.check_compute", lambda *_: None)


def config_of(tiny, **changes):
    return tiny(training__stages=STAGES, checkpoint__full_precision_backup=False, **changes)


def test_stages_scale_where_gradients_pass_float16(tiny, monkeypatch):
    seen: dict[str, bool] = {}
    finish = Engine._finish

    def watched(self, stage):
        seen[stage.name] = self.scaling
        finish(self, stage)

    monkeypatch.setattr(Engine, "_finish", watched)
    train(config_of(tiny), sinks=[])
    assert list(seen.values()) == SCALED
    seen.clear()
    train(tiny(training__run_id="plain"), sinks=[])
    assert not any(seen.values())


def gradients_of(tiny, monkeypatch, **changes) -> dict[str, torch.Tensor]:
    """Those of the newest stack at the first step of the second stage, as the optimizer gets them."""
    found: dict[str, torch.Tensor] = {}
    apply = Engine._apply

    def watched(self, optimizers):
        if self.progress.stage == 1 and not found:
            found.update(
                {
                    n: p.grad.clone()
                    for n, p in self.rack.named_parameters()
                    if ".s1." in f".{n}" and p.grad is not None
                }
            )
        apply(self, optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_apply", watched)
        train(config_of(tiny, **changes), sinks=[])
    return found


def test_small_gradients_survive_float16(tiny, monkeypatch):
    """A small gain makes them small: unscaled, many are below what float16 can hold."""
    small = {"model__residual_gain": 1e-4, "training__max_grad_norm": 0}

    def error(one, other):
        return sum((one[n] - other[n]).norm() for n in other) / sum(g.norm() for g in other.values())

    scaled = gradients_of(tiny, monkeypatch, training__run_id="scaled", **small)
    with monkeypatch.context() as patch:
        patch.setitem(STAGES[1], "precision", "full")
        exact = gradients_of(tiny, monkeypatch, training__run_id="exact", **small)
    with monkeypatch.context() as patch:
        patch.setattr("stackwise.training.stage_setup.StageSetup.scales", False)
        unscaled = gradients_of(tiny, monkeypatch, training__run_id="unscaled", **small)
    assert exact.keys() == scaled.keys()
    assert error(scaled, exact) < 0.01 < error(unscaled, exact)


@pytest.mark.parametrize("stop", [5, 6, 8, 9, 11])
def test_a_resumed_run_goes_on_with_the_same_scale(tiny, monkeypatch, stop):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=2))
    scales: list[float] = []

    def run(run_id):
        finish = Engine._finish

        def watched(self, stage):
            scales.append(self.scaler.get_scale())
            finish(self, stage)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_finish", watched)
            folder = Path(train(config_of(tiny, training__run_id=run_id), sinks=[])["run_dir"])
        return {name: part.sha256 for name, part in Store(folder / "store").latest().parts.items()}

    whole, expected = run("whole"), scales.copy()
    assert expected == [65536.0, 2 * 65536.0, 2 * 65536.0, 8 * 65536.0]
    scales.clear()
    after = Engine._after_step

    def stopping(self, stage):
        after(self, stage)
        if self.progress.step == stop:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_after_step", stopping)
        with pytest.raises(Interrupted):
            run("parts")
    assert run("parts") == whole
    assert scales[-1] == expected[-1]


@pytest.mark.parametrize(("lasting", "skipped"), [(3, 3), (10**6, None)])
def test_overflow_lowers_the_scale_and_is_no_failure_until_the_scale_is_used_up(
    tiny, monkeypatch, lasting, skipped
):
    """From 2^4 the scale is 1 after four steps; gradients that overflow even then end the run."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=16.0))
    norm, seen = Optimizers.gradient_norm, []

    def overflows(self):
        seen.append(1)
        return norm(self) * (float("inf") if len(seen) <= lasting else 1.0)

    unscale = scaler.unscale_

    def found_inf(self, optimizer):
        unscale(self, optimizer)
        if len(seen) < lasting:
            for held in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                held.fill_(1.0)

    monkeypatch.setattr(Optimizers, "gradient_norm", overflows)
    monkeypatch.setattr(scaler, "unscale_", found_inf)
    config = tiny(training__progressive__enabled=False, training__dtype="float16", training__max_steps=12)
    monkeypatch.setattr("stackwise.training.run.pick_dtype", lambda *_: torch.float16)
    if skipped is None:
        with pytest.raises(NumericError, match=r"step 5, .*gradient norm inf"):
            train(config, sinks=[])
        return
    folder = Path(train(config, sinks=[])["run_dir"])
    store = Store(folder / "store")
    assert store.meta(store.latest())["progress"]["skipped"] == skipped
    assert store.meta(store.latest())["progress"]["guard"]["failed"] == []
