"""Bits per byte of a run that hides tokens: special tokens are never hidden, so they cost nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise.data.prepare import prepare
from stackwise.training.run import train


def test_bits_per_byte_counts_the_tokens_that_are_hidden(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Ten documents, so that the held-out text has ends of text, which are special."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(10):
        (texts / f"{i}.txt").write_text(f"{i} bottles of beer on the wall.\n" * 4)
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for i in range(4):
        (held_out / f"{i}.txt").write_text(f"{9 - i} bottles of beer.\n" * 2)
    config = tiny(
        model__attention_preset="bert_style",
        training__progressive__training_objective="diffusion",
        training__progressive__enabled=False,
        training__max_steps=1,
        data__path=[str(p) for p in sorted(texts.iterdir())],
        data__eval_path=[str(p) for p in sorted(held_out.iterdir())],
        data__cache_dir=str(tmp_path / "data"),
    )
    run = Path(train(config, sinks=[])["run_dir"])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = next(event for event in events if event.get("when") == "final")
    split = prepare(config.data, config.data.cache_dir).validation
    text = sum(len(path.read_bytes()) for path in held_out.iterdir())
    assert split.n_tokens > text == split.n_bytes
    assert final["bits_per_byte"] == pytest.approx(final["loss"] / math.log(2), rel=1e-9)
