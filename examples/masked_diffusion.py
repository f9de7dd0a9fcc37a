"""Masked diffusion: a model that sees both directions writes text by filling in a row of gaps, in any order.

It learns to fill in hidden characters at every share of hidden ones. Shows: the likelihood bound on held-out text before
and after training, and a text that appears as the sampler takes more and more steps.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import torch

from stackwise import ArchitectureTrainer, StackWiseConfig, create_rack_from_config

LENGTH = 48


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    text = inspect.getsource(argparse)
    alphabet = "".join(sorted(set(text)))
    mask = len(alphabet)
    ids = torch.tensor([alphabet.index(c) for c in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = rows[::10], rows[torch.arange(len(rows)) % 10 > 0]

    config = StackWiseConfig.from_yaml(
        "diffusion-char",
        [
            "model.d_model=96",
            "model.d_ff=256",
            "model.architecture.blocks_per_stack=2",
            f"model.vocab_size={mask + 1}",
            f"objective.mask_token_id={mask}",
            "training.unit=rack",
            f"training.max_steps={4 if quick else 700}",
            f"evaluation.passes={1 if quick else 4}",
        ],
    )
    rack = create_rack_from_config(config)
    batches = [{"input_ids": batch} for batch in rows.split(16)]
    result = ArchitectureTrainer(config).train_architecture(rack, batches, [{"input_ids": held_out}])
    uniform = torch.log(torch.tensor(float(mask)))
    print(
        f"at most {result['eval_loss']:.2f} nats per character (bound); a uniform guess costs {uniform:.2f}\n"
    )

    prompt = "    def add_argument(self"
    given = torch.tensor([[alphabet.index(c) for c in prompt]])
    new = LENGTH - len(prompt)
    rack.eval()
    for steps in (1, 4, new):
        done = rack.denoise(
            given, mask_id=mask, max_new_tokens=new, sampler="confidence", steps=steps, temperature=0.5
        )
        print(f"{steps:>2} steps  {''.join(alphabet[i] for i in done.ids[0].tolist())!r}")


if __name__ == "__main__":
    main()
