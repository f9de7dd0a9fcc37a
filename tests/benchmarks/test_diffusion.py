"""The benchmark of masked diffusion: both sides are of one size, learn by one form and are judged by one estimator."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.data.corpus import TokenSplit
from stackwise.evaluation.nelbo import nelbo
from stackwise.model.describe import rack_spec
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
V, MASK, T = 12, 11, 16


@pytest.fixture
def diffusion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import diffusion

    monkeypatch.setattr(diffusion, "keep_freed_memory", lambda: None)
    return diffusion


@pytest.fixture
def peer(diffusion: ModuleType) -> Any:
    pytest.importorskip("transformers")
    return diffusion.Peer(
        iter(()), vocab_size=V, seq_len=T, mask_id=MASK, parameters=700_000, steps=10, seed=1
    )


def test_the_preset_keeps_to_its_size() -> None:
    config, _ = resolve(StackWiseConfig.from_yaml("diffusion-char"), vocab_size=65)
    rack = Rack(rack_spec(config), seed=1)
    assert not rack.is_causal
    assert rack.spec.vocab_size == 66
    assert rack.get_parameter_count() <= 810_000
    assert config.training.max_steps * config.training.batch_size * config.training.seq_len == 6000 * 768


def test_the_peer_is_as_large_as_it_can_be_made(diffusion: ModuleType, peer: Any) -> None:
    assert peer.parameters == sum(p.numel() for p in peer.model.parameters())
    assert (
        abs(peer.parameters - 700_000) <= 4 * (2 * 128 + 1) * 8 / 2
    )  # half a step of the feed-forward width


def test_the_peer_learns_by_the_count_form(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, MASK, (4000, T))
    constants, seen = torch.rand(4000, 1), []

    def nll(corrupted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert torch.equal(labels, ids)
        assert torch.equal(corrupted[corrupted != MASK], ids[corrupted != MASK])
        seen.append((corrupted == MASK).sum(1))
        return constants.expand(-1, T)

    monkeypatch.setattr(peer, "nll", nll)
    # Every row counts the same, however many of its tokens are hidden.
    assert float(peer.loss(ids)) == pytest.approx(float(constants.mean()), rel=1e-5)
    of_each = torch.bincount(seen[0], minlength=T + 1)
    assert of_each[0] == 0
    assert (of_each[1:] - 4000 / T).abs().max() < 6 * math.sqrt(4000 / T)


def test_the_peer_steps_and_never_predicts_the_mask(peer: Any) -> None:
    ids = torch.randint(0, MASK, (3, T))
    assert torch.isfinite(peer.nll(ids, ids)).all()
    assert torch.isinf(peer.nll(ids, torch.full_like(ids, MASK))).all()
    before = [p.clone() for p in peer.model.parameters()]
    peer.batches = iter([{"input_ids": ids}, {"input_ids": ids}])
    peer.run(2)
    assert peer.step == 2
    assert peer.seconds > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, peer.model.parameters(), strict=True))


def test_the_peer_is_judged_as_we_are(diffusion: ModuleType, peer: Any) -> None:
    decoder = peer.model.cls.predictions.decoder
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(torch.randn(V))
    split = TokenSplit.from_arrays(np.random.default_rng(0).integers(0, MASK, 40 * T))
    rack = create_simple_rack(1, 1, 8, 8, 1, V, max_seq_len=T, attention_preset="bert_style")
    found = nelbo(diffusion.Judge(peer, rack), split, seq_len=T, batch_size=16, passes=4)
    # A model that does not look gives every token its own probability, hidden with whichever others.
    costs = -decoder.bias.detach()[:MASK].log_softmax(0)
    expected = costs[torch.as_tensor(split.tokens.astype("int64"))].view(-1, T)
    low, high = expected.mean(1).min(), expected.mean(1).max()
    assert low < found.nats_per_token < high
    assert found.nats_per_token == pytest.approx(float(expected.mean()), abs=6 * found.standard_error)
    assert found.standard_error < 0.1
    assert peer.model.training
    with torch.no_grad():
        decoder.bias.zero_()
    uniform = nelbo(diffusion.Judge(peer, rack), split, seq_len=T, passes=1)
    assert uniform.nats_per_token == pytest.approx(math.log(MASK), abs=1e-5)


def test_a_run_reports_both_sides(
    diffusion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(diffusion, "CHUNK", 2)
    text, record = tmp_path / "text.txt", tmp_path / "records" / "diffusion.json"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    small = ["model.max_seq_len=16", "training.seq_len=16", "training.batch_size=2"]
    common = ["--data", str(text), "--every", "2", "--json", str(record), *small]
    shown: list[str] = []
    result = diffusion.main([*common, "training.max_steps=6"], shown.append)
    assert json.loads(record.read_text()) == json.loads(json.dumps(result))
    (found,) = result["results"]
    for side in (found, found["peer"]):
        assert sorted(side["curve"]) == [2, 4]
        assert 1 < side["nelbo"] < 5
        assert side["cpu_seconds"] > 0
    assert found["windows"] == found["peer"]["windows"] > 0
    assert found["peer"]["parameters"] == pytest.approx(found["parameters"], rel=0.01)
    assert found["seconds_ratio"] == pytest.approx(found["cpu_seconds"] / found["peer"]["cpu_seconds"])
    assert [line.split("|")[1].strip() for line in shown[3:5]] == [
        "StackWise `diffusion-char`, bfloat16"
        if found["dtype"] == "bfloat16"
        else "StackWise `diffusion-char`, float32",
        "Transformers BERT, float32",
    ]

    alone = diffusion.main([*common, "--no-peer", "training.max_steps=6"], shown.append)
    assert "peer" not in alone["results"][0]
    assert alone["results"][0]["nelbo"] == found["nelbo"]  # the peer changes nothing but the time

    for wrong in (["training.max_steps=5"], ["--seeds", "0"], ["--every", "3"]):
        with pytest.raises(SystemExit):
            diffusion.main([*common, *wrong], shown.append)
