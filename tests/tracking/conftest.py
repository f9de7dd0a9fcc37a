"""A made-up run: the events of a small rack growing stack by stack, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.tracking.events import Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile

T0 = 1_700_000_000.0
BLOCK, OUTER = 120_000, 70_000  # parameters of a block; of embedding, norm and head


def made_up_run(
    *,
    n_stacks: int = 4,
    stage_steps: int = 40,
    log_every: int = 10,
    joint: bool = True,
    blocks_per_stack: int = 2,
    run_id: str = "demo",
    sample: str = "read(self, size=-1):\n    return self.buffer\n",
    status: str = "done",
) -> list[dict[str, Any]]:
    return list(
        _events(n_stacks, stage_steps, log_every, joint, blocks_per_stack, run_id, sample, status),
    )


def _events(
    n_stacks: int,
    stage_steps: int,
    log_every: int,
    joint: bool,
    blocks_per_stack: int,
    run_id: str,
    sample: str,
    status: str,
) -> Iterator[dict[str, Any]]:
    batch_tokens = 2048
    stages = []
    for i in range(n_stacks):
        params = OUTER + BLOCK * (blocks_per_stack * (i + 1) + 1)
        stages.append(
            {
                "name": f"append s{i}",
                "n_stacks": i + 1,
                "steps": stage_steps,
                "params": params,
                "trainable_params": OUTER // (1 if i == 0 else 2) + BLOCK * (blocks_per_stack + 1),
                "trains": ["embedding"] * (i == 0) + [f"stack:s{i}", "tail", "norm", "head"],
            }
        )
    if joint:
        last = stages[-1]
        stages.append(
            {
                **last,
                "name": "joint",
                "trainable_params": last["params"],
                "trains": ["everything"],
                "steps": stage_steps,
            }
        )
    clock = T0

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"event": kind, "time": round(clock, 3), **fields}

    total = sum(stage["steps"] for stage in stages)
    yield event(
        "run_start",
        run_id=run_id,
        stages=stages,
        total_steps=total,
        device="cpu",
        dtype="bfloat16",
        n_params=stages[-1]["params"],
        start_step=0,
        vocab_size=258,
        seq_len=256,
        batch_tokens=batch_tokens,
    )
    step, tokens, flops, seconds, rss = 0, 0, 0.0, 0.0, 380_000_000
    loss, evaluation = 5.55, 5.55

    def evaluate(stage: int, when: str, value: float) -> dict[str, Any]:
        return event(
            "eval",
            step=step,
            stage=stage,
            when=when,
            loss=round(value, 6),
            perplexity=round(math.exp(value), 4),
            label="exact",
            bits_per_byte=round(value / math.log(2), 6),
            tokens=tokens,
            flops=flops,
            seconds=round(seconds, 3),
        )

    for i, stage in enumerate(stages):
        grew = 0 < i < n_stacks
        if grew:
            yield evaluate(i, "before_growth", evaluation)
        prefix = 0 if i in (0, n_stacks) else blocks_per_stack * i
        yield event(
            "stage_start",
            stage=i,
            name=stage["name"],
            n_stacks=stage["n_stacks"],
            steps=stage["steps"],
            params=stage["params"],
            trainable_params=stage["trainable_params"],
            prefix_blocks=prefix,
            total_blocks=blocks_per_stack * stage["n_stacks"] + 1,
            new_stack=f"s{i}" if i < n_stacks else None,
        )
        if grew:
            loss = evaluation + 0.35 / i
            yield evaluate(i, "after_growth", loss + 0.01)
        floor = 1.9 + 1.1 / (i + 1)
        first = None
        begin, begin_flops = seconds, flops
        per_step = (2 * stage["params"] + 4 * stage["trainable_params"]) * batch_tokens / 6e10
        for k in range(1, stage["steps"] + 1):
            step, tokens = step + 1, tokens + batch_tokens
            flops += (2.0 * stage["params"] + 4.0 * stage["trainable_params"]) * batch_tokens
            seconds += per_step
            clock += per_step
            loss += (floor - loss) * 3.2 / stage_steps
            noisy = loss + 0.05 * math.sin(12.9898 * step) * math.cos(4.1 * step)
            first = noisy if first is None else first
            if k % log_every == 0:
                rss += 900_000
                yield event(
                    "step",
                    step=step,
                    stage=i,
                    stage_step=k,
                    loss=round(noisy, 6),
                    lr=3e-3 * (1 - 0.9 * k / stage["steps"]),
                    grad_norm=round(0.6 + 0.3 * math.sin(step), 4),
                    tokens=tokens,
                    flops=flops,
                    tokens_per_s=round(batch_tokens / per_step * (1 + 0.06 * math.sin(3 * step)), 2),
                    seconds=round(seconds, 3),
                    rss_bytes=rss,
                )
        evaluation = loss + 0.06
        yield event("experts", step=step, stage=i, max_load=1.4, min_load=0.7, loss=0.01)
        yield event(
            "checkpoint",
            step=step,
            stage=i,
            commit=f"{step:09d}-{'ab' * 8}",
            bytes_written=12 * stage["trainable_params"],
            bytes_total=4 * stage["params"] + 8 * stage["trainable_params"],
            seconds=0.04,
            blocked_seconds=0.002,
        )
        yield evaluate(i, "stage_end", evaluation)
        yield event("sample", step=step, stage=i, prompt="def ", text=sample)
        items = {
            "parameters": 4 * stage["params"],
            "gradients": 4 * stage["trainable_params"],
            "moments": 8 * stage["trainable_params"],
            "activations": 700_000 * (blocks_per_stack * (stage["n_stacks"] if prefix == 0 else 1) + 1),
            "buffers": 0,
        }
        yield event(
            "stage_end",
            stage=i,
            name=stage["name"],
            n_stacks=stage["n_stacks"],
            step=step,
            loss_first=round(first or loss, 6),
            loss_last=round(loss, 6),
            eval_loss=round(evaluation, 6),
            seconds=round(seconds - begin, 3),
            tokens=batch_tokens * stage["steps"],
            flops=flops - begin_flops,
            trainable_params=stage["trainable_params"],
            bytes={
                **items,
                "total": sum(items.values()),
                "peak": sum(items.values()),
                "host": 0,
                "allocated": None,
            },
            stored=None
            if prefix == 0
            else {
                "entries": 1200 * i,
                "ram_bytes": 10**6 * i,
                "disk_bytes": 0,
                "hits": 2400 * i,
                "evicted": i - 1,
            },
        )
    yield evaluate(len(stages) - 1, "final", evaluation)
    yield event(
        "run_end",
        step=step,
        seconds=round(seconds, 3),
        final_loss=round(evaluation, 6),
        status=status,
        tokens=tokens,
        flops=flops,
        peak_rss_bytes=rss + 30_000_000,
    )


@pytest.fixture(scope="session")
def run_events() -> Callable[..., list[dict[str, Any]]]:
    return made_up_run


def write_run(path: Path, events: list[dict[str, Any]], config: str = "model:\n  d_model: 32\n") -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_config(config)
    folder.environment.write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}}), "utf-8")
    with Tracker([MetricsFile(folder.path)]) as tracker:
        for event in events:
            tracker.emit(event)
    return folder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunFolder]:
    return write_run
