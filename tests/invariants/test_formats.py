"""Runs whose frozen stacks are stored in another format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run

NF4: dict[str, Any] = {
    "training__progressive__trunk_precision": "nf4",
    "training__progressive__joint_tuning": False,
    "checkpoint__keep_last": 50,
}


def commits(result: dict[str, Any]) -> tuple[Store, list]:
    from pathlib import Path

    store = Store(Path(result["run_dir"]) / "store")
    return store, store.commits()


def test_a_stack_is_stored_once_and_never_changes_again(tiny) -> None:
    store, listed = commits(train(tiny(**NF4), sinks=[]))
    formats = [[s["weight_format"] for s in store.meta(c)["rack"]["stacks"]] for c in listed]
    assert formats[0] == ["fp32"]
    assert formats[-1] == ["nf4", "nf4", "fp32"]
    hashes = [c.parts["stack:s0/weights"].sha256 for c in listed if c.step > 5]
    assert len(set(hashes)) == 1, "the first stack is frozen from stage 2 on"
    packed = store.load(listed[-1], "stack:s0/weights")
    assert packed["stacks.s0.blocks.0.attn.q.codes"].dtype == torch.uint8
    assert not any("s0" in part and "optimizer" in part for part in listed[-1].parts)


def test_the_weights_before_rounding_are_kept_and_can_be_put_back(tiny) -> None:
    result = train(tiny(**NF4), sinks=[])
    store, listed = commits(result)
    trained = next(c for c in reversed(listed) if c.pin == "stage-01")
    expected = store.load(trained, "stack:s0/weights")
    opened = open_run(result["run_dir"])
    opened.restore_full_precision("s0")
    found = opened.rack.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [s.weight_format for s in opened.rack.spec.stacks] == ["fp32", "nf4", "fp32"]
    with pytest.raises(ValueError, match="no stack is called 's7'"):
        opened.restore_full_precision("s7")


def test_without_the_backup_only_the_rounded_weights_are_there(tiny) -> None:
    result = train(tiny(checkpoint__full_precision_backup=False, **NF4), sinks=[])
    with pytest.raises(CheckpointError, match="no part 'stack:s0/full_precision'"):
        open_run(result["run_dir"]).restore_full_precision("s0")


def test_a_stack_that_trains_again_starts_from_its_rounded_values(tiny, monkeypatch) -> None:
    seen: dict[str, Any] = {}
    begin = Engine._begin

    def watched(self: Engine, stage: Any) -> None:
        if stage.name == "joint":
            seen["before"] = {s.uid: s.weight_format for s in self.rack.stacks}
            seen["loss"] = self.hooks.evaluate(self.rack)["loss"]  # type: ignore[misc]
        begin(self, stage)
        if stage.name == "joint":
            seen["after"] = {s.uid: s.weight_format for s in self.rack.stacks}
            seen["same"] = self.hooks.evaluate(self.rack)["loss"]  # type: ignore[misc]
            seen["trains"] = all(p.requires_grad for p in self.rack.stacks.parameters())

    monkeypatch.setattr(Engine, "_begin", watched)
    train(tiny(**{**NF4, "training__progressive__joint_tuning": True}), sinks=[])
    assert seen["before"] == {"s0": "nf4", "s1": "nf4", "s2": "fp32"}
    assert set(seen["after"].values()) == {"fp32"}
    assert seen["same"] == pytest.approx(seen["loss"], abs=1e-5)
    assert seen["trains"]


@pytest.mark.parametrize("format", ["bf16", "fp8", "nf4", "nvfp4"])
@pytest.mark.parametrize("stop", [5, 7])
def test_resume_is_exact_with_stored_stacks(tiny, monkeypatch, format: str, stop: int) -> None:
    """Stopped at the end of the first stage, and in the middle of the second."""
    changes = {**NF4, "training__progressive__trunk_precision": format}
    whole = train(tiny(training__run_id="whole", **changes), sinks=[])
    after = Engine._after_step

    def stopping(self: Engine, stage: Any) -> None:
        after(self, stage)
        if self.progress.step == stop:
            if self._saved_step != stop:
                self._save(None)
            raise Interrupted(2, "the test stops here")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_after_step", stopping)
        with pytest.raises(Interrupted):
            train(tiny(training__run_id="cut", **changes), sinks=[])
    resumed = train(tiny(training__run_id="cut", **changes), sinks=[])
    hashes = [
        {name: part.sha256 for name, part in commits(result)[1][-1].parts.items()}
        for result in (whole, resumed)
    ]
    assert hashes[0] == hashes[1]
