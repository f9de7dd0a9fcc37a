"""Sets in PEFT's file format, read by PEFT and by us."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stackwise.adapters.attach import adapter_parameters, attach, sets
from stackwise.adapters.io import CONFIG, load_set, save_set
from stackwise.model.spec import AdapterSpec
from stackwise.precision.convert import freeze_stack
from stackwise.storage.errors import UnsafeInputError

from .conftest import teach

METHODS = ["lora", "dora", "mora", "bottleneck"]


def taught(rack, method="lora", ranks=(4, 7), **options):
    for stack, rank in zip(rack.stacks, ranks, strict=True):
        attach(stack, AdapterSpec("stack", method, rank=rank, alpha=2.0 * rank + rank % 4, **options))
        teach(stack, "stack", 0.1)
    return rack.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["stack", "other"])
def test_a_set_comes_back_from_its_files(rack, make_rack, ids, tmp_path, method, name):
    taught(rack, method)
    attach(rack.stacks[0], AdapterSpec("trunk"))
    folder = save_set(rack, "stack", tmp_path / "set")
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    twin = make_rack()
    load_set(twin, folder, name)
    torch.testing.assert_close(twin.eval()(ids), rack(ids), atol=0, rtol=0)
    assert [sets(stack)[name] for stack in twin.stacks] == [sets(stack)["stack"] for stack in rack.stacks]
    assert [stack.adapters[0].targets for stack in twin.stacks] == [("all-linear",)] * 2


def test_a_stack_is_saved_by_itself(rack, make_rack, ids, tmp_path):
    taught(rack, rslora=True, dropout=0.25, targets=("q", "up"))
    twin = make_rack()
    for own, other in zip(rack.stacks, twin.stacks, strict=True):
        save_set(own, "stack", tmp_path / own.uid)
        load_set(other, tmp_path / own.uid, "stack")
        targets = ("blocks.0.attn.q", "blocks.0.ffn.up")
        rank = own.adapters[0].rank
        assert other.adapters == (
            AdapterSpec("stack", "lora", rank, 2.0 * rank + rank % 4, 0.25, targets, True),
        )
    assert torch.equal(twin.eval()(ids), rack(ids))


@pytest.mark.parametrize(("method", "rslora"), [("lora", False), ("lora", True), ("dora", False)])
def test_peft_loads_what_is_written_here(rack, make_rack, ids, tmp_path, method, rslora):
    from peft import PeftModel

    taught(rack, method, rslora=rslora, dropout=0.1)
    save_set(rack, "stack", tmp_path)
    model = PeftModel.from_pretrained(make_rack().eval(), tmp_path)
    torch.testing.assert_close(model(ids), rack(ids), atol=1e-5, rtol=1e-5)
    plain = make_rack()(ids)
    assert (model(ids) - plain).abs().max() > 1e-2


def test_peft_sets_the_tensors_of_an_injected_stack(rack, make_rack, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    taught(rack)
    save_set(rack.stacks[0], "stack", tmp_path)
    theirs = make_rack().stacks[0]
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path), theirs, "mine")
    result = set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"), "mine")
    assert result.unexpected_keys == []
    own = adapter_parameters(rack.stacks[0])
    found = {n.replace(".mine.", ".stack."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[n], own[n]) for n in own)


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_writes_is_loaded_here(rack, make_rack, ids, tmp_path, dora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, target_modules=["q", "gate"], rank_pattern={r"stacks\.s1\..*": 6}
    )
    model = get_peft_model(make_rack(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    load_set(rack.eval(), tmp_path, "stack")
    torch.testing.assert_close(rack(ids), model(ids), atol=1e-5, rtol=1e-5)
    assert [sets(stack)["stack"]["rank"] for stack in rack.stacks] == [3, 6]


def test_a_set_goes_onto_a_base_in_another_format(rack, make_rack, ids, tmp_path):
    taught(rack)
    save_set(rack, "stack", tmp_path)
    twin = make_rack().eval()
    for stack in twin.stacks:
        freeze_stack(stack, "nf4")
    before = twin(ids)
    load_set(twin, tmp_path, "stack")
    assert not torch.allclose(twin(ids), before, atol=1e-3)
    assert twin.stacks[0].weight_format == "nf4"


def test_what_does_not_fit_is_refused_and_nothing_is_attached(rack, make_rack, tmp_path):
    taught(rack)
    save_set(rack, "stack", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def refuses(target, message):
        before = list(target.state_dict())
        with pytest.raises(ValueError, match=message):
            load_set(target, tmp_path, "stack")
        assert list(target.state_dict()) == before
        assert all(stack.adapters == () for stack in target.stacks)

    refuses(make_rack(1), "layers that are not here: stacks.s1")
    refuses(make_rack(d_ff=41), r"does not fit: .*lora_B.stack.weight is \[40, 4\], needed \[41, 4\]")
    some = dict(tensors)
    gone = next(n for n in some if "s1" in n and "q.lora_B" in n)
    del some[gone]
    save_file(some, file)
    refuses(make_rack(), "adapter_model.safetensors has changed since it was written")
    (tmp_path / "SHA256SUMS").unlink()
    refuses(make_rack(), r"missing blocks.0.attn.q.lora_B.stack.weight")
    save_file(tensors, file)
    config["rank_pattern"][r"stacks\.s0\.blocks\.0\.attn\.q"] = 9
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refuses(make_rack(), "different ranks or alphas")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"peft_type": "IA3", "rank_pattern": {}})
    )
    refuses(make_rack(), "unknown adapter method 'ia3'; known: lora, dora, mora, bottleneck")
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_set(make_rack(), tmp_path, "stack")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        load_set(make_rack(), tmp_path, "stack")


def test_a_set_that_differs_between_stacks_is_saved_one_by_one(rack, tmp_path):
    attach(rack.stacks[0], AdapterSpec("stack", "lora"))
    attach(rack.stacks[1], AdapterSpec("stack", "mora"))
    with pytest.raises(ValueError, match="differs between stacks in method, dropout or rslora"):
        save_set(rack, "stack", tmp_path)
    with pytest.raises(ValueError, match="has no adapter set 'trunk'; it has stack"):
        save_set(rack, "trunk", tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"r": 0}, ValueError, "rank is outside"),
        ({"r": 2**40}, ValueError, "rank is outside"),
        ({"r": True}, ValueError, "r is True"),
        ({"r": None}, ValueError, "r is None"),
        ({"lora_alpha": "1"}, ValueError, "lora_alpha"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
        ({"use_rslora": 1}, ValueError, "use_rslora"),
        ({"peft_type": ["LORA"]}, ValueError, "peft_type"),
        ({"rank_pattern": ["a"]}, UnsafeInputError, "plain patterns"),
        ({"rank_pattern": {"(a+)+$": 2}}, UnsafeInputError, "without groups"),
        ({"alpha_pattern": {"a" * 600: 2}}, UnsafeInputError, "plain patterns"),
        ({"alpha_pattern": {"a": "2"}}, ValueError, "to numbers"),
        ({"rank_pattern": {"a": 0}}, ValueError, "rank is outside"),
    ],
)
def test_a_configuration_that_asks_for_the_impossible(change, error, says, tmp_path):
    config = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "peft_type": "LORA"}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=says):
        load_set(None, tmp_path, "x")
