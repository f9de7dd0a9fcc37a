"""Counted bytes of every stage of an append run, against an expectation written down by hand.

The counts are taken inside a real run (`training/counting.py`): weights and gradients tensor by tensor, the optimizer's
moments, and every storage that autograd keeps between forward and backward, by hooks. The expectation, for fp32, RMSNorm
before each sub-layer, SwiGLU, rotary positions, AdamW, N = batch x tokens, width D, key-value width K, feed-forward F,
h heads, vocabulary V:

    weights         4 P                      P all parameters
    gradients       4 P'                     P' trained parameters
    moments         8 P' + 4 per tensor      two moments, one step counter
    a trained block 4 N (5 D + D + 2 K + 4 F + 2 + h)
                    inputs and outputs of both norms and the attention's output (5 D), q (D), k and v (2 K), the gate
                    before and after its activation, up, and their product (4 F), two norms' scales, the softmax's
                    normaliser per head
    around them     4 N (D + 1) + 4 N D + 4 V D + table
                    the final norm's input and scale, the loss's gradients to hidden states and head, the rotation table
    embedding       8 N                      its token ids, where it trains
    a frozen block  0

Usage: python benchmarks/memory.py [--stacks 4] [--blocks 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from stackwise.config.root import StackWiseConfig
from stackwise.planning.plan import plan
from stackwise.training.run import train


def make_config(folder: str, stacks: int, blocks: int, **progressive: Any) -> StackWiseConfig:
    """Width 128, 4 heads of which 2 for keys and values, context 64, batch 12, one step per stage, fp32."""
    return StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 128,
                "n_heads": 4,
                "n_kv_heads": 2,
                "max_seq_len": 64,
                "architecture": {"n_stacks": stacks, "blocks_per_stack": blocks},
            },
            "training": {
                "batch_size": 12,
                "seq_len": 64,
                "max_steps": 1,
                "dtype": "float32",
                "device": "cpu",
                "progressive": {"max_stacks": stacks, **progressive},
            },
            "data": {"max_bytes": 50_000, "doc_mask": False},
            "checkpoint": {"dir": folder, "overwrite": True},
            "evaluation": {"batches": 1},
            "generation": {"max_new_tokens": 1},
            "tracking": {"report": False},
        }
    )


def expectation(
    config: StackWiseConfig,
    n_blocks: int,
    trained: int,
    parameters: int,
    trainable: int,
    tensors: int,
    first: bool,
) -> dict[str, int]:
    """Bytes by item of a stage with `n_blocks` blocks of which `trained` train; `first`: the embedding trains too."""
    model, training = config.model, config.training
    n, d, f = training.batch_size * training.seq_len, model.d_model, model.ffn_width
    heads, width = model.n_heads, model.d_model // model.n_heads
    kv = (model.n_kv_heads or heads) * width
    vocab = 258  # bytes and two special tokens
    block = 4 * n * (5 * d + d + 2 * kv + 4 * f + 2 + heads)
    around = 4 * n * (d + 1) + 4 * n * d + 4 * vocab * d + 8 * model.max_seq_len * width // 2
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * trainable,
        "moments": 8 * trainable + 4 * tensors,
        "activations": trained * block + around + (8 * n if first else 0),
    }


def measure(stacks: int = 4, blocks: int = 2) -> list[dict[str, Any]]:
    """One row per stage of the append run, then the end-to-end run: counted and expected bytes by item."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("append", {"enabled": True}), ("end to end", {"enabled": False})):
            config = make_config(folder, stacks, blocks, **options)
            planned = plan(config).stages
            history = train(config, sinks=[])["training_history"]
            for stage, entry in zip(planned, history, strict=True):
                trained = stage.total_blocks - stage.prefix_blocks
                first = "embedding" in stage.trains or "all" in stage.trains
                per_block, rest = (
                    9,
                    2 + (1 if first else 0),
                )  # tensors: 7 matrices and 2 norms; norm, head, embedding
                expected = expectation(
                    config,
                    stage.total_blocks,
                    trained,
                    stage.parameters,
                    stage.trainable_parameters,
                    trained * per_block + rest,
                    first,
                )
                counted = {item: entry["bytes"][item] for item in expected}
                rows.append(
                    {
                        "run": name,
                        "stage": stage.name,
                        "blocks": stage.total_blocks,
                        "trained_blocks": trained,
                        "counted": counted,
                        "expected": expected,
                        "total": sum(counted.values()),
                        "ratio": sum(counted.values()) / sum(expected.values()),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stacks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2, help="blocks per stack")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.stacks, options.blocks)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    whole = rows[-1]["total"]
    print(
        "| run | stage | blocks, trained | weights | gradients | moments | activations | total | to expectation | to end to end |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        items = " | ".join(f"{row['counted'][item] / 1e6:.2f}" for item in row["counted"])
        print(
            f"| {row['run']} | {row['stage']} | {row['blocks']}, {row['trained_blocks']} | {items} | "
            f"{row['total'] / 1e6:.2f} | {row['ratio']:.4f} | {row['total'] / whole:.2f} |"
        )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"\nMB. Largest deviation from the expectation: {100 * worst:.2f} %")


if __name__ == "__main__":
    main()
