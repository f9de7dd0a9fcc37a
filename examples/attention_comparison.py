"""Six kinds of attention on the same text with the same steps: what they hold, cost and reach.

Multi-head, grouped, latent, kernel (scores and linear time) and latent grouped kernel attention, each in a causal model of
two blocks. Shows: a table with the parameters of attention, CPU seconds of the training and the held-out loss.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch

from stackwise import ArchitectureTrainer, StackWiseConfig, create_rack_from_config

LENGTH = 64
KINDS: dict[str, dict[str, Any]] = {
    "multi-head": {"attention_preset": "gpt_style"},
    "grouped, 1 of 4": {"attention_preset": "efficient_gqa"},
    "latent": {"attention_preset": "mla_attention"},
    "kernel, gaussian": {"attention_preset": "kernel_attention"},
    "kernel, linear time": {
        "attention_preset": "kernel_attention",
        "attention_overrides": {"kernel_mode": "linear"},
    },
    "latent, grouped, kernel": {"attention_preset": "mlgka"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    text = inspect.getsource(argparse)
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([alphabet.index(c) for c in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = rows[::10], rows[torch.arange(len(rows)) % 10 > 0]
    batches = [{"input_ids": batch} for batch in rows.split(16)]
    steps = 2 if quick else 150

    print("attention                parameters    CPU s  held-out loss")
    for name, kind in KINDS.items():
        overrides = {"attention_mode": "causal", **kind.get("attention_overrides", {})}
        config = StackWiseConfig.from_dict(
            {
                "model": {
                    "d_model": 64,
                    "n_heads": 4,
                    "vocab_size": len(alphabet),
                    "max_seq_len": LENGTH,
                    "architecture": {"n_stacks": 1, "blocks_per_stack": 2},
                    **kind,
                    "attention_overrides": overrides,
                },
                "training": {
                    "unit": "rack",
                    "seq_len": LENGTH,
                    "max_steps": steps,
                    "warmup_steps": steps // 5,
                    "optimizer": {"lr": 4e-3},
                    "progressive": {"enabled": False, "training_objective": "clm"},
                },
            }
        )
        rack = create_rack_from_config(config)
        attention = sum(p.numel() for n, p in rack.named_parameters() if ".attn." in n)
        start = time.process_time()
        result = ArchitectureTrainer(config).train_architecture(rack, batches, [{"input_ids": held_out}])
        seconds = time.process_time() - start
        print(f"{name:<24} {attention:>10,}  {seconds:>7.1f}  {result['eval_loss']:>13.3f}")
    print(f"{steps} steps of 16 rows of {LENGTH} characters each, one seed: differences of 0.02 are chance")


if __name__ == "__main__":
    main()
