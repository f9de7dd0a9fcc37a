"""Zero-shot scores of a run beside those of lm-eval on its export: the same figures, and CPU seconds of both.

    python benchmarks/eval_tasks.py --data FOLDER            trains a small model, scores, writes the record

FOLDER holds `wiki_demo/wiki_demo.txt` to train on and `blimp/*.jsonl`, minimal pairs (Warstadt et al. 2020). The run is
exported in the Llama format, loaded by Transformers and scored by lm-eval in the same process, on the same thread, with
several batch sizes, of which the fastest counts. Seconds are those of the process (all its threads). Both sides read the
files, tokenize, score and reduce; imports and loading the models are left out. Needs lm_eval and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import stackwise
from stackwise.config.root import StackWiseConfig
from stackwise.data.prepare import train_tokenizer
from stackwise.evaluation.likelihood import scorer_of
from stackwise.evaluation.requests import Request, Score, Scorer
from stackwise.evaluation.tasks import read_task
from stackwise.evaluation.zero_shot import run_task
from stackwise.interop.hf_export import write_model
from stackwise.training.run import train
from stackwise.training.stored import OpenRun, open_run

RECORD = Path(__file__).parent / "records" / "eval-tasks.json"
BATCHES = (32, 128)


def trained(data: Path, folder: Path, steps: int) -> OpenRun:
    """A causal model of the Llama format, after about a minute of one core."""
    text = str(data / "wiki_demo" / "wiki_demo.txt")
    block = {
        "attention_preset": "gpt_style",
        "use_rope": True,
        "norm": "rmsnorm",
        "ffn_type": "swiglu",
        "bias": False,
    }
    raw: dict[str, Any] = {
        "model": {
            "d_model": 128,
            "d_ff": 384,
            "n_heads": 4,
            "max_seq_len": 128,
            "architecture": {"n_stacks": 1, "blocks_per_stack": 4},
            "tie_embeddings": True,
            **block,
        },
        "training": {
            "run_id": "small",
            "batch_size": 16,
            "seq_len": 128,
            "max_steps": steps,
            "dtype": "float32",
            "device": "cpu",
            "progressive": {"enabled": False},
        },
        "data": {"source": "text", "path": text},
        "evaluation": {"batches": 4},
        "checkpoint": {"dir": str(folder / "runs")},
        "tracking": {"report": False},
    }
    settings = StackWiseConfig.from_dict(raw)
    raw["data"]["tokenizer"] = str(train_tokenizer(settings.data, 2048, folder / "tokenizer.json").path)
    train(StackWiseConfig.from_dict(raw), sinks=[])
    return open_run(folder / "runs" / "small")


class Recorded:
    """A scorer that keeps what it found, and the seconds that it took."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self.label, self.start = scorer, scorer.label, scorer.start
        self.nats: list[float] = []
        self.seconds = 0.0

    def score(self, requests: Sequence[Request], **options: Any) -> list[Score]:
        started = time.process_time()
        found = self._scorer.score(requests, **options)
        self.seconds += time.process_time() - started
        self.nats += [score.nats for score in found]
        return found


def ours(opened: OpenRun, files: list[Path]) -> dict[str, Any]:
    """Accuracy by task, nats of all sentences, seconds."""
    scorer = Recorded(scorer_of(opened.rack, opened.config, opened.tokenizer))
    started = time.process_time()
    found = {
        task.name: run_task(task, scorer, opened.tokenizer, _no_text).metrics["acc"].value
        for task in map(read_task, files)
    }
    seconds = time.process_time() - started
    return {"acc": found, "nats": scorer.nats, "seconds": seconds, "scoring_seconds": scorer.seconds}


def theirs(model: Any, tokenizer: Any, files: list[Path], batch_size: int, cache: Path) -> dict[str, Any]:
    """The same by lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=128,
        device="cpu",
        dtype="float32",
    )
    nats: list[float] = []
    scoring = 0.0
    score = harness.loglikelihood

    def recorded(requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        nonlocal scoring
        started = time.process_time()
        found = score(requests, **options)
        scoring += time.process_time() - started
        nats.extend(value for value, _ in found)
        return found

    harness.loglikelihood = recorded
    tasks = [
        {
            "task": file.stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(cache)},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        for file in files
    ]
    manager = TaskManager(include_defaults=False)
    started = time.process_time()
    found = lm_eval.simple_evaluate(
        model=harness, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    seconds = time.process_time() - started
    accuracy = {file.stem: found["results"][file.stem]["acc,none"] for file in files}
    return {"acc": accuracy, "nats": nats, "seconds": seconds, "scoring_seconds": scoring}


def _no_text(prompt: str, until: Sequence[str], max_new_tokens: int) -> str:
    raise AssertionError("pairs need no generation")


def compare(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The record."""
    import lm_eval
    import transformers

    torch.set_num_threads(1)
    opened = trained(data, folder, steps)
    exported = write_model(opened.rack, opened.tokenizer, folder / "exported", family="llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.path)
    files = sorted((data / "blimp").glob("*.jsonl"))
    native = [ours(opened, files) for _ in range(2)]
    mine = min(native, key=lambda found: found["seconds"])
    harness = {size: theirs(model, tokenizer, files, size, folder / "cache") for size in BATCHES}
    size = min(harness, key=lambda size: harness[size]["seconds"])
    other = harness[size]
    apart = [abs(a - b) for a, b in zip(mine["nats"], other["nats"], strict=True)]
    return {
        "model": {
            "parameters": opened.rack.get_parameter_count(),
            "vocabulary": opened.tokenizer.vocab_size,
            "steps": opened.commit.step,
        },
        "tasks": {
            file.stem: {"rows": 1000, "stackwise": mine["acc"][file.stem], "lm_eval": other["acc"][file.stem]}
            for file in files
        },
        "equal": mine["acc"] == other["acc"],
        "largest_difference_nats": max(apart),
        "cpu_seconds": {
            "stackwise": [found["seconds"] for found in native],
            "stackwise_scoring": [found["scoring_seconds"] for found in native],
            "lm_eval": {str(n): found["seconds"] for n, found in harness.items()},
            "lm_eval_scoring": {str(n): found["scoring_seconds"] for n, found in harness.items()},
        },
        "times_faster": other["seconds"] / mine["seconds"],
        "times_faster_scoring": min(found["scoring_seconds"] for found in harness.values())
        / min(found["scoring_seconds"] for found in native),
        "threads": 1,
        "versions": {
            "stackwise": stackwise.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lm_eval": str(lm_eval.__version__),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = compare(options.data, Path(folder), options.steps)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
