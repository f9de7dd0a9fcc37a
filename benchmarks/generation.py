"""Greedy generation against Transformers' `generate`, tokens per CPU second.

Both models are Llama-shaped with the same random weights: width 256, 8 layers, 8 heads, feed-forward 704, fp32, head
included. A prompt of 16 tokens is continued by 256, at batch 1 and at batch 8, each with its KV cache. The two take
turns in one process on one thread, so that a busy machine slows both; the figure is the median over the turns of the
ratio of CPU seconds. The whole call counts, from prompt ids to all ids: StackWise's time holds the preparation of its
decoding plan. As a check that both do the same work, the share of equal tokens is printed.

    python benchmarks/generation.py                       # about three minutes
    python benchmarks/generation.py --turns 3 --json

Needs `pip install transformers` for the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack

WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 8, 8, 704


def make_peer(vocab_size: int, max_seq_len: int) -> Any:
    """Transformers' Llama, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=max_seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= (
            50  # a random model's logits lie close together; spread, no rounding swaps the largest
        )
    return model


def make_rack(peer: Any, vocab_size: int, max_seq_len: int) -> Rack:
    """A rack with the weights of the peer."""
    rack = create_simple_rack(
        LAYERS,
        1,
        WIDTH,
        FEED_FORWARD,
        HEADS,
        vocab_size,
        attention_preset="gpt_style",
        tie_embeddings=False,
        max_seq_len=max_seq_len,
    ).eval()

    def paired(weight: Tensor) -> Tensor:
        """Rows of a head in the order of our rotation: its pairs are neighbours, the peer's half a head apart."""
        return weight.view(HEADS, 2, -1, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)

    with torch.no_grad():
        rack.embedding.weight.copy_(peer.model.embed_tokens.weight)
        rack.norm.weight.copy_(peer.model.norm.weight)
        rack.head.matrix.copy_(peer.lm_head.weight)
        for block, layer in zip(rack.blocks(), peer.model.layers, strict=True):
            pairs: list[tuple[nn.Module, nn.Module]] = [
                (block.attn.v, layer.self_attn.v_proj),
                (block.attn.o, layer.self_attn.o_proj),
                (block.ffn.gate, layer.mlp.gate_proj),
                (block.ffn.up, layer.mlp.up_proj),
                (block.ffn.down, layer.mlp.down_proj),
                (block.attn_norm, layer.input_layernorm),
                (block.ffn_norm, layer.post_attention_layernorm),
            ]
            for ours, theirs in pairs:
                ours.weight.copy_(theirs.weight)
            block.attn.q.weight.copy_(paired(layer.self_attn.q_proj.weight))
            block.attn.k.weight.copy_(paired(layer.self_attn.k_proj.weight))
    return rack


def cpu_seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    out = call()
    return time.process_time() - started, out


def measure(
    *,
    batch_sizes: Sequence[int] = (1, 8),
    turns: int = 7,
    n_prompt: int = 16,
    n_new: int = 256,
    vocab_size: int = 65,
    report: Callable[[str], object] = lambda line: None,
) -> list[dict[str, float]]:
    """One entry per batch size: median tokens per CPU second of both, median ratio and its range, equal tokens.

    `report` receives a line per turn. One untimed turn comes first.
    """
    torch.set_num_threads(1)
    peer = make_peer(vocab_size, n_prompt + n_new)
    rack = make_rack(peer, vocab_size, n_prompt + n_new)
    results = []
    for batch in batch_sizes:
        seconds: list[tuple[float, float]] = []
        equal = []
        for turn in range(-1, turns):
            generator = torch.Generator().manual_seed(turn + 1)
            ids = torch.randint(0, vocab_size, (batch, n_prompt), generator=generator)
            theirs, expected = cpu_seconds(
                lambda ids=ids: peer.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n_new,
                    min_new_tokens=n_new,
                    do_sample=False,
                    use_cache=True,
                )
            )
            ours, out = cpu_seconds(lambda ids=ids: rack.generate(ids, max_new_tokens=n_new, temperature=0.0))
            assert out.shape == expected.shape
            if turn < 0:
                continue
            seconds.append((theirs, ours))
            equal.append(float((out == expected)[:, n_prompt:].float().mean()))
            report(
                f"batch {batch}, turn {turn + 1}: {theirs:.2f} s and {ours:.2f} s, ratio {theirs / ours:.2f}"
            )
        ratios = [theirs / ours for theirs, ours in seconds]
        results.append(
            {
                "batch": batch,
                "transformers_tokens_per_cpu_second": batch
                * n_new
                / statistics.median(t for t, _ in seconds),
                "stackwise_tokens_per_cpu_second": batch * n_new / statistics.median(t for _, t in seconds),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "equal_tokens": statistics.mean(equal),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    options = parser.parse_args()
    results = measure(
        batch_sizes=options.batch,
        turns=options.turns,
        n_prompt=options.prompt,
        n_new=options.new,
        vocab_size=options.vocab,
        report=(lambda line: None) if options.json else print,
    )
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print("\nbatch  Transformers  StackWise  (tokens per CPU second)  ratio  range        equal tokens")
    for row in results:
        print(
            f"{row['batch']:5}  {row['transformers_tokens_per_cpu_second']:12.0f}  "
            f"{row['stackwise_tokens_per_cpu_second']:9.0f}  {'':23}  {row['ratio']:5.2f}  "
            f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}  {row['equal_tokens']:.4f}"
        )


if __name__ == "__main__":
    main()
