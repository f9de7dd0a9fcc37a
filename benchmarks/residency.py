"""What streaming costs and saves: CPU time and counted bytes of a training step, resident, recomputed and streamed.

Per kind of stage and number of stacks: all weights on the device; the same with the activations computed again in the
backward pass; and every block streamed from host memory (`training.residency` and `trunk_residency` streamed). The
three compute the same numbers to the last bit, which is checked. One thread, fp32, AdamW, two steps of warm-up; CPU
seconds are the least of the steps that follow. "device" is the counted peak of a step (`training/counting.py`),
"without the head" leaves out embedding and head with their gradients and moments, "host" is what is off the device.
A CPU copies weights within one memory, so its times show the work of streaming, not the speed of a bus.

    python benchmarks/residency.py [--stacks 4 8 16] [--width 256] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.objectives.base import Example
from stackwise.objectives.causal import CausalLM
from stackwise.training.counting import StepBytes
from stackwise.training.device import keep_freed_memory
from stackwise.training.optim import Optimizers
from stackwise.trunk.residency import reside

STAGES = {
    "end to end": ("all",),
    "append": ("new", "norm", "head"),
    "prepend": ("stack:0",),
    "cyclic": ("stack:1",),
}
RESIDENCY: dict[str, dict[str, Any]] = {
    "resident": {},
    "recomputed": {"recompute": True},
    "streamed": {"frozen": "streamed", "trained": "streamed"},
}
ROWS, TOKENS, VOCAB = 8, 128, 512


def measure(
    stacks: int, width: int, selectors: tuple[str, ...], residency: str, steps: int
) -> dict[str, Any]:
    """One rack, stepped a few times."""
    config = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": width,
                "n_heads": width // 64,
                "vocab_size": VOCAB,
                "max_seq_len": TOKENS,
                "architecture": {"n_stacks": stacks, "blocks_per_stack": 1},
            },
            "training": {"seq_len": TOKENS, "progressive": {"max_stacks": 99, "global_head_blocks": 0}},
        }
    )
    rack = Rack(rack_spec(config, stacks))
    stage = Stage("measured", stacks, selectors, 1)
    split = apply_training(rack, trained_units(rack.spec, stage))
    reside(rack, torch.device("cpu"), **RESIDENCY[residency])
    optimizers = Optimizers(rack, stage, config.training)
    generator = torch.Generator().manual_seed(0)
    objective, seconds, losses, counted = CausalLM(), [], [], {}
    for index in range(2 + steps):
        ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=generator)
        example = Example(ids, ids.roll(-1, 1))
        count = StepBytes(rack)
        started = time.process_time()
        if index == 0:
            with count.counting():
                losses.append(_both_ways(rack, objective, example, split.prefix))
            optimizers.step()
            counted = count.result(optimizers)
        else:
            losses.append(_both_ways(rack, objective, example, split.prefix))
            optimizers.step()
        optimizers.zero_grad()
        seconds.append(time.process_time() - started)
    io = [p for name, p in rack.named_parameters() if name.startswith(("embedding.", "head."))]
    head = sum(p.nbytes * (4 if p.requires_grad else 1) for p in io)
    return {
        "stacks": stacks,
        "residency": residency,
        "seconds": min(seconds[2:]),
        "device": counted["peak"],
        "without_head": counted["peak"] - head,
        "host": sum(counted["host"].values()),
        "items": counted,
        "losses": losses,
    }


def _both_ways(rack: Rack, objective: CausalLM, example: Example, prefix: int) -> float:
    hidden = rack.forward_features(example.input_ids, prefix=prefix)
    loss, weight = objective.loss(hidden, rack.head, example)
    (loss / weight).backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stacks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name, selectors in STAGES.items():
        for stacks in options.stacks:
            group = [measure(stacks, options.width, selectors, r, options.steps) for r in RESIDENCY]
            assert all(row["losses"] == group[0]["losses"] for row in group), "the same numbers"
            rows += [{"stage": name, **row} for row in group]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| stage | stacks | residency | CPU s per step | device MB | without the head | host MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = " | ".join(f"{row[item] / 1e6:.1f}" for item in ("device", "without_head", "host"))
        print(f"| {row['stage']} | {row['stacks']} | {row['residency']} | {row['seconds']:.2f} | {sizes} |")


if __name__ == "__main__":
    main()
