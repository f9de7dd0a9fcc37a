"""Masked diffusion over characters: the likelihood bound reached, and the CPU seconds it took.

One text file (1.1 million characters of Shakespeare in the published figures), first 90 % to train on, last 10 % to
validate, context 64, batch 12, 6000 steps (4.6 million tokens), at most 0.81 million parameters, attention in both
directions, no dropout. Both sides learn by the count form: of every row n tokens are hidden, n even over 1 to 64, and
the mean of their losses is the row's.

Validation: the NELBO in nats per character by the count estimator (`stackwise.evaluation.nelbo`): windows of 64, four
passes in which window i hides 1 + (perm[i] mod 64) random positions, the same for both sides, all in fp32. (Where 64
does not divide the number of windows the low counts come once more often; `stackwise eval` evens that out and reads a
few thousandths higher.) On the way there one pass has to do.

StackWise trains its preset `diffusion-char` through the same loop as `stackwise train`. The peer is Transformers'
BertForMaskedLM of the same width, layers, heads and, by its feed-forward width, size, in fp32 with AdamW: 1e-3 to 1e-4,
cosine, warm-up 100, clipping at 1. Both run in one process on one thread and alternate in chunks of 50 steps, so that a
busy machine slows both; figures are CPU seconds of training steps, evaluation left out.

    python benchmarks/diffusion.py --data input.txt                            # about fifteen minutes a seed
    python benchmarks/diffusion.py --data input.txt --no-peer training.max_steps=1000

Needs `pip install transformers` for the peer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.data.corpus import Corpus
from stackwise.data.loader import TokenLoader
from stackwise.data.prepare import prepare
from stackwise.evaluation.nelbo import Nelbo, nelbo
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.objectives.base import IGNORE, Example
from stackwise.objectives.build import objective_of
from stackwise.objectives.denoiser import Denoiser, denoiser_of
from stackwise.training.device import keep_freed_memory, pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine

CHUNK = 50
RECORD = Path(__file__).parent / "records" / "diffusion.json"
TARGET = 1.98
"""The bound that StackWise is to reach; a plain BERT-like model reads 2.46 after 6000 steps."""


# --- the peer --------------------------------------------------------------------------------------------------------


class Peer:
    """A BERT of about `parameters` parameters, stepped on demand."""

    def __init__(
        self,
        batches: Iterator[dict[str, Tensor]],
        *,
        vocab_size: int,
        seq_len: int,
        mask_id: int,
        parameters: int,
        steps: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        narrow, wide = (size_of(bert("meta", width, vocab_size, seq_len)) for width in (8, 16))
        self.width = 8 + 8 * max(0, round((parameters - narrow) / (wide - narrow)))
        self.model = bert("cpu", self.width, vocab_size, seq_len).train()
        self.parameters = size_of(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.batches, self.mask_id, self.steps = batches, mask_id, steps
        self.step, self.seconds = 0, 0.0

    def run(self, count: int) -> None:
        started = time.process_time()
        warm_up = min(100, self.steps // 10)
        for _ in range(count):
            progress = max(0.0, (self.step - warm_up) / (self.steps - warm_up))
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
            if self.step < warm_up:
                rate = (self.step + 1) / warm_up
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * rate
            self.loss(next(self.batches)["input_ids"]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        self.seconds += time.process_time() - started

    def loss(self, ids: Tensor) -> Tensor:
        """The count form: exactly n of the T tokens of a row are hidden, n even over 1 to T."""
        rows, length = ids.shape
        counts = torch.randint(1, length + 1, (rows, 1), generator=self.generator)
        order = torch.rand(rows, length, generator=self.generator).argsort(1).argsort(1)
        masks = order < counts
        nll = self.nll(ids.masked_fill(masks, self.mask_id), ids)
        return (nll * masks / counts).sum() / rows

    def nll(self, ids: Tensor, labels: Tensor) -> Tensor:
        """-log p of the labels, [B, T]; the mask token has probability 0."""
        logits = self.model(input_ids=ids).logits
        logits[..., self.mask_id] = -torch.inf
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")


def bert(device: str, width: int, vocab_size: int, seq_len: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    with torch.device(device):
        model: nn.Module = BertForMaskedLM(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=width,
                max_position_embeddings=seq_len,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    return model


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Judge(Denoiser):
    """Lets the peer stand where the estimator expects a rack; `rack` only says how large the vocabulary is."""

    def __init__(self, peer: Peer, rack: Rack) -> None:
        super().__init__(rack, peer.mask_id)
        self.peer = peer

    def judge(self, example: Example, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert example.scored is not None
        self.peer.model.eval()
        nll = self.peer.nll(example.input_ids, example.labels).flatten()[example.scored]
        self.peer.model.train()
        return nll, torch.zeros_like(nll, dtype=torch.bool)  # the estimator does not read who was right


# --- one seed --------------------------------------------------------------------------------------------------------


class Trial:
    """One seed: both models, chunk by chunk."""

    def __init__(
        self, data: Path, seed: int, folder: str, peer: bool, every: int, overrides: list[str]
    ) -> None:
        keys = [f"data.path={data}", f"training.seed={seed}", f"data.cache_dir={folder}", *overrides]
        config = StackWiseConfig.from_yaml("diffusion-char", keys)
        self.corpus: Corpus = prepare(config.data, folder)
        tokenizer = self.corpus.tokenizer
        config, _ = resolve(config, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
        config.tracking.log_interval = CHUNK
        self.config, self.seed, self.every = config, seed, every
        self.stages = stages(config, self.loader().steps_per_epoch)
        self.steps = sum(stage.steps for stage in self.stages)
        device = pick_device("cpu")
        rack = Rack(rack_spec(config), seed=seed)
        self.parameters = rack.get_parameter_count()
        self.peer = self.rival() if peer else None
        self.engine = Engine(
            config,
            rack,
            self.stages,
            self.loader(),
            device=device,
            dtype=pick_dtype(config.training.dtype, device),
            hooks=Hooks(emit=self.at_event),
            objective=objective_of(config, tokenizer.special_ids),
        )
        self.seconds = self.since = 0.0
        self.curve: dict[int, float] = {}
        self.peer_curve: dict[int, float] = {}

    def loader(self) -> TokenLoader:
        training = self.config.training
        return TokenLoader(
            self.corpus.train, seq_len=training.seq_len, batch_size=training.batch_size, seed=self.seed
        )

    def rival(self) -> Peer:
        assert self.config.model.vocab_size is not None
        assert self.config.objective.mask_token_id is not None
        return Peer(
            iter(self.loader()),
            vocab_size=self.config.model.vocab_size,
            seq_len=self.config.training.seq_len,
            mask_id=self.config.objective.mask_token_id,
            parameters=self.parameters,
            steps=self.steps,
            seed=self.seed,
        )

    def at_event(self, event: dict[str, Any]) -> None:
        """After a chunk: stop our clock, let the peer do as many steps, look at the bounds, go on."""
        if event["event"] != "step" or event["step"] % CHUNK:
            return
        self.seconds += time.process_time() - self.since
        step = event["step"]
        if self.peer is not None:
            self.peer.run(CHUNK)
        if step % self.every == 0 and step < self.steps:
            self.curve[step] = self.bound(self.ours(), passes=1).nats_per_token
            if self.peer is not None:
                self.peer_curve[step] = self.bound(Judge(self.peer, self.engine.rack), 1).nats_per_token
        self.since = time.process_time()

    def ours(self) -> Denoiser:
        return denoiser_of(self.engine.rack, self.config, self.corpus.tokenizer.special_ids)

    def bound(self, denoiser: Denoiser, passes: int) -> Nelbo:
        return nelbo(
            denoiser,
            self.corpus.validation,
            counts="modulo",
            seq_len=self.config.training.seq_len,
            batch_size=128,
            passes=passes,
            special_ids=self.corpus.tokenizer.special_ids,
        )

    def run(self) -> dict[str, Any]:
        self.since = time.process_time()
        self.engine.run()
        assert self.steps % CHUNK == 0
        found = self.bound(self.ours(), passes=4)
        result: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.steps,
            "parameters": self.parameters,
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            **self.figures(found, self.seconds, self.curve),
        }
        if self.peer is not None:
            found = self.bound(Judge(self.peer, self.engine.rack), passes=4)
            result["peer"] = {
                "parameters": self.peer.parameters,
                "feed_forward": self.peer.width,
                "dtype": "float32",
                **self.figures(found, self.peer.seconds, self.peer_curve),
            }
            result["seconds_ratio"] = self.seconds / self.peer.seconds
        return result

    def figures(self, found: Nelbo, seconds: float, curve: dict[int, float]) -> dict[str, Any]:
        return {
            "nelbo": found.nats_per_token,
            "standard_error": found.standard_error,
            "by_share": [part.masked_loss for part in found.parts],
            "windows": found.windows,
            "cpu_seconds": seconds,
            "curve": curve,
        }


# --- all of them -----------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> list[str]:
    """The figures in Markdown: means over the seeds, and their range."""
    sides = {"StackWise `diffusion-char`": results}
    if "peer" in results[0]:
        sides["Transformers BERT"] = [result["peer"] for result in results]
    steps = f"{results[0]['steps']:,} steps"
    rows = [f"| | parameters | NELBO, nats per character | CPU seconds, {steps} |", "|---|---|---|---|"]
    for name, side in sides.items():
        bounds, seconds = ([row[key] for row in side] for key in ("nelbo", "cpu_seconds"))
        head = f"| {name}, {side[0]['dtype']} | {side[0]['parameters']:,} "
        rows.append(head + f"| {spread(bounds, 3)} | {spread(seconds, 1)} |")
    if "seconds_ratio" in results[0]:
        rows += ["", "Ratio of CPU seconds: " + spread([result["seconds_ratio"] for result in results], 3)]
    return rows


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the text file")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--every", type=int, default=1000, help="steps between looks at the bound")
    parser.add_argument("--json", type=Path, default=RECORD, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the preset")
    options = parser.parse_intermixed_args(argv)
    if options.seeds < 1 or options.every < 1 or options.every % CHUNK:
        parser.error(f"--seeds must be at least 1 and --every a multiple of {CHUNK}")
    torch.set_num_threads(1)
    keep_freed_memory()  # as `stackwise train` does; it serves the peer as well
    results = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(options.data, seed, folder, not options.no_peer, options.every, options.overrides)
            if trial.steps % CHUNK:
                parser.error(f"training.max_steps must be a multiple of {CHUNK}, not {trial.steps}")
            results.append(trial.run())
        show(json.dumps(results[-1]))
    record = {
        "target": TARGET,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "overrides": options.overrides,
        "results": results,
    }
    for row in table(results):
        show(row)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    main()
