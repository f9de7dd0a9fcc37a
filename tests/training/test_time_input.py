"""Runs of models that are told the time of the noise."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.describe import rack_spec
from stackwise.model.spec import TimeSpec
from stackwise.planning.plan import plan
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run


def told(tiny, mode="append", **keys):
    return tiny(
        model__attention_preset="bert_style",
        training__progressive__building_mode=mode,
        training__progressive__training_objective="diffusion",
        training__progressive__time_interpretation="input",
        training__progressive__joint_tuning=False,
        **{f"training__progressive__{name}": value for name, value in keys.items()},
    )


def test_without_the_key_no_rack_is_told(tiny):
    config = tiny(
        model__attention_preset="bert_style",
        model__vocab_size=50,
        training__progressive__training_objective="diffusion",
    )
    assert rack_spec(config, 1).time is None


def test_the_configuration_says_how_the_rack_is_told(tiny):
    def time_of(**keys):
        config = told(tiny, **keys)
        config.model.vocab_size = 50
        return rack_spec(config, 1).time

    assert time_of() == TimeSpec(16, 300, "sinusoidal", "add")
    keys = {"time_embedding_dim": 24, "num_time_steps": 40, "time_encoding_type": "learned"}
    assert time_of(**keys, time_conditioning="adaln") == TimeSpec(24, 40, "learned", "adaln")
    assert time_of(time_per_stack=7) == TimeSpec(16, 21, "sinusoidal", "add")


WAYS = [("append", "add"), ("append", "adaln"), ("prepend", "adaln")]


@pytest.mark.parametrize(("mode", "conditioning"), WAYS)
def test_a_run_learns_to_use_time_while_the_embedding_trains_and_keeps_it_afterwards(
    tiny, monkeypatch, mode, conditioning
):
    seen, bytes_of = {}, {}
    finish = Engine._finish

    def watched(self, stage):
        finish(self, stage)
        seen[self.progress.stage] = {n: p.detach().clone() for n, p in self.rack.time.named_parameters()}
        bytes_of[self.progress.stage] = dict(self.progress.bytes)

    monkeypatch.setattr(Engine, "_finish", watched)
    config = told(tiny, mode, time_conditioning=conditioning)
    run = open_run(train(config, sinks=[])["run_dir"])
    assert any(not torch.equal(seen[1][n], p) for n, p in rack_time(run.config).items())
    for name, tensor in run.rack.time.named_parameters():
        assert torch.equal(seen[1][name], tensor), "the embedding is frozen after the first stage"
    ids = torch.randint(0, 20, (1, 9))
    early, late = (run.rack(ids, time_step=torch.tensor([t])) for t in (0.1, 0.9))
    assert not torch.equal(early, late)
    planned = plan(run.config).stages
    for counted, stage in zip(bytes_of.values(), planned, strict=True):
        for item in ("parameters", "gradients", "moments"):
            assert stage.bytes[item] == counted[item], (stage.name, item)
        assert stage.bytes["activations"] == pytest.approx(counted["activations"], rel=0.02)


def rack_time(config):
    from stackwise.model.rack import Rack

    return dict(Rack(rack_spec(config, 1), seed=config.training.seed).time.named_parameters())
