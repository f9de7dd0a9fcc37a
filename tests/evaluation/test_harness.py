"""lm-eval's tasks on a native model, offline. Skipped where lm_eval is not installed (the extra `eval`)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from stackwise.data.errors import DataError
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.evaluation import harness
from stackwise.evaluation.harness import NativeModel, known_tasks, run_named
from stackwise.evaluation.likelihood import CausalScorer
from stackwise.evaluation.masked_likelihood import MaskedScorer
from stackwise.evaluation.requests import encode
from stackwise.evaluation.tasks import read_task
from stackwise.evaluation.zero_shot import run_task
from stackwise.model.factory import create_simple_rack
from stackwise.objectives.denoiser import Denoiser

LIMIT = 24


def model_of(preset: str = "gpt_style") -> NativeModel:
    tokenizer = ByteTokenizer()
    rack = create_simple_rack(1, 1, 16, 24, 2, 259, max_seq_len=LIMIT, attention_preset=preset).eval()
    scorer = (
        CausalScorer(rack, 256) if preset == "gpt_style" else MaskedScorer(Denoiser(rack, 258), (256, 257))
    )
    return NativeModel(scorer, tokenizer, lambda prompt, until, new: f"{prompt}|{until}|{new}", LIMIT)


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args, doc_id=0)


def described(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(path.parent / "cache")},
        "validation_split": "validation",
        "num_fewshot": 0,
        **more,
    }


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    rows = [{"prompt": f"the {n}", "choices": ["cat", "a dog", "fish"], "answer": n % 3} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("preset", ["gpt_style", "bert_style"])
def test_lm_eval_finds_what_our_own_tasks_find(quiz, preset):
    model = model_of(preset)
    task = described(
        quiz,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    found = run_named(model, [task], known_tasks([task]), shots=None, limit=None)["local"]
    own = run_task(read_task(quiz), model._scorer, model._tokenizer, model._write)
    assert found["metrics"]["acc"] == own.metrics["acc"].value
    assert (found["n"], found["shots"]) == (20, 0)
    assert run_named(model, [task], known_tasks([task]), shots=None, limit=7)["local"]["n"] == 7


def test_whole_texts_are_scored_window_by_window():
    model = model_of()
    text = "a text that is longer than the model can read at once, by far"
    rack, ids = model._scorer.rack, [256, *text.encode()]
    expected, seen = 0.0, 0
    while seen < len(text):
        new = min(LIMIT, len(text) - seen)
        window = ids[max(0, seen + new - LIMIT) : seen + new + 1] if seen else ids[: new + 1]
        with torch.no_grad():
            log_p = rack(torch.tensor([window[:-1]])).log_softmax(-1)[0]
        expected += sum(float(log_p[len(window) - 2 - k, window[-1 - k]]) for k in range(new))
        seen += new
    assert model.loglikelihood_rolling([asked(text)])[0] == pytest.approx(expected, abs=1e-3)
    both = model_of("bert_style")
    whole = both._scorer.score([encode(both._tokenizer, "", "short", None)])[0].nats
    assert both.loglikelihood_rolling([asked("short"), asked(text)])[0] == pytest.approx(whole, abs=1e-5)


def test_answers_are_written_greedily():
    model = model_of()
    found = model.generate_until(
        [asked("q", {"until": "\n", "max_gen_toks": 3}), asked("q", {"until": ["a", "b"]})]
    )
    assert found == ["q|['\\n']|3", "q|['a', 'b']|256"]
    with pytest.raises(DataError, match="only greedy"):
        model.generate_until([asked("q", {"until": [], "do_sample": True})])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(DataError, match="did you mean 'hellaswag'"):
        known_tasks(["helaswag"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(DataError, match="two tasks are called mine"):
        known_tasks([{"task": "mine"}, {"task": "mine"}])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_task_whose_package_is_missing_says_which(monkeypatch):
    def lacks(**options):
        raise ModuleNotFoundError("No module named 'langdetect'")

    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", lacks)
    with pytest.raises(DataError, match=r"could not run mine: No module named 'langdetect'; install"):
        run_named(model_of(), [{"task": "mine"}], known_tasks([{"task": "mine"}]), shots=None, limit=None)
