"""A tiny BERT on a data loader of one's own: it hides characters of Python's sources and learns to fill them in.

Bidirectional attention with rotary positions, as in ModernBERT; 15 % of the characters are corrupted (80 % hidden, 10 %
replaced, 10 % left). Shows: the loss on text that was held out before and after, and what the model puts into gaps.
"""

from __future__ import annotations

import argparse
import argparse as text_source
import inspect
from collections.abc import Sequence

import torch

from stackwise import ArchitectureTrainer, StackWiseConfig, create_rack_from_config

LENGTH = 64


def rows_of(text: str, alphabet: str) -> torch.Tensor:
    ids = torch.tensor([alphabet.index(c) for c in text])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    text = inspect.getsource(text_source)
    alphabet = "".join(sorted(set(text)))
    mask = len(alphabet)
    rows = rows_of(text, alphabet)
    held_out, rows = rows[::10], rows[torch.arange(len(rows)) % 10 > 0]
    batches = [{"input_ids": batch} for batch in rows.split(16)]

    config = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 96,
                "n_heads": 4,
                "vocab_size": mask + 1,
                "max_seq_len": LENGTH,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
                "attention_preset": "bert_style",
                "norm": "layernorm",
                "ffn_type": "geglu",
                "embedding_norm": "learned",
                "short_conv": 3,  # the characters just before and behind
            },
            "objective": {"mask_token_id": mask},
            "training": {
                "unit": "rack",
                "seq_len": LENGTH,
                "max_steps": 4 if quick else 700,
                "warmup_steps": 2 if quick else 50,
                "optimizer": {"lr": 4e-3},
                "progressive": {"enabled": False, "training_objective": "mlm"},
            },
        }
    )
    rack = create_rack_from_config(config)
    evaluation = [{"input_ids": held_out}]
    result = ArchitectureTrainer(config).train_architecture(rack, batches, evaluation)
    print(f"{rack.get_parameter_count():,} parameters")
    print(
        f"held-out loss of a hidden character: {result['eval_loss']:.2f} nats; a uniform guess costs", end=" "
    )
    print(f"{torch.log(torch.tensor(float(mask))):.2f}")

    line = "        if self.option_str#ngs is None:\n            ret##n "
    ids = torch.tensor([[mask if c == "#" else alphabet.index(c) for c in line]])
    with torch.no_grad():
        probabilities = rack.eval()(ids)[0, :, :mask].softmax(-1)
    for place in (ids[0] == mask).nonzero().flatten().tolist():
        best = probabilities[place].topk(3)
        guesses = [f"{alphabet[i]!r} {p:.0%}" for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
        print(f"{line[max(0, place - 10) : place + 10]!r:>28}  {', '.join(guesses)}")


if __name__ == "__main__":
    main()
