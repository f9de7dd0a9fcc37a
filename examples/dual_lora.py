"""Two adapter sets at once: older stacks are frozen and go on learning through small matrices.

Every stack gets a set `stack` when it is made; older ones get a second set `trunk` when a younger stack arrives. Both act:
y = W x + stack(x) + trunk(x). Shows: what trains in each stage, that the frozen matrices keep every bit, and the held-out
loss against the same run with a trunk that does not learn.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from stackwise import ProgressiveRackBuilder, ProgressiveTrainer, StackWiseConfig

LENGTH = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    text = inspect.getsource(argparse)
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([alphabet.index(c) for c in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = [{"input_ids": rows[::10]}], rows[torch.arange(len(rows)) % 10 > 0]
    batches = [{"input_ids": batch} for batch in rows.split(16)]
    adapters = {
        "qlora_enabled": True,
        "qlora_rank": 8,
        "progressive_qlora": True,
        "progressive_qlora_rank": 4,
        "qlora_lr": 2e-3,
        "trunk_strategy": "qlora",
    }

    def run(**progressive: Any) -> tuple[ProgressiveRackBuilder, list[dict[str, Any]]]:
        """Grow to three stacks; the builder, and what every stage came to."""
        config = StackWiseConfig.from_dict(
            {
                "model": {
                    "d_model": 96,
                    "n_heads": 4,
                    "vocab_size": len(alphabet),
                    "max_seq_len": LENGTH,
                    "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
                },
                "training": {
                    "seq_len": LENGTH,
                    "max_steps": 3 if quick else 100,
                    "warmup_steps": 1 if quick else 10,
                    "optimizer": {"lr": 4e-3},
                    "progressive": {"joint_tuning": False, **progressive},
                },
            }
        )
        builder = ProgressiveRackBuilder(config)
        result = ProgressiveTrainer(config).train_progressively(builder, batches, eval_dataloader=held_out)
        return builder, result["training_history"]

    builder, adapted = run(**adapters)
    _, frozen = run()
    print("stage    trains with adapters  held out  trains with a frozen trunk  held out")
    for one, other in zip(adapted, frozen, strict=True):
        print(
            f"{one['name']:<8} {one['trainable_params']:>20,}  {one['eval_loss']:>8.3f}"
            f"  {other['trainable_params']:>26,}  {other['eval_loss']:>8.3f}"
        )
    print("\nstack  adapter sets, their ranks")
    for place in range(builder.n_stacks):
        info = builder.get_stack_info(place)
        print(f"{place:>5}  " + ", ".join(f"{name} {size['rank']}" for name, size in info["lora"].items()))

    rack = builder.build_rack().eval()
    with torch.no_grad():
        before = rack(held_out[0]["input_ids"])
        for place in range(builder.n_stacks):
            for name in builder.get_stack_info(place)["lora"]:
                builder.merge_lora(place, name)
        after = builder.build_rack().eval()(held_out[0]["input_ids"])
    print(f"\nfolded into the weights, the logits differ by at most {(after - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
