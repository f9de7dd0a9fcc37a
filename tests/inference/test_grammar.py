"""Racks whose stacks own intervals of noise learn a grammar: what is sampled from them is a sentence of it."""

from __future__ import annotations

import math
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.data.corpus import TokenSplit
from stackwise.evaluation.nelbo import nelbo
from stackwise.inference.denoise import Denoised
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.run import train
from stackwise.training.stored import OpenRun, open_run

SINGULAR, PLURAL = ("t", "abcd", "wxy"), ("T", "ABCD", "WXY")
SENTENCES = [
    f"{subject[0]}{noun}{verb}{other[0]}{thing}."
    for subject, other in product((SINGULAR, PLURAL), repeat=2)
    for noun, verb, thing in product(subject[1], subject[2], other[1])
]
"""Article, noun, verb, article, noun: article and noun agree, and the verb with its subject. A letter is a word."""

TOTAL = 6000
LENGTH = 6


def sampled(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(SENTENCES), (TOTAL // LENGTH,), generator=generator)
    return "".join(SENTENCES[i] for i in drawn.tolist())


def unigram_chance(text: str) -> float:
    """How likely a sentence is when every word is drawn as often as it occurs, by itself."""
    share = {word: text.count(word) / len(text) for word in set(text)}
    return sum(math.prod(share[word] for word in sentence) for sentence in SENTENCES)


def trained(tiny: Any, folder: Path, mode: str, **keys: Any) -> OpenRun:
    path = folder / "grammar.txt"
    path.write_text(sampled(0))
    config = tiny(
        data__path=str(path),
        model__attention_preset="bert_style",
        model__d_model=32,
        model__architecture__n_stacks=2,
        model__use_rope=False,  # where all is hidden, places are all there is to see
        training__seq_len=LENGTH,
        training__batch_size=64,
        training__optimizer__optimizer_type="AdamW",
        training__optimizer__lr=1e-2,
        training__progressive__building_mode=mode,
        training__progressive__training_objective="diffusion",
        training__run_id=mode,
        checkpoint__save_interval=10_000,
        tracking__log_interval=10_000,
        **keys,
    )
    return open_run(train(config, sinks=[])["run_dir"])


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("mode", ["independent", "prepend"])
def test_what_is_sampled_is_a_sentence_and_the_bound_is_the_sum_over_stacks(
    tiny: Any, tmp_path: Path, mode: str
) -> None:
    assert len(set(SENTENCES)) == 192
    run = trained(tiny, tmp_path, mode, training__max_steps=160)
    denoiser = denoiser_of(run.rack, run.config)
    assert denoiser.intervals is not None
    by_unigram = unigram_chance(sampled(0))
    assert 0 < by_unigram < 0.01

    mask = denoiser.mask_id
    rows = torch.full((400, LENGTH), mask)
    options: dict[str, Any] = {"intervals": denoiser.intervals, "path": denoiser.path, "seed": 3}
    for sampler in ("ancestral", "confidence", "threshold", "unroll"):
        done: Denoised = run.rack.denoise(rows, mask_id=mask, sampler=sampler, **options)
        written = [run.tokenizer.decode(row) for row in done.ids.tolist()]
        valid = [text for text in written if text in SENTENCES]
        assert len(valid) / len(written) >= max(0.6, 5 * by_unigram)
        assert len(set(valid)) > 100, "they differ"

    held_out = TokenSplit.from_arrays(run.tokenizer.encode(sampled(1)))
    bound = nelbo(denoiser, held_out, seq_len=LENGTH, batch_size=200, passes=2)
    assert sum(part.nats_per_token for part in bound.parts) == pytest.approx(bound.nats_per_token, rel=1e-9)
    assert len(bound.parts) == 2
    entropy = math.log(len(SENTENCES)) / LENGTH
    assert 0.98 * entropy < bound.nats_per_token < 1.1 * entropy
