"""The last stage of recipes/llama-70b-h200.yaml for real: 76 frozen blocks in NF4 and a stack of 4 that trains.

Random weights, made on the device block by block: of the trunk no more than one matrix is ever there in fp32. The data
is a map of 512 tokens that mostly say what comes next, so that the loss has somewhere to go. The stage runs in the
training loop itself; what is measured is the peak of CUDA's allocator, tokens per second, FLOP per second (all that is
computed) and the share of the GPU's peak that goes into work a resident, uncheckpointed step would also do (MFU). The
peak is held against `stackwise plan`; more than 5 % apart is a failure.

Needs a GPU with 141 GB. Without one it says so and ends with exit code 69. `--tiny` runs the same code on the CPU in
seconds: a narrow model, and the tensors that are alive in place of the allocator.

Usage: python benchmarks/gpu_70b_stage.py [--steps 200] [--tiny] [--json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.flops import step_flops
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.planning.devices import device_named
from stackwise.planning.live import LiveBytes
from stackwise.planning.plan import plan
from stackwise.planning.report import StagePlan
from stackwise.precision.frozen_linear import FrozenLinear
from stackwise.tracking.units import count, flops, rate, size
from stackwise.training.device import DTYPES, run_format
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine

RECIPE = Path(__file__).parents[1] / "recipes/llama-70b-h200.yaml"
NEEDED = 140 * 10**9
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
TOLERANCE = 0.05
WORDS = 512
FULL = (
    "data.doc_mask=false",
    "training.progressive.qlora_enabled=false",
    "training.progressive.joint_tuning=false",
    "training.progressive.joint_tuning_backbone=trainable",
)
TINY = (
    *FULL,
    "model.d_model=64",
    "model.d_ff=192",
    "model.n_heads=8",
    "model.n_kv_heads=2",
    "model.vocab_size=512",
    "model.max_seq_len=64",
    "model.architecture.n_stacks=5",
    "model.architecture.blocks_per_stack=2",
    "training.device=cpu",
    "training.dtype=float32",
    "training.batch_size=2",
    "training.seq_len=64",
    "training.warmup_steps=1",
    "training.optimizer.lr=3e-3",
)


def last_stage(config: StackWiseConfig, device: torch.device) -> tuple[Stage, RackSpec]:
    """The stage that trains the last stack, as if the rack had grown already, and the rack it trains."""
    listed = stages(config)
    stored = run_format(config, DTYPES[config.training.dtype], device)
    spec = stage_specs(config, listed, first_spec(config, listed), stored)[-1]
    last = listed[-1]
    return Stage(last.name, last.n_stacks, last.trains, last.steps, warmup_steps=last.warmup_steps), spec


def random_rack(spec: RackSpec, device: torch.device, seed: int = 0) -> Rack:
    """The rack of a description with random weights, matrices of frozen stacks rounded one after the other."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        rack = build_rack(spec)
    depth = math.sqrt(2 * len(spec.blocks))
    for path, module in rack.named_modules():
        narrower = depth if path.endswith((".o", ".down")) else 1.0
        if isinstance(module, FrozenLinear):
            std = module.in_features**-0.5 / narrower
            weight = torch.empty(module.shape, device=device).normal_(0.0, std, generator=generator)
            for name, tensor in module.format.quantise(weight).items():
                module._buffers[name] = tensor
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                std = parameter.shape[-1] ** -0.5 / narrower
                values = torch.ones(parameter.shape, device=device)
                if parameter.dim() > 1:
                    values.normal_(0.0, std if path != "head" else 0.02, generator=generator)
                module._parameters[name] = nn.Parameter(values, parameter.requires_grad)
    return rack


class Words:
    """Endless rows in which a token is followed by its own successor nine times of ten, else by any."""

    def __init__(self, batch_size: int, seq_len: int, vocab_size: int) -> None:
        self.shape, self.draws = (batch_size, seq_len + 1), torch.Generator().manual_seed(1)
        words = min(WORDS, vocab_size)
        self.words, self.successor = words, torch.randperm(words, generator=self.draws)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            ids = torch.randint(self.words, self.shape, generator=self.draws)
            keeps = torch.rand(self.shape, generator=self.draws) < 0.9
            for t in range(1, self.shape[1]):
                ids[:, t] = torch.where(keeps[:, t], self.successor[ids[:, t - 1]], ids[:, t])
            yield {"input_ids": ids[:, :-1].contiguous(), "next_ids": ids[:, -1].contiguous()}

    def seek(self, batches: int) -> None: ...
    def reshape(self, seq_len: int | None, batch_size: int | None) -> None: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(steps: int, tiny: bool) -> dict[str, Any]:
    """Plan the stage, build it, run it; figures of both."""
    overrides = [*(TINY if tiny else FULL), f"training.max_steps={steps}", "tracking.log_interval=1"]
    config = StackWiseConfig.from_yaml(RECIPE, [*overrides, "data.path=unused"])
    device = torch.device(config.training.device)
    planned = plan(config, str(device)).stages[-1]
    config, _ = resolve(config)
    stage, spec = last_stage(config, device)
    started = time.perf_counter()
    rack = random_rack(spec, device)
    built = time.perf_counter() - started
    training = config.training
    logged: list[dict[str, Any]] = []
    engine = Engine(
        config,
        rack,
        [stage],
        Words(training.batch_size, training.seq_len, spec.vocab_size),
        device=device,
        dtype=DTYPES[training.dtype],
        hooks=Hooks(emit=logged.append),
    )
    weights = sum(t.nbytes for t in (*rack.parameters(), *rack.buffers()))
    live = LiveBytes([*rack.parameters(), *rack.buffers()]) if device.type == "cpu" else None
    if live is None:
        torch.cuda.reset_peak_memory_stats(device)
    with nullcontext() if live is None else live:
        (entry,) = engine.run()
    peak = weights + live.peak if live is not None else torch.cuda.max_memory_allocated(device)
    losses = [event["loss"] for event in logged if event["event"] == "step"]
    return {
        **_figures(config, stage, spec, planned, entry, losses),
        "built_s": built,
        **_memory(planned, peak),
    }


def _memory(planned: StagePlan, peak: int) -> dict[str, Any]:
    return {
        "planned_peak": planned.peak_bytes,
        "measured_peak": peak,
        "ratio": peak / planned.peak_bytes,
        "planned_items": planned.bytes,
        "planned_weights": planned.memory.weights,
    }


def _figures(
    config: StackWiseConfig,
    stage: Stage,
    spec: RackSpec,
    planned: StagePlan,
    entry: dict[str, Any],
    losses: list[float],
) -> dict[str, Any]:
    """Speed over the whole stage, and the loss at both ends."""
    training, here = config.training, device_named(config.training.device)
    useful = step_flops(spec, trained_units(spec, stage), training.seq_len)
    speed = entry["tokens"] / entry["seconds"]
    edge = max(1, len(losses) // 10)
    return {
        "date": datetime.date.today().isoformat(),
        "device": here.name,
        "dtype": training.dtype,
        "blocks": planned.total_blocks,
        "frozen_blocks": planned.prefix_blocks,
        "parameters": planned.parameters,
        "trained": planned.trainable_parameters,
        "steps": entry["steps"],
        "tokens_per_step": training.batch_size * training.seq_len,
        "tokens_per_s": speed,
        "flops_per_s": entry["flops"] / entry["seconds"],
        "mfu": speed * useful / 1e12 / here.peaks.get(training.dtype, here.peaks["float32"]),
        "loss_first": sum(losses[:edge]) / edge,
        "loss_last": sum(losses[-edge:]) / edge,
        "counted": entry["bytes"],
    }


def lacking() -> str:
    """Why the full form cannot run here; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    facts = torch.cuda.get_device_properties(0)
    if facts.total_memory < NEEDED:
        return f"{facts.name} has {facts.total_memory / 1e9:.0f} GB"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; 200, or 6 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="the same code on the CPU, a narrow model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.tiny and (why := lacking()):
        print(f"needs a GPU with 141 GB, and {why}; --tiny runs the same code on the CPU", file=sys.stderr)
        return UNAVAILABLE
    found = measure(options.steps or (6 if options.tiny else 200), options.tiny)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{found['date']}, {found['device']}, {found['dtype']}: {found['blocks']} blocks, {found['frozen_blocks']} "
            f"of them frozen in NF4, {count(found['parameters'])} parameters, {count(found['trained'])} trained\n"
            f"peak memory  {size(found['measured_peak'])} measured, {size(found['planned_peak'])} planned, "
            f"ratio {found['ratio']:.3f}\n"
            f"speed        {rate(found['tokens_per_s'])}, {flops(found['flops_per_s'])}/s, MFU {found['mfu']:.1%}\n"
            f"loss         {found['loss_first']:.3f} -> {found['loss_last']:.3f} in {found['steps']} steps"
        )
    return int(abs(found["ratio"] - 1) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
