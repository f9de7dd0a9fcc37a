"""The numerics guard: what it decides, and what a run makes of it."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch

from stackwise import ConfigError, ProgressiveRackBuilder, create_rack_from_config
from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted, NumericError
from stackwise.training.finite import not_finite
from stackwise.training.guard import LEVEL, MANY, RECENT, Guard, GuardState
from stackwise.training.loop import Engine
from stackwise.training.progress import Progress
from stackwise.training.run import train
from stackwise.training.settings import TrainingSettings
from stackwise.training.stored import open_run
from stackwise.training.trainers import ProgressiveTrainer


def guard(state: GuardState | None = None, **settings) -> Guard:
    return Guard(TrainingSettings(**settings), state or GuardState())


def actions(held: Guard, losses: list[float], first: int = 1) -> list[str]:
    return [held.judge(step, loss, 1.0).action for step, loss in enumerate(losses, first)]


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
@pytest.mark.parametrize(
    ("policy", "first", "after_many"),
    [("stop", "stop", "stop"), ("skip", "skip", "stop"), ("rollback", "skip", "rollback")],
)
def test_what_is_not_finite_is_left_out_and_many_of_it_are_no_accident(bad, policy, first, after_many):
    held = guard(on_nonfinite=policy)
    found = [held.judge(step, *bad).action for step in range(1, MANY + 2)]
    assert found == [first] * MANY + [after_many]
    assert held.state.window == []


def test_only_recent_failures_count():
    held = guard(on_nonfinite="rollback")
    apart = RECENT // MANY + 1
    assert {held.judge(step, math.nan, 1.0).action for step in range(1, 60 * apart, apart)} == {"skip"}
    assert len(held.state.failed) <= MANY


def test_fused_goes_back_at_the_first_failure():
    held = guard(on_nonfinite="rollback", optimizer={"memory": "fused"})
    assert held.judge(1, math.nan, 1.0).action == "rollback"


def test_going_back_ends_after_three_times():
    held, found = guard(spike_policy="rollback", spike_window=8), []
    for attempt in range(5):
        held.state.window = [1.0, 1.1, 0.9, 1.05]
        found.append(held.judge(100 + attempt, 50.0, 1.0).action)
        held.state.went_back(100 + attempt, held.state, [])
    assert found == ["rollback"] * 3 + ["stop"] * 2
    assert held.judge(100 + 2 * RECENT, 50.0, 1.0).action == "rollback"


@pytest.mark.parametrize("window", [4, 16, 128])
def test_a_spike_is_a_loss_beyond_sigma_deviations_of_the_window(window):
    rng = random.Random(window)
    losses = [rng.gauss(3.0, 0.1) for _ in range(window)]
    mean = sum(losses) / window
    deviation = torch.tensor(losses, dtype=torch.float64).std().item()
    for sigma in (2.0, 6.0):
        held = guard(spike_policy="skip", spike_window=window, spike_sigma=100.0)
        assert set(actions(held, [rng.gauss(3, 1) for _ in range(5)] + losses)) == {"apply"}
        held.settings.spike_sigma = sigma
        assert held.limit() == pytest.approx(mean + sigma * deviation, rel=1e-12)
        before = list(held.state.window)
        assert held.judge(999, held.limit() + 1e-9, 1.0).action == "skip"
        assert held.state.window == before
        assert held.judge(999, held.limit(), 1.0).action == "apply"
        assert held.state.window == [*before[1:], held.state.window[-1]]


def test_nothing_is_a_spike_before_half_of_the_window_is_there_or_with_the_policy_off():
    held = guard(spike_policy="skip", spike_window=20)
    assert actions(held, [1.0, 1.1] * 4 + [1.0, 90.0]) == ["apply"] * 10
    assert actions(guard(spike_window=4), [1.0, 1.1, 1.0, 1.1, 90.0]) == ["apply"] * 5
    assert actions(guard(spike_window=4, spike_policy="skip"), [1.0, 1.1, 1.0, 1.1, 90.0])[-1] == "skip"


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_one_bad_value_spoils_no_later_decision(policy):
    held = guard(spike_policy=policy, spike_window=16, on_nonfinite="skip")
    losses = [2.0 + 0.01 * (i % 5) for i in range(40)]
    expected = [held.judge(i, loss, 1.0) for i, loss in enumerate(losses)]
    other = guard(spike_policy=policy, spike_window=16, on_nonfinite="skip")
    seen = []
    for i, loss in enumerate(losses):
        if i in (20, 21, 30):
            other.judge(i, math.nan if i == 21 else 100.0, 1.0)
        seen.append(other.judge(i, loss, 1.0))
    assert seen == expected
    assert other.state.window == held.state.window


def test_a_lasting_rise_is_a_new_level():
    held = guard(spike_policy="skip", spike_window=8)
    actions(held, [1.0, 1.1] * 8)
    assert actions(held, [5.0, 5.1] * 8) == ["skip"] * LEVEL + ["apply"] * 6
    assert held.limit() < 7.0


def test_the_state_survives_json_to_the_last_bit():
    held = guard(spike_policy="warn", spike_window=32)
    rng = random.Random()
    actions(held, [rng.random() for _ in range(50)])
    progress = Progress(guard=held.state)
    again = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert again == progress
    assert guard(again.guard, spike_policy="warn", spike_window=32).limit() == held.limit()
    assert Progress.from_dict({"step": 3}).guard == GuardState()  # a commit from before the guard


def test_not_finite_names_the_tensors():
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    good = torch.randn(7, 9, generator=generator)
    huge = torch.full((300,), 3e38)  # finite, though its sum is not
    tensors = {
        "good": good,
        "huge": huge,
        "whole": torch.tensor([1]),
        "half": good.bfloat16(),
        "none": good[:0],
    }
    assert not_finite(tensors.items()) == []
    for bad in (math.nan, math.inf, -math.inf):
        for name in ("good", "half"):
            spoilt = {**tensors, name: tensors[name].clone()}
            spoilt[name].view(-1)[int(torch.randint(63, (1,), generator=generator))] = bad
            assert not_finite(spoilt.items()) == [name]


# --- runs -----------------------------------------------------------------------------------------------------------


ONE = {"training__progressive__enabled": False, "training__max_steps": 24, "evaluation__batches": 1}


def quiet(config, **options):
    return train(config, sinks=[], **options)


def events(run_dir, kind: str) -> list[dict]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def notes(run_dir) -> list[str]:
    return [e["message"] for e in events(run_dir, "note")]


def final_state(run_dir) -> tuple[dict[str, str], dict]:
    store = Store(Path(run_dir) / "store")
    commit = store.latest()
    progress = store.meta(commit)["progress"]
    kept = {name: progress[name] for name in ("step", "skipped", "stage_batches", "tokens")}
    guard = {name: progress["guard"][name] for name in ("window", "failed", "rollbacks")}
    return {name: part.sha256 for name, part in commit.parts.items()}, {**kept, **guard}


@pytest.fixture
def spoil(monkeypatch):
    """Make losses bad, by the cursor of the loader behind the batch: whoever meets that batch gets the value."""

    def arm(values: dict[int, float]) -> None:
        original = Engine._loss

        def spoilt(self, *args):
            loss = original(self, *args)
            at = self.loader.state_dict()["cursor"] // self.loader.batch_size
            return loss * values[at] if at in values else loss

        monkeypatch.setattr(Engine, "_loss", spoilt)

    return arm


@pytest.fixture
def stop_after(monkeypatch):
    original = Engine._after_step

    def arm(n: int | None) -> None:
        def after(self, stage):
            original(self, stage)
            if self.progress.step == n:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Engine, "_after_step", after)

    return arm


OPTIMIZERS = {
    "full": {},
    "muon": {"training__optimizer__optimizer_type": "Muon"},
    "host": {"training__optimizer__state_device": "host"},
    "int8": {"training__optimizer__memory": "int8", "model__d_model": 64},
    "int8_nomaster": {"training__optimizer__memory": "int8_nomaster", "model__d_model": 64},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_changes_no_bit_of_weights_moments_and_counters(tiny, monkeypatch, spoil, kind):
    seen = []
    original = Engine._train_step

    def state(engine):
        tensors = dict(engine.rack.named_parameters())
        for name, held in engine.optimizers.state().items():
            tensors |= {f"{name}::{moment}": tensor for moment, tensor in held.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def watched(self, stage):
        before = state(self) if self.progress.step in (2, 5) else None
        cursor = self.loader.state_dict()["cursor"]
        original(self, stage)
        if before is not None:
            after = state(self)
            assert all(p.grad is None for p in self.rack.parameters())
            assert self.loader.state_dict()["cursor"] > cursor
            same = after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
            seen.append((self.progress.step, same))

    monkeypatch.setattr(Engine, "_train_step", watched)
    spoil({3: random.choice([math.nan, math.inf])})
    result = quiet(
        tiny(**{**ONE, "training__max_steps": 7, **OPTIMIZERS[kind]}, training__on_nonfinite="skip")
    )
    assert seen == [(3, True), (6, False)]
    assert Store(Path(result["run_dir"]) / "store").latest().step == 7
    assert [n for n in notes(result["run_dir"]) if "skipped step 3" in n]


def test_gradients_alone_may_be_bad(tiny, monkeypatch):
    def hurt(self, *args):
        loss = Engine.__dict__["_was"](self, *args)
        if self.progress.step == 4:
            weight = next(p for p in self.rack.parameters() if p.requires_grad)
            weight.register_hook(lambda grad: grad * math.nan if self.progress.step == 4 else grad)
        return loss

    monkeypatch.setattr(Engine, "_was", Engine._loss, raising=False)
    monkeypatch.setattr(Engine, "_loss", hurt)
    result = quiet(tiny(**ONE, training__on_nonfinite="skip"))
    assert [n for n in notes(result["run_dir"]) if "skipped step 5" in n and "gradient norm nan" in n]


GO_BACK = {**ONE, "checkpoint__keep_last": 50, "checkpoint__save_interval": 2}


@pytest.mark.parametrize("stop", [9, 15])
def test_many_failures_go_back_and_the_data_is_skipped(tiny, spoil, stop_after, stop):
    """Batches 5 to 15 are bad: eleven failures, so back to step 14, whose commit has the weights of step 4."""
    spoil(dict.fromkeys(range(5, 16), math.nan))
    config = {**GO_BACK, "training__on_nonfinite": "rollback"}
    whole = quiet(tiny(**config, training__run_id="whole"))
    found = [n for n in notes(whole["run_dir"]) if "Went back to the commit of step 14" in n]
    assert len(found) == 1
    assert "step 15" in found[0]
    assert "11 of the last 1,000" in found[0]
    state, progress = final_state(whole["run_dir"])
    assert progress["step"] == 24
    assert progress["stage_batches"] == 25
    assert progress["rollbacks"] == [15]
    steps = [e["step"] for e in events(whole["run_dir"], "step")]
    assert steps == list(range(1, 25))
    stop_after(stop)
    with pytest.raises(Interrupted):
        quiet(tiny(**config, training__run_id="parts"))
    stop_after(None)
    rest = quiet(tiny(**config, training__run_id="parts"))
    assert final_state(rest["run_dir"]) == (state, progress)


SPIKES = {**GO_BACK, "training__spike_window": 4, "training__spike_sigma": 8.0, "training__rollback_steps": 5}


def test_a_spike_goes_back_so_many_steps_and_skips_what_lies_between(tiny, spoil):
    config = {**SPIKES, "training__spike_policy": "rollback"}
    clean = quiet(tiny(**config, training__run_id="clean"))
    assert not [n for n in notes(clean["run_dir"]) if "spikes" in n]
    spoil({11: 50.0})
    result = quiet(tiny(**config))
    (note,) = [n for n in notes(result["run_dir"]) if "spikes" in n]
    assert "step 11" in note
    assert "commit of step 6" in note
    _, progress = final_state(result["run_dir"])
    assert progress["stage_batches"] == 24 + 5
    assert progress["step"] == 24
    assert progress["rollbacks"] == [11]
    commits = Store(Path(result["run_dir"]) / "store").commits()
    assert [c.step for c in commits][:7] == [2, 4, 6, 8, 10, 6, 8]
    # the run that goes back does what a run would that had never seen these batches
    last = [e["loss"] for e in events(result["run_dir"], "step")]
    first = [e["loss"] for e in events(clean["run_dir"], "step")]
    assert last[:6] == first[:6]
    assert last[6] != first[6]


@pytest.mark.parametrize(("policy", "stop"), [("skip", 10), ("skip", 12), ("rollback", 12)])
def test_spikes_are_met_alike_after_a_resume(tiny, spoil, stop_after, policy, stop):
    spoil({11: 50.0, 18: 40.0})
    config = {**SPIKES, "training__spike_policy": policy}
    whole = quiet(tiny(**config, training__run_id="whole"))
    assert [n for n in notes(whole["run_dir"]) if "spikes" in n]
    stop_after(stop)
    with pytest.raises(Interrupted):
        quiet(tiny(**config, training__run_id="parts"))
    stop_after(None)
    rest = quiet(tiny(**config, training__run_id="parts"))
    assert final_state(rest["run_dir"]) == final_state(whole["run_dir"])


def test_going_back_finds_its_commit_however_few_are_kept(tiny, spoil):
    spoil({19: 50.0})
    few = {"checkpoint__keep_last": 1, "training__rollback_steps": 9, "training__spike_policy": "rollback"}
    result = quiet(tiny(**{**SPIKES, **few}))
    (note,) = [n for n in notes(result["run_dir"]) if "spikes" in n]
    assert "step 19" in note
    assert "commit of step 10" in note


@pytest.mark.parametrize("mode", ["append", "cyclic", "independent"])
def test_going_back_before_the_first_commit_of_a_stage_starts_the_stage_with_later_data(
    tiny, monkeypatch, mode
):
    """The end of the stage before is the commit; the batches that hurt are left out once the stage begins again."""
    drawn, failed, step = [], [], Engine._train_step

    def failing(self, stage):
        if self.progress.stage == 1 and self.progress.stage_step == 0:
            drawn.append(self.loader.state_dict()["cursor"])
        step(self, stage)
        if self.progress.stage == 1 and self.progress.stage_step == 2 and not failed:
            failed.append(self.progress.step)
            self._end(stage, self.guard._go_back(self.progress.step, "as a test wants it"), {})

    monkeypatch.setattr(Engine, "_train_step", failing)
    config = tiny(
        training__progressive__building_mode=mode,
        checkpoint__save_interval=100,
        **({"model__dropout": 0.0} if mode != "cyclic" else {"training__progressive__cycle_steps": 4}),
    )
    result = quiet(config)
    assert len(drawn) == 2
    assert drawn[1] - drawn[0] == 2 * config.training.batch_size
    assert result["training_history"][1]["steps"] > 2


def test_a_run_without_a_commit_to_go_back_to_stops_and_keeps_the_facts(tiny, spoil):
    spoil(dict.fromkeys(range(1, 30), math.nan))
    config = tiny(**{**GO_BACK, "checkpoint__save_interval": 100}, training__on_nonfinite="rollback")
    with pytest.raises(NumericError, match="no commit of this stage to go back to"):
        quiet(config)


def test_it_stops_after_three_times_with_the_facts(tiny, spoil):
    spoil(dict.fromkeys(range(5, 200), math.nan))
    with pytest.raises(NumericError, match=r"going back 3 times has not helped.*The facts are in") as error:
        quiet(tiny(**{**GO_BACK, "training__max_steps": 60}, training__on_nonfinite="rollback"))
    assert error.value.exit_code == 5
    folder = Path(str(error.value).split("The facts are in ")[1].split(". ")[0])
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["loss"] == "nan"
    assert len(facts["rollbacks"]) == 3
    assert len(facts["batches"][0]["sample_ids"]) == 3
    assert facts["gradients_not_finite"]
    assert facts["weights_not_finite"] == []
    assert facts["environment"]["packages"]["torch"]
    assert (folder / "config.yaml").read_text() == (folder.parent.parent / "config.yaml").read_text()


def test_stopping_names_the_batch(tiny, spoil):
    spoil({8: math.nan})
    config = tiny(**ONE, training__gradient_accumulation_steps=2)
    with pytest.raises(NumericError, match="commit of step 3 is intact") as error:
        quiet(config)
    facts = json.loads((Path(config.checkpoint.dir) / "tiny/failures/step-000000004/facts.json").read_text())
    assert [len(batch["sample_ids"]) for batch in facts["batches"]] == [3, 3]
    assert facts["step"] == 4
    assert facts["stage_name"] == "end to end"
    assert "failures/step-000000004" in str(error.value)


def test_weights_that_are_not_finite_are_never_saved(tiny, monkeypatch):
    apply = Engine._apply

    name = next(n for n in open_names(tiny) if n.endswith("weight") and ".0." in n)

    def hurt(self, optimizers):
        apply(self, optimizers)
        if self.progress.step == 9:
            with torch.no_grad():
                dict(self.rack.named_parameters())[name].view(-1)[5] = math.inf

    monkeypatch.setattr(Engine, "_apply", hurt)
    config = tiny(**ONE)
    with pytest.raises(NumericError, match=name.replace(".", r"\.") + ".* would be saved"):
        quiet(config)
    run = open_run(Path(config.checkpoint.dir) / "tiny")
    assert run.commit.step == 6


def open_names(tiny) -> list[str]:
    return [n for n, _ in create_rack_from_config(tiny(**ONE, model__vocab_size=60)).named_parameters()]


def test_a_moment_that_is_not_finite_goes_back_where_asked(tiny, monkeypatch):
    apply, done = Engine._apply, []

    def hurt(self, optimizers):
        apply(self, optimizers)
        if self.progress.step == 12 and not done:
            done.append(next(iter(optimizers.state().values()))["exp_avg"].fill_(math.nan))

    monkeypatch.setattr(Engine, "_apply", hurt)
    result = quiet(tiny(**ONE, training__on_nonfinite="rollback", checkpoint__save_interval=4))
    assert [n for n in notes(result["run_dir"]) if "Went back to the commit of step 8" in n]
    assert final_state(result["run_dir"])[1]["step"] == 24


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_fused_ends_or_goes_back_with_the_first_bad_gradient(tiny, spoil, policy):
    fused = {
        "training__optimizer__memory": "fused",
        "training__max_grad_norm": 0,
        "training__on_nonfinite": policy,
        "checkpoint__keep_last": 50,
    }
    spoil({8: math.nan})
    config = tiny(**ONE, **fused)
    if policy == "stop":
        with pytest.raises(NumericError):
            quiet(config)
        assert open_run(Path(config.checkpoint.dir) / "tiny").commit.step == 6
        return
    result = quiet(config)
    _, progress = final_state(result["run_dir"])
    assert progress["rollbacks"] == [8]
    assert progress["stage_batches"] == 26
    assert progress["skipped"] == 0


def test_computing_twice_finds_hardware_that_errs(tiny, monkeypatch):
    loss, calls = Engine._loss, []

    def wrong(self, *args):
        calls.append(self.progress.step)
        value = loss(self, *args)
        return value * 30 if self.progress.step == 20 and calls.count(20) == 1 else value

    config = {**SPIKES, "training__spike_policy": "warn", "training__deterministic": True}
    monkeypatch.setattr(Engine, "_loss", wrong)
    quiet(tiny(**config))
    assert calls.count(20) == 1
    calls.clear()
    with pytest.raises(NumericError, match=r"the hardware is suspect.*another machine"):
        quiet(tiny(**config, training__recheck=True, training__run_id="again"))


@pytest.mark.parametrize("cache", [True, False])
def test_computing_twice_changes_nothing_where_it_agrees(tiny, spoil, cache):
    spoil({8: 50.0, 13: 50.0})
    config = {
        **SPIKES,
        "training__progressive__enabled": True,
        "training__max_steps": 10,
        "training__spike_policy": "warn",
        "training__deterministic": True,
        "training__progressive__cache_activations": cache,
        "model__dropout": 0.0 if cache else 0.1,
        "training__gradient_accumulation_steps": 2,
    }
    found = [
        quiet(tiny(**config, training__recheck=again, training__run_id=f"r{again}"))
        for again in (False, True)
    ]
    assert final_state(found[0]["run_dir"]) == final_state(found[1]["run_dir"])


def test_a_loader_of_ones_own_has_no_commits_to_go_back_to(tiny):
    builder = ProgressiveRackBuilder(tiny(model__vocab_size=60))
    batches = [{"input_ids": torch.randint(0, 60, (2, 8))}]
    trainer = ProgressiveTrainer(tiny(training__spike_policy="rollback"))
    with pytest.raises(ConfigError, match=r"training\.spike_policy.*makes none"):
        trainer.train_rack(builder, batches, target_stacks=1)
