"""Sentiment of sentences, learned from scratch on the CPU: the attentions side by side under one budget.

    python benchmarks/sst2.py --data FOLDER                 all attentions, five seeds each, records and a table
    python benchmarks/sst2.py --data FOLDER --holdout       the same, scored on the last tenth of the training file

FOLDER holds train.jsonl and dev.jsonl, lines of {"sentence": ..., "label": 0 or 1}: SST-2 by sentences (Socher et al.
2013). Every run is a rack of equal blocks with a `SequenceClassifier` on it (mlgka: `MLGKATextClassifier`); all share width, depth, optimizer, batches
and number of steps, and differ in the attention alone. Words that occur once in training are read as unknown, and a
share of the others is hidden as unknown at random, which is most of the regularisation. Nothing is chosen by the
dev file: accuracy is that of the last step. Settings were chosen by `--holdout` for bert_style.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from stackwise import MLGKATextClassifier, SequenceClassifier, create_simple_rack
from stackwise.model.heads import padded

ATTENTIONS = ("bert_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka")
PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Recipe:
    """What all attentions share."""

    d_model: int = 64
    n_heads: int = 4
    d_ff: int = 128
    n_layers: int = 2
    dropout: float = 0.2
    hidden_words: float = 0.3
    epochs: int = 8
    batch_size: int = 50
    lr: float = 2e-3
    embedding_lr: float = 1e-2
    weight_decay: float = 0.1
    clip: float = 1.0
    bandwidth: float = 16.0
    max_words: int = 64


Split = list[tuple[list[int], int]]


def read(path: Path) -> list[tuple[list[str], int]]:
    """Words and label of every line."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(row["sentence"].lower().split(), int(row["label"])) for row in rows]


def load(folder: Path, holdout: bool, recipe: Recipe) -> tuple[Split, Split, int]:
    """(training rows, rows to score, size of the vocabulary)."""
    train, scored = read(folder / "train.jsonl"), read(folder / "dev.jsonl")
    if holdout:
        cut = len(train) * 9 // 10
        train, scored = train[:cut], train[cut:]
    counts = Counter(word for words, _ in train for word in words)
    ids = {word: i + 2 for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1))}

    def coded(rows: list[tuple[list[str], int]]) -> Split:
        return [([ids.get(w, UNKNOWN) for w in words][: recipe.max_words], label) for words, label in rows]

    return coded(train), coded(scored), len(ids) + 2


def batches(
    rows: Split, size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, mask and labels, sentences of about the same length together; in random order, or from short to long."""
    noise = torch.rand(len(rows), generator=generator).tolist() if generator else [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + 8 * noise[i])
    starts = list(range(0, len(rows), size))
    if generator is not None:
        starts = [starts[i] for i in torch.randperm(len(starts), generator=generator).tolist()]
    for start in starts:
        part = [rows[i] for i in order[start : start + size]]
        ids, mask, _ = padded([words for words, _ in part], pad_id=PAD)
        yield ids, mask, torch.tensor([label for _, label in part])


@torch.no_grad()
def accuracy(model: SequenceClassifier, rows: Split) -> float:
    model.eval()
    right = sum(
        int((model(ids, mask).argmax(-1) == labels).sum()) for ids, mask, labels in batches(rows, 200, None)
    )
    model.train()
    return right / len(rows)


def classifier(attention: str, seed: int, vocab: int, recipe: Recipe) -> SequenceClassifier:
    sizes = (recipe.d_model, recipe.d_ff, recipe.n_heads)
    if attention == "mlgka":
        kv_heads = max(1, recipe.n_heads // 4)
        last = (kv_heads, recipe.n_layers, 2, recipe.max_words)
        return MLGKATextClassifier(
            vocab, *sizes, *last, dropout=recipe.dropout, kernel_bandwidth=recipe.bandwidth, seed=seed
        )
    rack = create_simple_rack(
        recipe.n_layers,
        1,
        *sizes,
        vocab,
        attention_preset=attention,
        dropout=recipe.dropout,
        max_seq_len=recipe.max_words,
        seed=seed,
    )
    return SequenceClassifier(rack, 2, dropout=recipe.dropout, seed=seed)


def run(
    attention: str, seed: int, train: Split, scored: Split, vocab: int, recipe: Recipe
) -> dict[str, object]:
    """Train one classifier; its record."""
    torch.manual_seed(seed)
    began, wall = time.process_time(), time.perf_counter()
    model = classifier(attention, seed, vocab, recipe).train()
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "embedding" not in n]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": [model.rack.embedding.weight], "weight_decay": 0.0, "lr": recipe.embedding_lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    curve, last = [], 0.0
    for _ in range(recipe.epochs):
        for ids, mask, labels in batches(train, recipe.batch_size, generator):
            hidden = torch.rand(ids.shape, generator=generator) < recipe.hidden_words
            loss = model.loss(model(ids.masked_fill(hidden & mask, UNKNOWN), mask), labels)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            last = float(loss.detach())
        curve.append(round(accuracy(model, scored), 4))
    return {
        "attention": attention,
        "seed": seed,
        "accuracy": curve[-1],
        "by_epoch": curve,
        "last_loss": round(last, 4),
        "parameters": model.get_parameter_count(),
        "attention_parameters": sum(
            p.numel() for block in model.rack.blocks() for p in block.attn.parameters()
        ),
        "cpu_seconds": round(time.process_time() - began, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "steps": steps,
        "vocabulary": vocab,
        "recipe": asdict(recipe),
    }


def table(records: Sequence[dict[str, object]]) -> str:
    """One row per attention: accuracy as mean and standard deviation over seeds, in percent."""
    lines = [
        "| attention | accuracy, % | lowest | highest | seeds | parameters of attention | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for attention in dict.fromkeys(str(r["attention"]) for r in records):
        own = [r for r in records if r["attention"] == attention]
        scores = [100 * float(str(r["accuracy"])) for r in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        seconds = statistics.median(float(str(r["cpu_seconds"])) for r in own)
        lines.append(
            f"| {attention} | {statistics.mean(scores):.1f} ± {spread:.1f} | {min(scores):.1f} | {max(scores):.1f} "
            f"| {len(own)} | {own[0]['attention_parameters']:,} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--attention", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--holdout", action="store_true", help="score the last tenth of the training file")
    parser.add_argument(
        "--out", type=Path, help="append records to this file; runs that are there are not repeated"
    )
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})
    train, scored, vocab = load(options.data, options.holdout, recipe)
    records = []
    if options.out is not None and options.out.exists():
        records = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    done = {(r["attention"], r["seed"]) for r in records}
    for seed in options.seeds:
        for attention in options.attention:
            if (attention, seed) in done:
                continue
            records.append(run(attention, seed, train, scored, vocab, recipe))
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(records[-1]) + "\n")
            shown = ("attention", "seed", "accuracy", "last_loss", "cpu_seconds", "by_epoch")
            print(json.dumps({name: records[-1][name] for name in shown}), flush=True)
    print(table(sorted(records, key=lambda r: ATTENTIONS.index(str(r["attention"])))))


if __name__ == "__main__":
    main()
