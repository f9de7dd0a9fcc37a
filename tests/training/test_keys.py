"""Keys that only a run can prove: each changes what a tiny run does or leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.tracking.metrics import read_metrics
from stackwise.training import loop, run
from stackwise.training.run import train

END_TO_END = {"training.progressive.enabled": False}
MUON = {"training.optimizer.optimizer_type": "Muon"}
SGD = {"training.optimizer.optimizer_type": "SGD"}
MASKED = {
    "model.attention_preset": "bert_style",
    "training.progressive.training_objective": "mlm",
    "evaluation.passes": 1,
}
WIDE = {"model.d_model": 64}  # matrices large enough for blocks of 8-bit numbers
DOCUMENTS = {"data.source": "jsonl", "data.path": "DOCUMENTS", "data.tokenizer": "byte"}

COURSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "training.batch_size": (2, {}),
    "training.gradient_accumulation_steps": (2, {}),
    "training.seq_len": (8, {}),
    "training.seed": (1, {}),
    "training.max_grad_norm": (0.01, {}),
    "training.lr_schedule": ("constant", {}),
    "training.decay_fraction": (0.8, {"training.lr_schedule": "wsd"}),
    "training.min_lr_ratio": (0.5, {}),
    "training.dtype": ("bfloat16", {}),
    "training.optimizer.optimizer_type": ("Adam", {}),
    "training.optimizer.lr": (1e-4, {}),
    "training.optimizer.adam_lr": (1e-4, MUON),
    "training.optimizer.weight_decay": (0.9, {}),
    "training.optimizer.betas": ([0.5, 0.6], {}),
    "training.optimizer.eps": (1e-2, {}),
    "training.optimizer.momentum": (0.1, SGD),
    "training.optimizer.custom_params": ({"nesterov": True}, SGD),
    "training.optimizer.memory": ("int8", WIDE),
    "training.optimizer.groups": ([{"match": "norm", "lr": 0.5}], {}),
    "training.optimizer.groups.N.match": (
        [{"match": "attn", "lr": 0.5}],
        {"training.optimizer.groups": [{"match": "norm", "lr": 0.5}]},
    ),
    "training.optimizer.groups.N.lr": (
        [{"match": "norm", "lr": 0.1}],
        {"training.optimizer.groups": [{"match": "norm", "lr": 0.5}]},
    ),
    "training.optimizer.groups.N.weight_decay": (
        [{"match": "ffn", "weight_decay": 5.0}],
        {"training.optimizer.groups": [{"match": "ffn", "weight_decay": 0.1}]},
    ),
    "training.progressive.trunk_precision": ("nf4", {"training.progressive.enabled": True}),
    "training.progressive.new_stack_precision": ("bfloat16", {}),
    "training.progressive.fake_quant": (True, {"training.progressive.trunk_precision": "fp8"}),
    "data.packing": (False, DOCUMENTS),
    "data.doc_mask": (False, DOCUMENTS),
    "data.shuffle": (False, {}),
}
"""Key -> (value, other keys): the weights after the run differ."""

EVENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tracking.log_interval": (2, {}),
    "tracking.sample_interval": (2, {}),
    "tracking.sample_prompt": ("To be", {}),
    "evaluation.interval": (2, {}),
    "evaluation.batches": (2, {}),
    "evaluation.passes": (2, MASKED),
    "checkpoint.save_interval": (2, {}),
    "training.optimizer.state_device": ("host", {}),
    "generation.max_new_tokens": (9, {}),
    "generation.temperature": (0.0, {}),
    "generation.top_k": (1, {}),
    "generation.top_p": (1e-3, {}),
    "generation.repetition_penalty": (100.0, {"generation.temperature": 0.0}),
    "generation.seed": (5, {}),
    "generation.stop": (["e", " ", "t", "o", "\n", "s", "h", "i", "n"], {}),
}
"""Key -> (value, other keys): the events of the run differ."""

OTHER = {
    "training.run_id",
    "training.device",
    "training.deterministic",
    "training.compile",
    "training.loss_chunk_tokens",
    "data.num_workers",
    "data.cache_dir",
    "checkpoint.dir",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "checkpoint.resume",
    "checkpoint.overwrite",
    "evaluation.batch_size",
    "tracking.report",
}
"""Keys with a test of their own below, named after the key."""


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in values.items()}


@pytest.fixture
def runs(tiny, tmp_path):
    """Run a tiny end-to-end config with the given dotted keys; returns (result, events, hashes of the weights)."""
    documents = tmp_path / "documents.jsonl"
    rows = [{"text": f"row {i}: " + "abc def " * (i % 5 + 1)} for i in range(60)]
    documents.write_text("\n".join(json.dumps(row) for row in rows))
    count = iter(range(100))

    def do(values: dict[str, Any]):
        values = {"training.max_steps": 4, "generation.max_new_tokens": 4, **END_TO_END, **values}
        values = {k: str(documents) if v == "DOCUMENTS" else v for k, v in values.items()}
        config = tiny(**{"training__run_id": f"run{next(count)}", **dotted(values)})
        result = train(config, sinks=[])
        lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        commit = Store(Path(result["run_dir"]) / "store").latest()
        hashes = {n: p.sha256 for n, p in commit.parts.items() if n.endswith("weights")}
        return result, [json.loads(line) for line in lines], hashes

    return do


def comparable(events: list[dict]) -> list[dict]:
    """Events without times, names of the run, and notes (which repeat the config).

    When a save that goes on beside the training is reported depends on the disk, so these come last.
    """
    skip = {"time", "seconds", "blocked_seconds", "tokens_per_s", "rss_bytes", "peak_rss_bytes", "run_id"}
    skip.add("commit")
    kept = sorted((e for e in events if e["event"] != "note"), key=lambda e: e["event"] == "checkpoint")
    return [{k: v for k, v in e.items() if k not in skip} for e in kept]


def test_runs_of_one_config_are_told_apart_by_nothing(runs):
    """What makes the tests below able to fail."""
    a, b = runs({}), runs({})
    assert comparable(a[1]) == comparable(b[1])
    assert a[2] == b[2]


@pytest.mark.parametrize("key", COURSE)
def test_key_changes_the_weights(runs, key):
    value, given = COURSE[key]
    key = key.partition(".N.")[0]  # an item of a list is set with its list
    assert runs(given)[2] != runs({**given, key: value})[2]


@pytest.mark.parametrize("key", EVENTS)
def test_key_changes_the_events(runs, key):
    value, given = EVENTS[key]
    given = {"generation.max_new_tokens": 40, **given} if key.startswith("generation.") else given
    assert comparable(runs(given)[1]) != comparable(runs({**given, key: value})[1])


def test_training_run_id_and_checkpoint_dir_name_the_folder(runs, tmp_path):
    folder = tmp_path / "elsewhere"
    result, _, _ = runs({"checkpoint.dir": str(folder), "training.run_id": "mine"})
    assert Path(result["run_dir"]) == folder / "mine"


def test_training_device_picks_the_device(runs):
    from stackwise import ConfigError

    with pytest.raises(ConfigError, match=r"training\.device.*is not present here.*cpu"):
        runs({"training.device": "cuda:97"})


def test_training_deterministic_switches_kernels_on_and_off_again(runs, monkeypatch):
    seen = []
    original = loop.Engine._train_step

    def step(self, stage):
        seen.append(torch.are_deterministic_algorithms_enabled())
        original(self, stage)

    monkeypatch.setattr(loop.Engine, "_train_step", step)
    runs({"training.deterministic": True})
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_compile_compiles_every_block(runs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    runs({"training.compile": True})
    assert compiled == ["Block"] * 3


def test_training_loss_chunk_tokens_cuts_the_loss_without_changing_it(runs, monkeypatch):
    seen = []
    from stackwise.objectives.causal import CausalLM

    original = CausalLM.loss

    def loss(self, hidden, matrix, example, rows_per_chunk=None):
        seen.append(rows_per_chunk)
        return original(self, hidden, matrix, example, rows_per_chunk)

    monkeypatch.setattr(CausalLM, "loss", loss)
    whole = runs({})[0]
    assert set(seen) == {None}
    cut = runs({"training.loss_chunk_tokens": 7})[0]
    assert 7 in seen
    assert cut["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)


def test_data_num_workers_changes_who_builds_batches_and_nothing_else(runs, monkeypatch):
    started = []
    from stackwise.data import loader

    original = loader.TokenLoader._start_workers
    monkeypatch.setattr(
        loader.TokenLoader, "_start_workers", lambda self: started.append(self.num_workers) or original(self)
    )
    alone, helped = runs({})[2], runs({"data.num_workers": 1})[2]
    assert started == [1]
    assert alone == helped


def test_data_cache_dir_holds_the_shards(runs, tmp_path):
    runs({"data.cache_dir": str(tmp_path / "shards")})
    assert list((tmp_path / "shards").glob("*/*"))


def test_checkpoint_keep_last_bounds_the_commits(runs):
    def count(keep: int) -> int:
        result, _, _ = runs({"checkpoint.keep_last": keep, "checkpoint.save_interval": 1})
        return len(Store(Path(result["run_dir"]) / "store").commits())

    assert (count(1), count(3)) == (1, 3)


def test_checkpoint_keep_best_and_keep_every_keep_more_commits(runs):
    base = {
        "checkpoint.keep_last": 1,
        "checkpoint.save_interval": 1,
        "evaluation.interval": 1,
        "model.architecture.n_stacks": 1,
    }

    def left(values: dict[str, Any]) -> tuple[list[int], Store]:
        store = Store(Path(runs({**base, **values})[0]["run_dir"]) / "store")
        return [commit.step for commit in store.commits()], store

    steps, _ = left({})
    assert steps == [4]
    assert left({"checkpoint.keep_every": 3})[0] == [3, 4]
    steps, store = left({"checkpoint.keep_best": 2, "training.optimizer.lr": 1.0})
    events = read_metrics(store.root.parent).events
    measured = {e["step"]: e["loss"] for e in events if e["event"] == "eval" and e["step"] < 4}
    assert steps == sorted([*sorted(measured, key=measured.__getitem__)[:2], 4])
    assert store.scores()[store.find(f"step:{steps[0]}").id] == measured[steps[0]]


def test_checkpoint_resume_and_overwrite_decide_what_happens_to_a_run_that_exists(runs, tmp_path):
    from stackwise.tracking.folder import RunFolderError

    same = {"training.run_id": "same"}
    first = runs(same)[0]
    assert runs(same)[0]["resumed_from"] is not None
    with pytest.raises(RunFolderError, match="already holds a run"):
        runs({**same, "checkpoint.resume": "never"})
    assert runs({**same, "checkpoint.overwrite": True})[0]["resumed_from"] is None
    assert runs({"checkpoint.resume": first["run_dir"]})[0]["run_dir"] == first["run_dir"]


def test_evaluation_batch_size_changes_the_batches_and_not_the_loss(runs, monkeypatch):
    sizes = []
    original = run.validate

    def validate(rack, batches, **options):
        sizes.append(batches.batch_size)
        return original(rack, batches, **options)

    monkeypatch.setattr(run, "validate", validate)
    losses = [
        runs({"evaluation.batches": None, "evaluation.batch_size": size})[0]["eval_loss"] for size in (2, 5)
    ]
    assert set(sizes) == {2, 5}
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_tracking_report_writes_the_page(runs):
    assert not (Path(runs({"tracking.report": False})[0]["run_dir"]) / "report.html").exists()
    assert (Path(runs({"tracking.report": True})[0]["run_dir"]) / "report.html").exists()
