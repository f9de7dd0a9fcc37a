"""A rack of unlike stacks: a window of attention at the bottom, experts in the middle, full attention on top.

Each stack says for itself how its blocks are made; the rack is trained stack by stack, then generates. Shows: what the
stacks hold, the loss as each of them trains, and a text.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import torch

from stackwise import ArchitectureTrainer, StackWiseConfig, create_rack_from_specs

LENGTH = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    text = inspect.getsource(argparse)
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([alphabet.index(c) for c in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = rows[::10], rows[torch.arange(len(rows)) % 10 > 0]

    kinds = {
        "window of 16": {"n_heads": 4, "window": 16, "ffn_type": "gelu"},
        "4 experts, 2 per token": {"n_heads": 4, "experts": {"n_experts": 4, "top_k": 2}},
        "one key-value head": {"n_heads": 4, "n_kv_heads": 1, "ffn_type": "swiglu"},
    }
    rack = create_rack_from_specs(
        vocab_size=len(alphabet),
        d_model=96,
        tie_embeddings=False,
        stack_specs=[
            {"stack_id": i, "n_blocks": 1, "block_spec": {"causal": True, **kind}}
            for i, kind in enumerate(kinds.values())
        ],
    )
    config = StackWiseConfig.from_dict(
        {
            "training": {
                "unit": "stack",
                "seq_len": LENGTH,
                "max_steps": 3 if quick else 150,
                "warmup_steps": 1 if quick else 20,
                "optimizer": {"lr": 4e-3},
                "progressive": {"training_objective": "clm"},
            }
        }
    )
    batches = [{"input_ids": batch} for batch in rows.split(16)]
    result = ArchitectureTrainer(config).train_architecture(rack, batches, [{"input_ids": held_out}])
    print("stack                    parameters  trained  loss first  last  held out")
    for name, stack, stage in zip(kinds, rack.stacks, result["training_history"], strict=True):
        size = sum(p.numel() for p in stack.parameters())
        print(
            f"{name:<24} {size:>10,}  {stage['trainable_params']:>7,}  {stage['loss_first']:>10.2f}  "
            f"{stage['loss_last']:.2f}  {stage['eval_loss']:8.2f}"
        )

    prompt = "    def "
    given = torch.tensor([[alphabet.index(c) for c in prompt]])
    longer = rack.eval().generate(given, max_new_tokens=100, temperature=0.6, seed=1)
    print("".join(alphabet[i] for i in longer[0].tolist()))


if __name__ == "__main__":
    main()
