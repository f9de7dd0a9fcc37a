"""QLoRA: a model that has learned Python is stored in 4 bits and learns prose through small matrices.

The text is that of the standard library: sources first, then the reference manual that `help()` shows. Shows: bytes of the
weights before and after, how many numbers train, and the held-out loss on both texts at each point.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch

from stackwise import (
    PrecisionManager,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
)

LENGTH = 64


def split(text: str, alphabet: str) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Batches to train on, and held-out rows [n, T]."""
    ids = torch.tensor([alphabet.index(c) for c in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    train, held_out = rows[torch.arange(len(rows)) % 10 > 0], rows[::10]
    return [{"input_ids": batch} for batch in train.split(16)], held_out[:64]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick

    code = inspect.getsource(argparse)
    prose = "\n".join(topics[name] for name in sorted(topics))[: len(code)]
    alphabet = "".join(sorted(set(code + prose)))
    code_batches, code_held_out = split(code, alphabet)
    prose_batches, prose_held_out = split(prose, alphabet)

    config = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 128,
                "n_heads": 4,
                "vocab_size": len(alphabet),
                "max_seq_len": LENGTH,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {
                "seq_len": LENGTH,
                "max_steps": 3 if quick else 150,
                "warmup_steps": 1 if quick else 20,
                "optimizer": {"lr": 3e-3},
            },
        }
    )
    builder = ProgressiveRackBuilder(config)

    def report(what: str) -> None:
        rack = builder.build_rack().eval()
        bytes_ = sum(info["bytes"] for info in builder.get_rack_info()["stack_info"])
        with torch.no_grad():
            losses = [loss_of(rack, held_out).item() for held_out in (code_held_out, prose_held_out)]
        print(
            f"{what:<34} {bytes_ / 1e3:>9.0f}  {rack.get_trainable_parameter_count():>7,}"
            f"  {losses[0]:>7.3f}  {losses[1]:>7.3f}"
        )

    print("                                   stacks, kB   trains   python    prose")
    ProgressiveTrainer(config).train_progressively(builder, code_batches)
    report("trained on Python, 32 bits")

    manager = PrecisionManager()
    for stack in builder.build_rack().stacks:
        manager.set_stack_precision(stack, "qlora")
    for place in range(builder.n_stacks):
        builder.add_lora(place, rank=8, alpha=16)
    builder.freeze_all_but_qlora()
    report("stored in 4 bits, adapters added")

    rack = builder.build_rack().train()  # from here on as with any module
    optimizer = torch.optim.AdamW([p for p in rack.parameters() if p.requires_grad], lr=4e-3)
    for step in range(3 if quick else 200):
        ids = prose_batches[step % len(prose_batches)]["input_ids"]
        optimizer.zero_grad()
        loss_of(rack, ids).backward()
        optimizer.step()
    report("adapters trained on prose")


def loss_of(rack: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Nats per character; ids [B, T]."""
    return torch.nn.functional.cross_entropy(rack(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


if __name__ == "__main__":
    main()
