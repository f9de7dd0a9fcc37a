"""What a run whose objective hides tokens promises: resume, caches, growth, and tuning of another objective's weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.config.errors import ConfigError
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run

BERT = {"model__attention_preset": "bert_style"}
OBJECTIVE = "training__progressive__training_objective"


def quiet(config):
    return train(config, sinks=[])


def parts(run_dir: str | Path) -> dict[str, str]:
    commit = Store(Path(run_dir) / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def step_losses(run_dir: str | Path) -> list[float]:
    events = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("objective", ["mlm", "diffusion"])
def test_a_run_grows_resumes_exactly_and_leaves_the_trunk_alone(tiny, monkeypatch, objective):
    options = {**BERT, OBJECTIVE: objective, "training__progressive__joint_tuning": False}
    whole = quiet(tiny(**options, training__run_id="whole"))
    original = Engine._after_step

    def after(self, stage):
        original(self, stage)
        if self.progress.step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_after_step", after)
        with pytest.raises(Interrupted):
            quiet(tiny(**options, training__run_id="cut"))
    resumed = quiet(tiny(**options, training__run_id="cut"))
    assert resumed["resumed_from"] is not None
    assert parts(whole["run_dir"]) == parts(resumed["run_dir"])
    assert step_losses(whole["run_dir"]) == step_losses(resumed["run_dir"])


@pytest.mark.parametrize("objective", ["mlm", "diffusion"])
def test_stored_outputs_change_no_loss_where_corruptions_come_again(tiny, objective):
    options = {
        **BERT,
        OBJECTIVE: objective,
        "objective__mask_draws": 2,
        "training__max_steps": 12,
        "data__eval_fraction": 0.9,  # few rows, so that every draw of them comes again
        "training__progressive__cache_dtype": "float32",
        "training__progressive__joint_tuning": False,
        "training__progressive__time_interpretation": "none",
    }
    runs = [
        quiet(tiny(**options, training__run_id=f"cache-{on}", training__progressive__cache_activations=on))
        for on in (True, False)
    ]
    assert parts(runs[0]["run_dir"]) == parts(runs[1]["run_dir"])
    assert step_losses(runs[0]["run_dir"]) == step_losses(runs[1]["run_dir"])


def test_fresh_corruptions_are_never_stored(tiny, tmp_path):
    told = []
    options = {**BERT, OBJECTIVE: "mlm", "training__progressive__cache_activations": True}
    train(
        tiny(**options),
        sinks=[type("Sink", (), {"emit": lambda self, e: told.append(e), "close": lambda self: None})()],
    )
    notes = [event["message"] for event in told if event["event"] == "note"]
    assert any("corrupts a sample anew at every visit" in note for note in notes)


def test_micro_batches_do_not_change_the_loss(tiny):
    # rows of diffusion weigh by their tokens, not by how many of them are hidden
    for objective in ("mlm", "diffusion"):
        options = {**BERT, OBJECTIVE: objective, "training__progressive__enabled": False}
        whole = quiet(tiny(**options, training__run_id=f"{objective}-4", training__batch_size=4))
        cut = quiet(
            tiny(
                **options,
                training__run_id=f"{objective}-2",
                training__batch_size=2,
                training__gradient_accumulation_steps=2,
            )
        )
        assert step_losses(cut["run_dir"]) == pytest.approx(step_losses(whole["run_dir"]), rel=1e-5)


def test_a_causal_model_is_tuned_under_diffusion(tiny):
    """Its embedding and head grow by the mask token; shifted targets keep what the head has learned."""
    causal = quiet(
        tiny(training__progressive__enabled=False, training__max_steps=60, model__tie_embeddings=False)
    )
    options = {
        **BERT,
        OBJECTIVE: "diffusion",
        "training__progressive__enabled": False,
        "model__tie_embeddings": False,
        "training__max_steps": 1,
    }
    tuned = quiet(
        tiny(
            **options,
            training__run_id="tuned",
            checkpoint__init_from=causal["run_dir"],
            objective__target_shift=True,
            training__optimizer__lr=1e-9,
        )
    )
    before, after = open_run(causal["run_dir"]).rack, open_run(tuned["run_dir"]).rack
    assert after.spec.vocab_size == before.spec.vocab_size + 1
    assert torch.allclose(after.embedding.weight[:-1], before.embedding.weight, atol=1e-6)
    fresh = quiet(tiny(**options, training__run_id="fresh", training__optimizer__lr=1e-9))
    unshifted = quiet(
        tiny(
            **options,
            training__run_id="plain",
            checkpoint__init_from=causal["run_dir"],
            training__optimizer__lr=1e-9,
        )
    )
    assert tuned["eval_loss"] < fresh["eval_loss"]
    assert tuned["eval_loss"] < unshifted["eval_loss"], "the head says the next token, not this one"


def test_without_a_mask_token_and_without_leave_to_add_one_nothing_starts(tiny):
    with pytest.raises(
        ConfigError, match=r"objective\.add_mask_token.*the tokenizer 'char' has no mask token"
    ):
        quiet(tiny(**BERT, **{OBJECTIVE: "mlm"}, objective__add_mask_token=False))


def test_a_token_of_the_text_may_stand_for_hidden_ones(tiny):
    made = quiet(
        tiny(**BERT, **{OBJECTIVE: "mlm"}, objective__mask_token_id=3, training__progressive__enabled=False)
    )
    opened = open_run(made["run_dir"])
    assert opened.config.objective.mask_token_id == 3
    assert opened.rack.spec.vocab_size == opened.tokenizer.vocab_size
