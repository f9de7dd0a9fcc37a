"""Runs, plans and evaluations of racks with adapters, transforms, biases and caps around their blocks."""

import pytest
import torch

from stackwise import plan
from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.spec import RackSpec
from stackwise.training.run import train
from stackwise.training.stored import open_run

ENDS = {
    "model.embedding_width": 24,
    "model.head_transform": True,
    "model.head_bias": True,
    "model.logit_softcap": 20.0,
    "model.token_types": 2,
    "model.embedding_norm": "learned",
}


def keys(**more):
    return {key.replace(".", "__"): value for key, value in {**ENDS, **more}.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_trains_them_and_comes_back(tiny, tmp_path, tied):
    config = tiny(**keys(**{"model.tie_embeddings": tied, "training.max_steps": 3}))
    train(config, sinks=[])
    rack = open_run(tmp_path / "runs" / "tiny").rack
    assert RackSpec.from_dict(rack.spec.to_dict()) == rack.spec
    assert (rack.spec.head_transform, rack.spec.table_width, rack.spec.logit_softcap) == (True, 24, 20.0)
    fresh = build_rack(rack.spec)
    moved = {n for n, p in fresh.named_parameters() if not torch.equal(p, rack.state_dict()[n])}
    assert {"head.bias", "head.transform.dense.weight", "embedding.adapter.weight"} <= moved
    ids = torch.randint(0, rack.spec.vocab_size, (2, 8))
    assert rack(ids).abs().max() < 20
    planned = plan(config, "cpu").stages[-1].memory
    assert planned.items["parameters"] == sum(p.nbytes for p in rack.parameters())
    lookup = ("embedding.", "head.")
    least = sum(p.nbytes for n, p in rack.named_parameters() if n.startswith(lookup))
    assert planned.embedding_head >= least


def test_what_is_the_head_s_own_trains_while_its_table_is_fixed(tiny):
    config = tiny(**keys(**{"model.tie_embeddings": True, "model.vocab_size": 30}))
    rack = build_rack(rack_spec(config))
    units = trained_units(rack.spec, Stage(name="s", n_stacks=3, trains=("new", "norm", "head"), steps=1))
    assert "head" in units
    apply_training(rack, units)
    trains = {n for n, p in rack.named_parameters() if p.requires_grad and not n.startswith("stacks")}
    assert trains == {
        "norm.weight",
        "head.bias",
        "head.adapter.weight",
        "head.transform.dense.weight",
        "head.transform.norm.weight",
    }
    assert not rack.head.matrix.requires_grad
