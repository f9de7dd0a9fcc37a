"""What a whole run promises: frozen is frozen, resume is exact, the same command gives the same bytes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.training.errors import IncompatibleResumeError, Interrupted, NumericError
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run


def final_hashes(run_dir: str | Path) -> dict[str, str]:
    """Hash of every part of the newest commit: weights and moments."""
    commit = Store(Path(run_dir) / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def quiet(config, **options):
    return train(config, sinks=[], **options)


def losses(run_dir: str | Path) -> list[tuple]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["step"], e["loss"], e["event"]) for e in events if e["event"] in ("step", "eval")]


@pytest.fixture
def stop_after(monkeypatch):
    """Make a run stop, as if by a signal, once it has done `n` steps in all."""

    def arm(n: int) -> None:
        original = Engine._after_step

        def after(self, stage):
            original(self, stage)
            if self.progress.step == n:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Engine, "_after_step", after)

    return arm


def test_same_command_twice_gives_the_same_bytes(tiny):
    a = quiet(tiny(training__run_id="a"))
    b = quiet(tiny(training__run_id="b"))
    assert final_hashes(a["run_dir"]) == final_hashes(b["run_dir"])
    assert losses(a["run_dir"]) == losses(b["run_dir"])
    c = quiet(tiny(training__run_id="c", training__seed=7))
    assert final_hashes(a["run_dir"]) != final_hashes(c["run_dir"])


@pytest.mark.parametrize("how", ["reset", "carry", "copy"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 6, 11, 15, 16])
def test_resume_equals_an_uninterrupted_run(tiny, stop_after, how, n):
    """Stops inside stages, at interval saves (3, 6), at the last step of a stage (5, 15), and in the joint phase."""
    options = {"training__progressive__growth_optimizer": how, "model__dropout": 0.1}
    whole = quiet(tiny(training__run_id="whole", **options))
    stop_after(n)
    with pytest.raises(Interrupted) as stopped:
        quiet(tiny(training__run_id="parts", **options))
    assert stopped.value.exit_code == 143
    rest = quiet(tiny(training__run_id="parts", **options))
    assert rest["resumed_from"] is not None
    assert final_hashes(rest["run_dir"]) == final_hashes(whole["run_dir"])
    assert losses(rest["run_dir"]) == losses(whole["run_dir"])
    keys = ("name", "loss_first", "loss_last", "eval_loss", "tokens", "flops", "bytes")
    assert [[h[k] for k in keys] for h in rest["training_history"]] == [
        [h[k] for k in keys] for h in whole["training_history"]
    ]


def test_kill_without_saving_falls_back_to_the_last_commit_and_ends_the_same(tiny, monkeypatch):
    whole = quiet(tiny(training__run_id="whole"))

    class Killed(BaseException):
        pass

    original = Engine._train_step

    def step(self, stage):
        if self.progress.step == 8:
            raise Killed
        original(self, stage)

    monkeypatch.setattr(Engine, "_train_step", step)
    with pytest.raises(Killed):
        quiet(tiny(training__run_id="parts"))
    monkeypatch.setattr(Engine, "_train_step", original)
    rest = quiet(tiny(training__run_id="parts"))
    assert final_hashes(rest["run_dir"]) == final_hashes(whole["run_dir"])
    assert losses(rest["run_dir"]) == losses(whole["run_dir"])


def test_frozen_tensors_do_not_change_by_a_bit_and_have_no_moments(tiny, monkeypatch):
    seen = []
    begin, finish = Engine._set_up, Engine._finish

    def watch_begin(self, stage, *rest):
        begin(self, stage, *rest)
        frozen = {n: p.detach().clone() for n, p in self.rack.named_parameters() if not p.requires_grad}
        self.watched = frozen

    def watch_finish(self, stage):
        now = dict(self.rack.named_parameters())
        moments = self.optimizers.state()
        for name, before in self.watched.items():
            assert torch.equal(now[name], before), name
            assert now[name].grad is None
            assert name not in moments
        trained = {n for n, p in now.items() if p.requires_grad}
        assert set(moments) == trained
        seen.append((stage.name, len(self.watched), len(trained)))
        finish(self, stage)

    monkeypatch.setattr(Engine, "_set_up", watch_begin)
    monkeypatch.setattr(Engine, "_finish", watch_finish)
    quiet(tiny())
    assert [name for name, *_ in seen] == ["stack 1", "stack 2", "stack 3", "joint"]
    assert seen[0][1] == 0
    assert seen[2][1] > seen[1][1] > 0
    assert seen[3][1] == 0


def test_frozen_parts_are_stored_once(tiny):
    result = quiet(tiny(checkpoint__keep_last=50, training__progressive__joint_tuning=False))
    commits = Store(Path(result["run_dir"]) / "store").commits()
    last = [c for c in commits if c.step > 10]
    assert len({c.parts["stack:s0/weights"].sha256 for c in last}) == 1
    assert len({c.parts["stack:s2/weights"].sha256 for c in last}) == len(last)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD"])
def test_accumulation_does_not_change_the_step(tiny, optimizer):
    """4 micro-batches of 3 rows step like one batch of 12, also when documents leave them unlike numbers of targets."""
    options = {
        "training__optimizer__optimizer_type": optimizer,
        "training__progressive__enabled": False,
        "training__max_steps": 3,
        "data__shuffle": False,
    }
    one = quiet(tiny(training__run_id="one", training__batch_size=12, **options))
    many = quiet(tiny(training__run_id="many", training__gradient_accumulation_steps=4, **options))
    a, b = open_run(one["run_dir"]).rack.state_dict(), open_run(many["run_dir"]).rack.state_dict()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=2e-4 if optimizer == "Muon" else 2e-5, rtol=1e-4)


def test_accumulated_gradients_equal_the_single_batch(tiny, monkeypatch):
    grads = {}
    original = Engine._apply

    def keep(self, optimizers):
        run_id = self.config.training.run_id
        grads.setdefault(run_id, {n: p.grad.clone() for n, p in self.rack.named_parameters()})
        original(self, optimizers)

    monkeypatch.setattr(Engine, "_apply", keep)
    options = {
        "training__progressive__enabled": False,
        "training__max_steps": 1,
        "training__max_grad_norm": 0,
    }
    quiet(tiny(training__run_id="one", training__batch_size=12, **options))
    quiet(tiny(training__run_id="many", training__gradient_accumulation_steps=4, **options))
    for name, grad in grads["one"].items():
        torch.testing.assert_close(grads["many"][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.7, 1.5])
def test_gradients_above_the_limit_are_scaled_to_it_and_others_are_left_alone(tiny, monkeypatch, share):
    norms = []
    original = Engine._apply

    def keep(self, optimizers):
        gradients = torch.cat([p.grad.flatten() for p in self.rack.parameters() if p.grad is not None])
        norms.append(gradients.norm().item())
        original(self, optimizers)

    monkeypatch.setattr(Engine, "_apply", keep)
    options = {"training__progressive__enabled": False, "training__max_steps": 1}
    quiet(tiny(training__run_id="free", training__max_grad_norm=0, **options))
    limit = share * norms[0]
    quiet(tiny(training__run_id="clipped", training__max_grad_norm=limit, **options))
    assert norms[1] == pytest.approx(min(limit, norms[0]), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_place_and_changes_nothing(tiny, monkeypatch):
    original = Engine._loss

    def broken(self, *args):
        loss = original(self, *args)
        return loss * float("nan") if self.progress.step == 6 else loss

    monkeypatch.setattr(Engine, "_loss", broken)
    with pytest.raises(NumericError, match=r"step 7, stage 2 \(stack 2\), learning rate"):
        quiet(tiny())
    monkeypatch.setattr(Engine, "_loss", original)
    run = open_run(tiny().checkpoint.dir + "/tiny")
    assert run.commit.step == 6
    assert all(p.isfinite().all() for p in run.rack.parameters())


def test_nonfinite_steps_can_be_skipped_and_are_counted(tiny, monkeypatch):
    original = Engine._loss

    def broken(self, *args):
        loss = original(self, *args)
        return loss * float("inf") if self.progress.step in (1, 6) else loss

    monkeypatch.setattr(Engine, "_loss", broken)
    result = quiet(tiny(training__on_nonfinite="skip"))
    notes = [
        json.loads(line)["message"]
        for line in (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        if '"note"' in line
    ]
    skipped = [note for note in notes if "skipped step" in note]
    assert len(skipped) == 2
    assert "(2 so far)" in skipped[-1]


def test_another_config_does_not_continue_a_run(tiny):
    quiet(tiny())
    with pytest.raises(IncompatibleResumeError, match=r"training\.optimizer\.lr: 0\.003 there, 0\.01 here"):
        quiet(tiny(training__optimizer__lr=0.01))
    quiet(tiny(training__optimizer__lr=0.01, checkpoint__overwrite=True))


def test_gradient_checkpointing_changes_nothing_but_memory(tiny):
    a = quiet(tiny(training__run_id="a", model__architecture__blocks_per_stack=2))
    b = quiet(
        tiny(
            training__run_id="b",
            model__architecture__blocks_per_stack=2,
            training__gradient_checkpointing=True,
        )
    )
    assert losses(a["run_dir"]) == losses(b["run_dir"])
    held = [h["bytes"]["activations"] for h in a["training_history"]]
    less = [h["bytes"]["activations"] for h in b["training_history"]]
    assert all(y < 0.8 * x for x, y in zip(held, less, strict=True))


def test_every_stage_lowers_memory_of_gradients_and_moments_against_the_joint_phase(tiny):
    history = quiet(tiny(model__architecture__blocks_per_stack=2))["training_history"]
    append, joint = history[2]["bytes"], history[3]["bytes"]
    assert append["parameters"] == joint["parameters"]
    for item in ("gradients", "moments", "activations"):
        assert append[item] < 0.75 * joint[item]
