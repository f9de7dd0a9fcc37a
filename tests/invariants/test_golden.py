"""Short runs give the losses that they always gave: a change that is not meant to change training does not.

The figures are of this project itself. After a change that is meant to (an initialisation, an order of samples, a mask),
they are measured again in the same commit, which says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stackwise.evaluation.perplexity import perplexity
from stackwise.training.run import train
from stackwise.training.stored import open_run

TOLERANCE = 2e-4
"""Nats: far above what instruction sets of processors differ in, far below what another run differs in."""

BOTH_WAYS = {"model__attention_preset": "bert_style"}
KEY = "training__progressive__"
WHOLE = {f"{KEY}enabled": False}

# changes of the tiny run: (first loss, last loss, last validation loss)
GOLDEN: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "append": ({}, (3.07706, 2.777323, 2.568026)),
    "grow": ({f"{KEY}building_mode": "grow"}, (3.778399, 2.772671, 2.666318)),
    "mlm": ({**WHOLE, **BOTH_WAYS, f"{KEY}training_objective": "mlm"}, (3.183076, 3.788186, 3.59566)),
    "diffusion": (
        {**WHOLE, **BOTH_WAYS, f"{KEY}training_objective": "diffusion"},
        (3.75017, 3.144694, 3.18943),
    ),
    "depth as time": (
        {**BOTH_WAYS, f"{KEY}training_objective": "diffusion", f"{KEY}building_mode": "independent"},
        (3.608435, 3.160153, 3.2264),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_short_run_has_its_golden_losses(tiny, name: str) -> None:
    changes, wanted = GOLDEN[name]
    result = train(tiny(**changes), sinks=[])
    events = [
        json.loads(line) for line in (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    steps, evals = ([e["loss"] for e in events if e["event"] == kind] for kind in ("step", "eval"))
    assert (steps[0], steps[-1], evals[-1]) == pytest.approx(wanted, abs=TOLERANCE)


def test_a_short_run_has_its_golden_perplexity(tiny, text_file: Path) -> None:
    from stackwise.data.reading import read_corpus

    opened = open_run(train(tiny(), sinks=[])["run_dir"])
    split = read_corpus(str(text_file), opened.tokenizer).validation
    apart, sliding = (perplexity(opened.rack, split, seq_len=16, stride=n).nats_per_token for n in (16, 4))
    assert (apart, sliding) == pytest.approx((2.626555, 2.571179), abs=TOLERANCE)
