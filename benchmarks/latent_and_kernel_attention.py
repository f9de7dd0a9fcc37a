"""Decoding from a latent cache, and the time of linear attention per token, in CPU seconds.

Latent decoding: a model of latent attention continues a text of 2,048 tokens, one token at a time from its cache, once
with kv_up absorbed into queries and outputs and once in the plain form, which builds keys and values of all held tokens
anew. The two take turns; the figure is the median over the turns of the ratio of CPU seconds. The cache's bytes per
token are compared with (kv_rank + rope_dim) numbers per block, and with those of multi-head attention. The logits of
both forms are compared, too.

Kernel attention: forward and backward of one causal layer in kernel_mode linear over rows of 1k to 16k tokens, per
token; beside it softmax attention of the same widths.

    python benchmarks/latent_and_kernel_attention.py                     # about two minutes
    python benchmarks/latent_and_kernel_attention.py --turns 3 --json benchmarks/records/latent_and_kernel.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from stackwise.model.attention.mha import Attention
from stackwise.model.attention.mla import LatentAttention
from stackwise.model.block import Context
from stackwise.model.block_spec import BlockSpec
from stackwise.model.factory import create_simple_rack
from stackwise.model.init import Start, init_weights
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.visibility import Visibility

WIDTH, HEADS, BLOCKS, HELD = 512, 8, 2, 2048
LATENT = LatentSpec(q_rank=128, kv_rank=64, rope_dim=32)
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def decoding(turns: int, tokens: int) -> dict[str, Any]:
    """CPU seconds per token of both forms, in turns."""
    rack = create_simple_rack(
        1,
        BLOCKS,
        WIDTH,
        4 * WIDTH,
        HEADS,
        256,
        attention_preset="mla_attention",
        causal=True,
        latent=LATENT,
        max_seq_len=HELD + tokens,
    ).eval()
    ids = torch.randint(0, 256, (1, HELD + tokens), generator=torch.Generator().manual_seed(1))
    absorbs = LatentAttention.absorbs
    seconds: dict[str, list[float]] = {"absorbed": [], "plain": []}
    logits: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        cache = rack.make_cache(1, HELD + tokens)
        rack(ids[:, :HELD], cache=cache)
        for turn in range(turns + 1):  # the first warms up
            for form in seconds:
                LatentAttention.absorbs = absorbs if form == "absorbed" else lambda *_: False  # type: ignore[assignment,method-assign]
                for held in cache.blocks:
                    held.length = HELD
                start = time.process_time()
                for at in range(HELD, HELD + tokens):
                    logits[form] = rack(ids[:, at : at + 1], cache=cache)
                if turn:
                    seconds[form].append((time.process_time() - start) / tokens)
    LatentAttention.absorbs = absorbs  # type: ignore[method-assign]
    ratios = [p / a for p, a in zip(seconds["plain"], seconds["absorbed"], strict=True)]
    held_bytes = sum(held.held.nbytes for held in cache.blocks) / (HELD + tokens)  # type: ignore[attr-defined]
    plain = create_simple_rack(1, BLOCKS, WIDTH, 64, HEADS, 256, causal=True, max_seq_len=64).make_cache(
        1, 64
    )
    return {
        "shape": f"width {WIDTH}, {HEADS} heads, {BLOCKS} blocks, latent {LATENT}",
        "held tokens": HELD,
        "absorbed ms per token": 1000 * statistics.median(seconds["absorbed"]),
        "plain ms per token": 1000 * statistics.median(seconds["plain"]),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "largest difference of logits": float((logits["absorbed"] - logits["plain"]).abs().max()),
        "cache bytes per token": held_bytes,
        "formula": 4 * BLOCKS * (LATENT.kv_rank + LATENT.rope_dim),
        "bytes per token of multi-head attention": sum(b.keys.nbytes + b.values.nbytes for b in plain.blocks)
        / 64,  # type: ignore[attr-defined]
    }


def linear_time(turns: int) -> list[dict[str, Any]]:
    """CPU microseconds per token of a layer, forward and backward, by the length of the row."""
    kinds = {"linear": KernelSpec("linear", "linear", 64), "softmax": None}
    layers = {}
    for name, kernel in kinds.items():
        layers[name] = Attention(BlockSpec(256, 4, causal=True, kernel=kernel))
        init_weights(layers[name], Start(0, 1), prefix="attn.")
    rows = []
    for length in LENGTHS:
        context = Context(Visibility(length), None, length)
        x = torch.randn(1, length, 256)
        best: dict[str, float] = {}
        for _ in range(turns):
            for name, layer in layers.items():
                start = time.process_time()
                layer(x, context).sum().backward()
                taken = 1e6 * (time.process_time() - start) / length
                best[name] = min(taken, best.get(name, taken))
        rows.append({"tokens": length, **{f"{name} us per token": value for name, value in best.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"torch": torch.__version__, "decoding": decoding(options.turns, options.tokens)}
    for name, value in result["decoding"].items():
        print(f"{name}: {value}")
    result["linear time"] = linear_time(min(3, options.turns))
    for row in result["linear time"]:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
