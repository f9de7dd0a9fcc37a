"""Blocks go to host memory, or into a mapped file, and come back; they stay the modules they were."""

from __future__ import annotations

import copy
import hashlib
import shutil

import pytest
import torch
from safetensors import safe_open

from stackwise.model.spec import AdapterSpec
from stackwise.precision.convert import freeze_stack
from stackwise.trunk import residency
from stackwise.trunk.parking import park, tensors_of, unpark
from stackwise.trunk.residency import reside, scratch

MAPPED = {"frozen": "mapped", "trained": "streamed"}


@pytest.fixture
def block(lab):
    return lab.rack(1, short_conv=2).stacks[0].blocks[0]


def values(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.*"))}


@pytest.mark.parametrize("mapped", [False, True])
def test_parameters_stay_the_same_objects_with_the_same_values(lab, block, tmp_path, mapped):
    block.requires_grad_(False)
    before, parameters = values(block), list(block.parameters())
    park(block, file=tmp_path / "a/block.safetensors" if mapped else None)
    lab.assert_same(before, block.state_dict())
    assert all(a is b for a, b in zip(parameters, block.parameters(), strict=True))
    unpark(block, lab.cpu)
    lab.assert_same(before, block.state_dict())
    assert block.parked is None


@pytest.mark.parametrize("leave", [park, lambda block: unpark(block, torch.device("cpu"))])
def test_what_leaves_a_file_has_memory_of_its_own(lab, block, tmp_path, leave):
    block.requires_grad_(False)
    before = values(block)
    park(block, file=tmp_path / "block.safetensors")
    mapped = {tensor.data_ptr() for tensor in block.parameters()}
    leave(block)
    assert not mapped & {tensor.data_ptr() for tensor in block.parameters()}
    lab.assert_same(before, block.state_dict())


def test_gradients_move_with_their_parameters(block):
    block.ffn.up.weight.grad = torch.ones_like(block.ffn.up.weight)
    park(block)
    assert torch.equal(block.ffn.up.weight.grad, torch.ones_like(block.ffn.up.weight))


def test_a_file_holds_what_does_not_train_by_the_names_of_the_module(lab, tmp_path):
    rack = lab.rack(1)
    block = rack.stacks[0].blocks[0]
    freeze_stack(rack.stacks[0], "nf4")
    block.attn_norm.weight.requires_grad_(True)
    file = tmp_path / "block.safetensors"
    park(block, file=file)
    names = {name for name, _ in tensors_of(block)} - {"attn_norm.weight"}
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == names
        for name in names:
            assert torch.equal(opened.get_tensor(name), dict(tensors_of(block))[name])
    assert not file.stat().st_mode & 0o222


def test_a_file_is_written_once_for_what_it_holds(block, tmp_path):
    block.requires_grad_(False)
    file = tmp_path / "block.safetensors"
    park(block, file=file)
    first = file.stat()
    park(block, file=file)
    assert file.stat() == first
    unpark(block, torch.device("cpu"))
    with torch.no_grad():
        block.ffn.up.weight.add_(1)
    park(block, file=file)
    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("ffn.up.weight"), block.ffn.up.weight)
    assert [f.name for f in tmp_path.iterdir()] == ["block.safetensors"]


def test_a_mapped_rack_computes_the_same_and_leaves_its_files_as_they_are(lab, tmp_path):
    rack = lab.rack(3, tail=0)
    twin = copy.deepcopy(rack)
    for each in (rack, twin):
        prefix = lab.train(each, "stack:1", "head").prefix
    reside(twin, lab.cpu, folder=tmp_path, **MAPPED)
    before = hashes(tmp_path)
    assert list(before) == ["s0.0.safetensors", "s2.0.safetensors"]
    assert torch.equal(lab.both_ways(rack, prefix), lab.both_ways(twin, prefix))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))
    with torch.no_grad():  # a private copy of the page, by whoever does so
        twin.stacks[0].blocks[0].ffn.up.weight.zero_()
    assert hashes(tmp_path) == before
    lab.train(twin, "stack:0")  # what trains next leaves its file
    reside(twin, lab.cpu, folder=tmp_path, **MAPPED)
    with torch.no_grad():
        twin.stacks[0].blocks[0].attn_norm.weight.zero_()
    assert "s1.0.safetensors" in hashes(tmp_path)
    assert before.items() <= hashes(tmp_path).items()


def test_adapters_on_a_mapped_trunk_stay_in_memory(lab, tmp_path):
    pytest.importorskip("peft")
    from stackwise.adapters.attach import attach

    rack = lab.rack(1, tail=0)
    freeze_stack(rack.stacks[0], "bf16")
    attach(rack.stacks[0], AdapterSpec("trunk", rank=2))
    reside(rack, lab.cpu, frozen="mapped", folder=tmp_path)
    lab.both_ways(rack)
    (file,) = tmp_path.rglob("s0.0.safetensors")
    with safe_open(file, "pt") as opened:
        assert not [name for name in opened.keys() if "lora" in name]  # noqa: SIM118
    assert any("lora_B" in name for name in lab.gradients(rack))


def test_state_is_saved_and_loaded_while_blocks_are_parked(lab, tmp_path):
    rack, other = lab.rack(2), lab.rack(2, blocks=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    rack.requires_grad_(False)
    reside(rack, lab.cpu, folder=tmp_path, **MAPPED)
    rack.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(rack(lab.ids()), other(lab.ids()))
    lab.assert_same(rack.state_dict(), other.state_dict())


def test_files_share_a_folder_that_goes_with_the_process(tmp_path):
    first = scratch(tmp_path)
    assert scratch(tmp_path) == first
    assert first.parent == tmp_path
    shutil.rmtree(first)  # by somebody who makes room
    second = scratch(tmp_path)
    (second / "file").touch()
    residency._scratch.pop(tmp_path).cleanup()  # as Python does when it ends
    assert not second.exists()


def test_a_file_that_cannot_be_written_is_an_error_with_the_ways_out(block, tmp_path):
    block.requires_grad_(False)
    (tmp_path / "occupied").write_text("")
    with pytest.raises(OSError, match=r"cannot keep [\d,]+ bytes.*occupied.*trunk_residency to streamed"):
        park(block, file=tmp_path / "occupied" / "block.safetensors")
    assert block.parked is None
    with pytest.raises(
        OSError, match=r"cannot keep frozen weights in .*occupied.*training.progressive.cache_dir"
    ):
        scratch(tmp_path / "occupied")
