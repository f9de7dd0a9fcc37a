"""A causal model in the manner of GPT-2, grown from one stack to three on the text of Python's standard library.

Learned positions, layer norm, biases and GELU; each new stack trains on top of a frozen trunk, then all train together.
Shows: the run as it goes, the validation loss around each growth, and text that the model writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stackwise import StackWiseConfig, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/examples", help="folder of the run folder")
    options = parser.parse_args(arguments)

    config = StackWiseConfig.from_yaml(
        "demo",
        [
            "model.norm=layernorm",
            "model.pos_encoding=learned",
            "model.ffn_type=gelu_tanh",
            "model.bias=true",
            "model.qk_norm=false",
            "model.short_conv=0",
            "model.architecture.n_stacks=3",
            "training.progressive.max_stacks=3",
            "training.progressive.stage_weights=[2,1,1]",
            f"training.max_steps={6 if options.quick else 90}",
            f"training.warmup_steps={2 if options.quick else 15}",
            "training.batch_size=8",
            "training.run_id=gpt2",
            "data.max_bytes=400000",
            f"evaluation.batches={1 if options.quick else 8}",
            "generation.max_new_tokens=120",
            "checkpoint.overwrite=true",
            f"checkpoint.dir={options.out}",
        ],
    )
    result = train(config, report=False)
    print(f"{result['architecture']['params']:,} parameters, {result['eval_loss']:.3f} nats per byte")
    print((Path(result["run_dir"]) / "sample.txt").read_text())


if __name__ == "__main__":
    main()
