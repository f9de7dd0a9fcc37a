"""CPU time of one pre-training step of an encoder: corruption, forward, backward, gradient clipping, fused AdamW.

StackWise's objective `mlm` (15 % of the tokens, 80/10/10) against Transformers' BertForMaskedLM with its own data
collator and loss: same width, layers, heads, vocabulary, rows and, by the feed-forward width, size; no dropout; fp32,
eager, one thread. The head of StackWise works on the corrupted positions alone, BERT's on all.

Both live in one process and take turns, a few steps each, so that a busy machine slows them alike. A row shows the
median CPU milliseconds of a step, and the median over the rounds of the ratio to BERT (above 1 = faster).

    python benchmarks/encoder_step.py                    # all shapes, about three minutes
    python benchmarks/encoder_step.py --shapes small     # some of them
    python benchmarks/encoder_step.py --json figures.json

"StackWise, PyTorch's products" leaves matrix products to `torch.mm` as BERT does; on processors where StackWise knows no
faster route (see `stackwise.kernels.product`) it is the same as "StackWise". `--bert-masked-head` measures BERT once
more with its head applied to the corrupted positions by hand, which its own forward does not do.

Needs `pip install transformers`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.product import pytorch_products
from stackwise.model.factory import create_simple_rack
from stackwise.objectives.base import IGNORE
from stackwise.objectives.masked import MaskedLM, Vocabulary
from stackwise.training.device import keep_freed_memory

Step = Callable[[], Tensor]
FRACTION = 0.15


class Shape(NamedTuple):
    d_model: int
    n_layers: int
    n_heads: int
    seq_len: int
    batch: int
    vocab_size: int

    def __str__(self) -> str:
        return f"d{self.d_model} L{self.n_layers} T{self.seq_len} B{self.batch} V{self.vocab_size}"

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1


SHAPES = {
    "small": Shape(256, 4, 4, 128, 8, 32_000),
    "wide": Shape(512, 4, 8, 128, 8, 32_000),
}
BERT = "Transformers BERT"


def stepper(model: nn.Module, loss: Step) -> Step:
    """One whole training step of `model`; the same code for every contender."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def stackwise(shape: Shape, ids: Tensor) -> tuple[nn.Module, Step]:
    """BERT's block: GELU feed-forward of four widths, layer norms, biases, tied head."""
    rack = create_simple_rack(
        n_stacks=1,
        blocks_per_stack=shape.n_layers,
        d_model=shape.d_model,
        d_ff=4 * shape.d_model,
        n_heads=shape.n_heads,
        vocab_size=shape.vocab_size,
        attention_preset="bert_style",
        ffn_type="gelu",
        norm="layernorm",
        use_rope=False,
        bias=True,
        tie_embeddings=True,
        max_seq_len=shape.seq_len,
    )
    objective = MaskedLM(Vocabulary(shape.vocab_size, shape.mask_id), 0, "bert", fraction=FRACTION)
    visits = iter(range(1 << 60))

    def loss() -> Tensor:
        draws = torch.full((shape.batch,), next(visits))
        example = objective.corrupt({"input_ids": ids, "draws": draws})
        hidden = rack.forward_features(example.input_ids)
        total, weight = objective.loss(hidden, rack.head, example)
        return total / weight

    return rack.train(), loss


def bert(shape: Shape, ids: Tensor, masked_head: bool = False) -> tuple[nn.Module, Step]:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            intermediate_size=4 * shape.d_model,
            max_position_embeddings=shape.seq_len,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()

    def corrupted() -> tuple[Tensor, Tensor]:
        """As DataCollatorForLanguageModeling does: every token by itself."""
        chosen = torch.rand(ids.shape) < FRACTION
        labels = ids.masked_fill(~chosen, IGNORE)
        kind = torch.rand(ids.shape)
        inputs = ids.masked_fill(chosen & (kind < 0.8), shape.mask_id)
        others = torch.randint(0, shape.mask_id, ids.shape)
        return torch.where(chosen & (kind >= 0.9), others, inputs), labels

    def loss() -> Tensor:
        inputs, labels = corrupted()
        if not masked_head:
            value: Tensor = model(input_ids=inputs, labels=labels).loss
            return value
        scored = labels != IGNORE
        hidden = model.bert(input_ids=inputs).last_hidden_state[scored]
        return F.cross_entropy(model.cls(hidden), labels[scored])

    return model, loss


def contenders(shape: Shape, masked_head: bool) -> tuple[dict[str, Step], dict[str, int]]:
    """A training step of each, and how many parameters it has: apart by at most one part in fifty."""
    ids = torch.randint(0, shape.mask_id, (shape.batch, shape.seq_len))
    built = {
        BERT: bert(shape, ids),
        "StackWise": stackwise(shape, ids),
        "StackWise, PyTorch's products": stackwise(shape, ids),
    }
    if masked_head:
        built[f"{BERT}, head on corrupted positions"] = bert(shape, ids, masked_head=True)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in built.items()}
    if max(counts.values()) > 1.02 * min(counts.values()):
        raise RuntimeError(f"the models differ in size: {counts}")
    return {name: stepper(model, loss) for name, (model, loss) in built.items()}, counts


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """CPU seconds per step of each, round by round. At least five rounds; all take turns within a round."""
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> float:
        with pytorch_products() if "PyTorch" in name else nullcontext():
            started = time.process_time()
            for _ in range(count):
                steps[name]()
            return (time.process_time() - started) / count

    for name in steps:  # warm-up; then chunks of about a third of a second, in which caches settle
        run(name, 2)
        counts[name] = max(1, round(0.3 / run(name, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    until = time.process_time() + seconds
    while time.process_time() < until or len(rounds[name]) < 5:
        for name, count in counts.items():
            rounds[name].append(run(name, count))
    return rounds


def summary(shape: Shape, counts: dict[str, int], rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median and range of the ratios within a round."""
    rows = {}
    for name, times in rounds.items():
        ratios = [b / a for a, b in zip(times, rounds[BERT], strict=True)]
        rows[name] = {
            "parameters": counts[name],
            "ms_per_step": statistics.median(times) * 1e3,
            "tokens_per_cpu_second": shape.batch * shape.seq_len / statistics.median(times),
            "vs_bert": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return {"shape": shape._asdict(), "rounds": len(rounds[BERT]), "rows": rows}


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds to measure each shape for")
    parser.add_argument("--bert-masked-head", action="store_true", help="a fourth row, see above")
    parser.add_argument("--keep-memory", action="store_true", help="set malloc as `stackwise train` does")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_freed_memory()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "keep_memory": options.keep_memory,
        "shapes": {},
    }
    for key in options.shapes:
        torch.manual_seed(0)
        shape = SHAPES[key]
        steps, counts = contenders(shape, options.bert_masked_head)
        results["shapes"][key] = found = summary(shape, counts, measure(steps, options.seconds))
        show(f"{key}: {shape}, {found['rounds']} rounds")
        show(f"  {'':48}{'parameters':>12}{'ms/step':>9}{'tokens/s':>10}{'vs BERT':>9}")
        for name, row in found["rows"].items():
            show(
                f"  {name:48}{row['parameters']:12,}{row['ms_per_step']:9.1f}"
                f"{row['tokens_per_cpu_second']:10.0f}{row['vs_bert']:9.2f}"
                f"  ({row['range'][0]:.2f} to {row['range'][1]:.2f})"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
