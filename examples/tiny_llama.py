"""A tiny Llama that grows by copying its stacks: 2, then 4 stacks, everything training all the time.

RMSNorm, SwiGLU, rotary positions, four query heads on one key-value head. Shows: the plan of every stage against what the
run then counted, and the validation loss beside that of the same model trained end to end with the same FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from stackwise import StackWiseConfig, plan, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/examples", help="folder of the run folders")
    options = parser.parse_args(arguments)
    steps = 3 if options.quick else 60

    def configure(run_id: str, *overrides: str) -> StackWiseConfig:
        return StackWiseConfig.from_yaml(
            "tiny-llama",
            [
                "model.d_model=64",
                "model.n_heads=4",
                "model.n_kv_heads=1",
                "model.max_seq_len=128",
                "model.architecture.n_stacks=4",
                "model.architecture.blocks_per_stack=1",
                "training.batch_size=8",
                "training.seq_len=128",
                "training.warmup_steps=0",
                "training.optimizer.lr=4e-3",
                f"training.run_id={run_id}",
                "data.max_bytes=400000",
                f"evaluation.batches={1 if options.quick else 8}",
                "checkpoint.overwrite=true",
                f"checkpoint.dir={options.out}",
                *overrides,
            ],
        )

    grown = configure(
        "llama-grown",
        f"training.max_steps={steps}",
        "training.progressive.enabled=true",
        "training.progressive.building_mode=grow",
        "training.progressive.growth_factor=2",
        "training.progressive.growth_at=0.5",
    )
    planned = plan(grown)
    flops = planned.total_flops
    end_to_end = configure("llama-end-to-end", "training.max_steps=1")
    same = round(flops / plan(end_to_end).total_flops)
    end_to_end = configure("llama-end-to-end", f"training.max_steps={same}")

    results: dict[str, dict[str, Any]] = {
        c.training.run_id: train(c, sinks=[], report=False) for c in (grown, end_to_end)
    }
    print("stage        stacks  steps  planned MB  counted MB  validation loss")
    for row, entry in zip(planned.stages, results["llama-grown"]["training_history"], strict=True):
        sizes = f"{sum(row.bytes.values()) / 1e6:10.2f}  {entry['bytes']['total'] / 1e6:10.2f}"
        print(f"{row.name:<12} {row.n_stacks:>6}  {row.steps:>5}  {sizes}  {entry['eval_loss']:15.3f}")
    print(f"end to end        4  {same:>5}   the same FLOPs ({flops / 1e9:.0f} G)   ", end="")
    print(f"{results['llama-end-to-end']['eval_loss']:12.3f}")


if __name__ == "__main__":
    main()
