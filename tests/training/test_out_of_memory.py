"""Memory that runs out anywhere in a run: what is said, and that the run goes on exactly from its last commit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.training import state
from stackwise.training.errors import OutOfMemory
from stackwise.training.loop import Engine
from stackwise.training.memory import is_out_of_memory, smaller_batch
from stackwise.training.run import train

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
]


def quiet(config):
    return train(config, sinks=[])


def hashes(config) -> dict[str, str]:
    commit = Store(Path(config.checkpoint.dir) / config.training.run_id / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def test_what_counts_as_out_of_memory():
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OSError("can't allocate memory"))
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 55)
    assert is_out_of_memory(found.value)


def test_smaller_pieces_make_the_same_step():
    for _ in range(200):
        rows, accumulation = random.randint(1, 96), random.randint(1, 6)
        found = smaller_batch(rows, accumulation)
        if rows == 1:
            assert found is None
            continue
        n, times = found
        assert n < rows
        assert n * times == rows * accumulation
        assert not any(rows * accumulation % m == 0 for m in range(n + 1, rows))


def forward(patch, armed):
    original = Engine._loss
    patch.setattr(Engine, "_loss", lambda self, *args: armed(self) or original(self, *args))


def backward(patch, armed):
    original = torch.Tensor.backward
    patch.setattr(torch.Tensor, "backward", lambda self, *args: armed() or original(self, *args))


def optimizer(patch, armed):
    """In the middle of the update: one tensor has stepped already."""
    original = Engine._apply

    def apply(self, optimizers):
        if self.progress.step == 8:
            with torch.no_grad():
                optimizers.parameters[0].add_(1.0)
        armed(self)
        original(self, optimizers)

    patch.setattr(Engine, "_apply", apply)


def save(patch, armed):
    original = state.parts_of
    patch.setattr(state, "parts_of", lambda engine: armed(engine) or original(engine))


SITES = {
    "the forward pass": (forward, 8, 7),
    "the backward pass": (backward, 8, 7),
    "the optimizer's step": (optimizer, 8, 8),
    "the save": (save, 9, 9),
}
"""How it runs out, the step, and the steps that are counted by then."""


@pytest.mark.parametrize("site", SITES)
def test_it_says_where_and_what_needs_less_and_the_run_goes_on_exactly(tiny, monkeypatch, site):
    arm, step, count = SITES[site]
    engines, error = [], random.choice(ERRORS)

    def armed(engine=None):
        if (engine or engines[-1]).progress.step == count:
            raise error

    original = Engine._train_step

    def watched(self, stage):
        engines.append(self)
        original(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_train_step", watched)
        arm(patch, armed)
        with pytest.raises(OutOfMemory, match=f"out of memory in {site} of step {step}, stage 2") as found:
            quiet(tiny(training__batch_size=4))
    for text in (
        "batches of 4 rows of 16 tokens",
        "B were held. The commit of step 6 is stored",
        "training.batch_size=2 training.gradient_accumulation_steps=2",
        "--allow-change training.batch_size,training.gradient_accumulation_steps",
    ):
        assert text in str(found.value)
    assert Store(Path(tiny().checkpoint.dir) / "tiny" / "store").latest().step == 6
    quiet(tiny(training__batch_size=4))
    whole = tiny(training__batch_size=4, training__run_id="whole")
    quiet(whole)
    assert hashes(tiny()) == hashes(whole)


def test_the_advice_can_be_followed(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        forward(patch, lambda engine: engine.progress.step == 7 and torch.empty(1 << 55))
        with pytest.raises(OutOfMemory):
            quiet(tiny(training__batch_size=4))
    smaller = tiny(training__batch_size=2, training__gradient_accumulation_steps=2)
    result = train(
        smaller, sinks=[], allow_change=["training.batch_size", "training.gradient_accumulation_steps"]
    )
    assert [entry["steps"] for entry in result["training_history"]][:3] == [5, 5, 5]
    assert result["tokens"] == 4 * 16 * result["steps"]
