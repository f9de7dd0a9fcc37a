"""Checkpoints: a run is stopped in the middle, goes on exactly, and is taken apart.

Shows: that a stopped and continued run ends with the very bits of one that ran through, what every commit added to the
disk (frozen stacks are stored once), and a stack that moves to another rack in a file.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackwise import ProgressiveRackBuilder, StackWiseConfig, train


class StopAt:
    """Receives the events of a run, and at a step does what Ctrl-C does: the step is finished and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def emit(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= self.step:
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        """Nothing to close."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/examples", help="folder of the run folders")
    options = parser.parse_args(arguments)
    steps = 4 if options.quick else 40

    def configure(run_id: str, *overrides: str) -> StackWiseConfig:
        return StackWiseConfig.from_yaml(
            "demo",
            [
                "model.d_model=64",
                "model.architecture.n_stacks=3",
                "training.progressive.max_stacks=3",
                "training.progressive.stage_weights=null",
                f"training.max_steps={steps}",
                "training.warmup_steps=2",
                "training.dtype=float32",  # whose sums do not depend on how many rows are computed together
                "training.batch_size=8",
                f"training.run_id={run_id}",
                "data.max_bytes=200000",
                "evaluation.batches=1",
                f"checkpoint.save_interval={steps}",
                "tracking.sample_prompt=null",
                f"checkpoint.dir={options.out}",
                *overrides,
            ],
        )

    straight = train(configure("straight", "checkpoint.overwrite=true"), sinks=[], report=False)
    try:
        sink = StopAt(steps * 3 // 2)
        train(configure("stopped", "checkpoint.overwrite=true"), sinks=[sink], report=False)
    except Exception as stopped:
        if getattr(stopped, "signum", None) != signal.SIGINT:
            raise
        print(stopped)
    resumed = train(configure("stopped"), sinks=[], report=False)
    print(f"went on from step {resumed['resumed_from']}")
    print(f"straight through {straight['eval_loss']!r}")
    print(f"stopped, resumed {resumed['eval_loss']!r}\n")

    small = {"d_model": 32, "n_heads": 4, "vocab_size": 50, "architecture": {"blocks_per_stack": 1}}
    one, other = (
        ProgressiveRackBuilder(StackWiseConfig.from_dict({"model": small, "training": {"seed": seed}}))
        for seed in (1, 2)
    )
    for builder in (one, other):
        builder.append_stack()
    path = one.save_stack(0, Path(options.out) / "stack.safetensors")
    print(
        f"{path.name} holds a stack of {path.stat().st_size:,} bytes; another rack loads it: {other.load_stack(0, path)}"
    )

    stackwise = [sys.executable, "-m", "stackwise"]
    subprocess.run([*stackwise, "ckpt", "ls", resumed["run_dir"]], check=True)


if __name__ == "__main__":
    main()
