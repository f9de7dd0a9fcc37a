"""A rack of at most 10 M parameters, pre-trained and fine-tuned on five tasks on the CPU: does it beat a bag of words?

    python benchmarks/nlu.py --data FOLDER --model encoder --record benchmarks/records/nlu.json
    python benchmarks/nlu.py --data FOLDER --model causal --record benchmarks/records/nlu.json
    python benchmarks/nlu.py --page docs/nlu.md --record benchmarks/records/nlu.json      # the table, nothing is run

Each of the first two is one whole experiment on one thread: `stackwise train` on lower-case text (wikitext2, wiki_demo,
c4_demo and the training sentences of the tasks, never those of dev or test), then `stackwise nlu` with three seeds on
sst2, cola, mrpc, rte and stsb, scored on dev. FOLDER has these as folders of the text
files and of the tasks. `--work` keeps the runs; one that is finished there is not trained again. CPU minutes are those of
the process that did the work.

`--split holdout` scores the last tenth of the training rows in place of dev, which is how the recipes were chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

TASKS = ("sst2", "cola", "mrpc", "rte", "stsb")
VOCABULARY = 8192
BEGIN, END = "<!-- the table of benchmarks/nlu.py -->\n", "<!-- its end -->\n"

SHARED = """\
model:
  d_model: 192
  n_heads: 6
  max_seq_len: 128
  architecture: {n_stacks: 1, blocks_per_stack: 2}
  qk_norm: true
  norm_eps: 1e-6
  embedding_norm: learned
  tie_embeddings: true
  zero_init_outputs: true
training:
  batch_size: 32
  seq_len: 64
  lr_schedule: linear
  min_lr_ratio: 0.0
  warmup_steps: 50
  max_grad_norm: 0
  optimizer:
    optimizer_type: Muon
    lr: 0.02
    adam_lr: 0.004
    momentum: 0.95
    weight_decay: 0.03
    custom_params: {ns_steps: 3}
  progressive: {enabled: false}
data:
  source: jsonl
  path: corpus.jsonl
  tokenizer: tokenizer.json
  eval_fraction: 0.02
objective:
  mask_fraction: 0.25
evaluation: {interval: 1000, batch_size: 64}
checkpoint: {save_interval: 1000}
tracking: {log_interval: 100, report: false}
"""
OWN = {
    "encoder": [
        "model.attention_preset=bert_style",
        "training.progressive.training_objective=mlm",
        "training.max_steps=3000",
    ],
    "causal": ["model.attention_preset=gpt_style", "training.max_steps=1600"],
}


def texts(data: Path) -> list[str]:
    """All text to pre-train on, in a fixed random order, in lower case."""

    def lines(name: str) -> list[str]:
        return [line.strip() for line in (data / name).read_text("utf-8").splitlines() if line.strip()]

    found = [
        line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
        for name in ("train", "valid")
        for line in lines(f"wikitext2/{name}.txt")
        if not line.startswith("=")
    ]
    found += lines("wiki_demo/wiki_demo.txt")
    found += [json.loads(line)["text"] for line in lines("c4_demo/c4_demo.jsonl")]
    for task in TASKS:
        for line in lines(f"{task}/train.jsonl"):
            row = json.loads(line)
            found += [row[key] for key in ("sentence", "sentence1", "sentence2") if key in row]
    random.Random(0).shuffle(found)
    return [text.lower() for text in found]


def prepare(data: Path, work: Path) -> None:
    """corpus.jsonl, tokenizer.json (a byte-level BPE that reads everything in lower case) and model.yaml."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    work.mkdir(parents=True, exist_ok=True)
    found = texts(data)
    (work / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>", "[MASK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(found, trainer=trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    (work / "model.yaml").write_text(SHARED)


def stackwise(*words: str) -> float:
    """Run a command in this process; CPU seconds it took."""
    from stackwise.cli.main import main

    began = time.process_time()
    print("stackwise " + " ".join(words), flush=True)
    code = main(list(words))
    if code:
        raise SystemExit(code)
    return time.process_time() - began


def experiment(
    data: Path, work: Path, model: str, split: str, steps: int | None, seeds: int
) -> dict[str, Any]:
    """Pre-train, fine-tune, and all that is to be recorded."""
    data, began = data.resolve(), time.process_time()
    (work / "results").mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    finished = Path(f"{model}.json")
    if not finished.exists():
        prepare(data, Path())
        words = [*OWN[model], *([f"training.max_steps={steps}"] if steps else [])]
        stackwise("train", "model.yaml", f"training.run_id={model}", *words)
        finished.write_text(
            json.dumps({"cpu_seconds": round(time.process_time() - began, 1), "words": words})
        )
    folder = Path(f"results/{model}")
    words = ["--data", str(data), "--tasks", ",".join(TASKS), "--split", split, "--seeds", str(seeds)]
    seconds = stackwise("nlu", f"runs/{model}", *words, "--out", str(folder))
    newest = max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {
        "pre-training": json.loads(finished.read_text()),
        "cpu_seconds": round(seconds, 1),
        **json.loads(newest.read_text()),
    }


def table(records: dict[str, Any]) -> str:
    """One row per model and task."""
    lines = [
        "| model | task, figure | rows | fine-tuned: mean, range | bag of words | majority | ahead by |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, record in records.items():
        for name, task in record["tasks"].items():
            figure = task["metric"]
            own = task["summary"][figure]
            bag = task["bag_of_words"][figure]
            lines.append(
                f"| {model} | {name}, {figure} | {task['rows']['scored']:,} "
                f"| {own['mean']:.3f}, {own['lowest']:.3f} to {own['highest']:.3f} "
                f"| {bag:.3f} | {task['majority'][figure]:.3f} | {own['mean'] - bag:+.3f} |"
            )
    return (
        "\n".join(lines)
        + "\n\n"
        + "\n".join(summary(model, record) for model, record in records.items())
        + "\n"
    )


def summary(model: str, record: dict[str, Any]) -> str:
    """How many tasks were won, how large the model is, and what it cost."""
    ahead = [
        name
        for name, task in record["tasks"].items()
        if task["summary"][task["metric"]]["mean"] > task["bag_of_words"][task["metric"]]
    ]
    before, after = record["pre-training"]["cpu_seconds"] / 60, record["cpu_seconds"] / 60
    return (
        f"- {model}: {record['parameters'] / 1e6:.2f} M parameters; ahead of the bag of words on {len(ahead)} of "
        f"{len(record['tasks'])} tasks ({', '.join(ahead) or 'none'}); {before:.1f} CPU minutes of pre-training and "
        f"{after:.1f} of fine-tuning, baselines included."
    )


def write_page(page: Path, text: str) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no place for the table: {BEGIN.strip()} ... {END.strip()}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the texts and the tasks")
    parser.add_argument("--model", choices=list(OWN), help="what to pre-train and fine-tune")
    parser.add_argument("--work", type=Path, default=Path("runs/nlu"), help="where runs and results are kept")
    parser.add_argument("--record", type=Path, help="JSON file that gets the figures of the model")
    parser.add_argument(
        "--page", type=Path, help="put the table of the record into this page, and run nothing"
    )
    parser.add_argument("--split", choices=("dev", "holdout"), default="dev", help="rows that are scored")
    parser.add_argument("--steps", type=int, help="other than the steps of the model, to try the program")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    record = None if options.record is None else options.record.resolve()
    known = json.loads(record.read_text()) if record is not None and record.exists() else {}
    if options.page is not None:
        write_page(options.page, table(known))
        return
    if options.data is None or options.model is None:
        parser.error("--data and --model say what to run")
    import torch

    torch.set_num_threads(1)
    found = experiment(
        options.data, options.work.resolve(), options.model, options.split, options.steps, options.seeds
    )
    if record is not None:
        known[options.model] = found
        ordered = {name: known[name] for name in OWN if name in known}
        record.write_text(json.dumps(ordered, indent=1) + "\n")
    print(table({options.model: found}))


if __name__ == "__main__":
    main()
