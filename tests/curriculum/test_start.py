"""checkpoint.init_from: a run that starts from the weights of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stackwise.config.errors import ConfigError
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.tracking.folder import RunFolderError
from stackwise.training.errors import IncompatibleResumeError
from stackwise.training.run import train
from stackwise.training.start import start_from
from stackwise.training.stored import open_run


@pytest.fixture
def source(tiny) -> str:
    return train(tiny(training__run_id="source", training__max_steps=1), sinks=[])["run_dir"]


def test_init_from_starts_from_the_weights_of_another_run(tiny, source):
    config = tiny(training__max_steps=1, training__optimizer__lr=1e-9, checkpoint__init_from=source)
    run = train(config, sinks=[])["run_dir"]
    old, new = open_run(source).rack.state_dict(), open_run(run).rack.state_dict()
    for name in ("embedding.weight", "head.weight", "stacks.s0.blocks.0.attn.q.weight"):
        torch.testing.assert_close(new[name], old[name], atol=1e-6, rtol=0)
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    notes = [json.loads(line)["message"] for line in lines if '"note"' in line]
    assert any(note.startswith(f"started from {source}, commit ") for note in notes)
    with pytest.raises(IncompatibleResumeError, match=r"checkpoint\.init_from"):
        train(tiny(training__max_steps=1, training__optimizer__lr=1e-9), sinks=[])


def test_what_the_other_run_has_not_stays_as_it_began(tiny, source):
    tokenizer = open_run(source).tokenizer
    wider = rack_spec(tiny(model__vocab_size=tokenizer.vocab_size), 3)
    first = Rack(wider.with_stacks([wider.stacks[0], *wider.stacks[2:]]), seed=7)
    rack = Rack(wider.with_stacks([wider.stacks[0], *wider.stacks[2:]]), seed=7)
    extra = wider.stacks[2]
    renamed = type(extra)("s9", extra.blocks, 9)
    rack = Rack(rack.spec.with_stacks([*rack.spec.stacks, renamed]), seed=7)
    note = start_from(rack, source, tokenizer)
    assert note.endswith("new: stack:s9")
    old, new = open_run(source).rack.state_dict(), rack.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in first.state_dict())
    assert [stack.trained for stack in rack.spec.stacks] == [True, True, False]
    assert [stack.trained for stack in rack.stacks] == [True, True, False]


def test_what_does_not_fit_is_named(tiny, source):
    tokenizer = open_run(source).tokenizer

    def rack(**changes) -> Rack:
        return Rack(rack_spec(tiny(model__vocab_size=tokenizer.vocab_size, **changes), 2))

    with pytest.raises(
        ConfigError, match=r"other shapes: .*embedding.weight is \[\d+, 16\] there and \[\d+, 32\]"
    ):
        start_from(rack(model__d_model=32), source, tokenizer)
    with pytest.raises(
        ConfigError, match=r"another tokenizer.*base: .*config\.yaml takes over its tokenizer"
    ):
        start_from(rack(), source, ByteTokenizer())
    turned = rack()
    turned = Rack(turned.spec.with_stacks(turned.spec.stacks[::-1]))
    with pytest.raises(ConfigError, match=r"another order \(s0, s1, s2\) than this run \(s1, s0\)"):
        start_from(turned, source, tokenizer)
    with pytest.raises(RunFolderError, match="is not a folder"):
        start_from(rack(), "nowhere", tokenizer)


def test_a_tail_and_a_head_are_never_dropped_in_silence(tiny, source):
    tokenizer = open_run(source).tokenizer

    def rack(**changes) -> Rack:
        return Rack(rack_spec(tiny(model__vocab_size=tokenizer.vocab_size, **changes), 3))

    end_to_end = {"training__progressive__enabled": False}
    with pytest.raises(
        ConfigError, match=r"has a head and a tail of its own.*tie_embeddings=false; .*unit=rack"
    ):
        start_from(rack(**end_to_end), source, tokenizer)
    with pytest.raises(ConfigError, match=r"has a tail of its own"):
        start_from(rack(**end_to_end, model__tie_embeddings=False), source, tokenizer)
    with pytest.raises(ConfigError, match=r"has a head of its own"):
        start_from(rack(model__tie_embeddings=True), source, tokenizer)
    held_out = open_run(source).rack(torch.arange(8)[None])
    whole = rack(training__unit="rack")
    start_from(whole, source, tokenizer)
    assert torch.equal(whole.eval()(torch.arange(8)[None]), held_out)
