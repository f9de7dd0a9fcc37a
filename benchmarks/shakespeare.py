"""Quality per CPU second on the character model everybody trains first.

One text file (1.1 million characters of Shakespeare in the published figures), 65 characters, first 90 % to train on,
last 10 % to validate, context 64, batch 12, 2000 steps (1.536 million tokens), at most 0.81 million parameters, no
dropout. Validation: mean nats per character over all non-overlapping windows of 64.

StackWise trains its preset `shakespeare-char` through the same loop as `stackwise train`. The peer is litgpt's
Llama-style block with the recipe that served it best (AdamW 1e-3 to 1e-4, cosine, warm-up 100, fp32). Both run in one
process on one thread and alternate in chunks of 50 steps, so that a busy machine slows both; figures are CPU seconds
of training steps, evaluation left out.

    python benchmarks/shakespeare.py --data input.txt --seeds 3          # about five minutes a seed
    python benchmarks/shakespeare.py --data input.txt --seeds 1 --no-peer

Needs `pip install litgpt` for the peer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.data.loader import EvalLoader, TokenLoader
from stackwise.data.prepare import prepare
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.training.device import pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine
from stackwise.training.validate import validate

CHUNK = 50
TARGET = 1.681  # what litgpt's block reaches after 2000 steps


class Peer:
    """litgpt's block, stepped on demand."""

    def __init__(self, batches: Iterator[dict[str, Tensor]], vocab_size: int, steps: int, seed: int) -> None:
        from litgpt import GPT, Config

        torch.manual_seed(seed)
        self.model = GPT(
            Config(
                block_size=64,
                vocab_size=vocab_size,
                padded_vocab_size=vocab_size,
                n_layer=4,
                n_head=4,
                n_embd=128,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                intermediate_size=344,
            )
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.batches, self.steps, self.step, self.seconds = batches, steps, 0, 0.0
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def run(self, count: int) -> None:
        started = time.process_time()
        for _ in range(count):
            progress = max(0.0, (self.step - 100) / (self.steps - 100))
            rate = (
                (self.step + 1) / 100 if self.step < 100 else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
            )
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * rate
            ids, labels = targets(next(self.batches))
            loss = F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        self.seconds += time.process_time() - started

    @torch.no_grad()
    def loss(self, evaluation: EvalLoader) -> float:
        total = count = 0.0
        for batch in evaluation:
            ids, labels = targets(batch)
            total += float(F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten(), reduction="sum"))
            count += labels.numel()
        return total / count


def targets(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and the next character of each."""
    ids = batch["input_ids"]
    return ids, torch.cat((ids[:, 1:], batch["next_ids"][:, None]), dim=1)


def trial(data: Path, seed: int, peer: bool, overrides: list[str]) -> dict[str, Any]:
    """One seed: both models, chunk by chunk."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"data.path={data}", f"training.seed={seed}", f"data.cache_dir={folder}", *overrides]
        config = StackWiseConfig.from_yaml("shakespeare-char", keys)
        corpus = prepare(config.data, folder)
        config, _ = resolve(config, vocab_size=corpus.tokenizer.vocab_size)
        config.tracking.log_interval = CHUNK
        config.evaluation.interval = None

        def loader(of: int) -> TokenLoader:
            return TokenLoader(corpus.train, seq_len=64, batch_size=12, seed=of)

        device = pick_device("cpu")
        dtype = pick_dtype(config.training.dtype, device)
        evaluation = EvalLoader(corpus.validation, seq_len=64, batch_size=128)
        stage_list = stages(config, loader(seed).steps_per_epoch)
        total = sum(stage.steps for stage in stage_list)
        rival = Peer(iter(loader(seed)), corpus.tokenizer.vocab_size, total, seed) if peer else None
        curve: dict[int, tuple[float, float]] = {}
        clock = {"seconds": 0.0, "since": 0.0}

        def at_log(event: dict[str, Any]) -> None:
            """Stop our clock, let the peer do as many steps, look at the losses, go on."""
            if event["event"] != "step" or event["step"] % CHUNK:
                return
            clock["seconds"] += time.process_time() - clock["since"]
            step = event["step"]
            if rival is not None:
                rival.run(CHUNK)
            if step % 250 == 0 or (step % CHUNK == 0 and step > total // 3 and not reached()):
                loss, count = validate(engine.rack, evaluation, dtype=dtype)
                curve[step] = (clock["seconds"], loss / count)
            clock["since"] = time.process_time()

        def reached() -> bool:
            return any(loss <= TARGET for _, loss in curve.values())

        spec = rack_spec(config, None)
        engine = Engine(
            config,
            Rack(spec, seed=seed),
            stage_list,
            loader(seed),
            device=device,
            dtype=dtype,
            hooks=Hooks(emit=at_log),
        )
        clock["since"] = time.process_time()
        engine.run()
        seconds = clock["seconds"]
        first = next(((s, t) for s, (t, loss) in sorted(curve.items()) if loss <= TARGET), None)
        result: dict[str, Any] = {
            "seed": seed,
            "parameters": engine.rack.get_parameter_count(),
            "dtype": str(dtype).removeprefix("torch."),
            "loss": curve[total][1],
            "cpu_seconds": seconds,
            "curve": {step: loss for step, (_, loss) in sorted(curve.items()) if step % 250 == 0},
            "reaches_target_at": first and {"step": first[0], "cpu_seconds": first[1]},
        }
        if rival is not None:
            result["peer"] = {
                "parameters": rival.parameters,
                "loss": rival.loss(evaluation),
                "cpu_seconds": rival.seconds,
            }
            result["seconds_ratio"] = seconds / rival.seconds
            result["target_ratio"] = first and first[1] / rival.seconds
        return result


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the text file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the preset")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for seed in range(1, options.seeds + 1):
        result = trial(options.data, seed, not options.no_peer, options.overrides)
        results.append(result)
        show(json.dumps(result))
    for key in ("loss", "cpu_seconds", "seconds_ratio", "target_ratio"):
        values = [r[key] for r in results if r.get(key) is not None]
        if values:
            show(f"{key}: mean {statistics.mean(values):.4f}, from {min(values):.4f} to {max(values):.4f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
