"""Counted bytes of a step: every item by hand, and a ceiling that does not know how many stacks there are."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise.model.rack import recompute_block
from stackwise.training.counting import StepBytes
from stackwise.training.optim import Optimizers
from stackwise.trunk.residency import reside
from stackwise.trunk.slots import packed_bytes

STREAMED = {"frozen": "streamed", "trained": "streamed"}
APPEND = ("new", "tail", "norm", "head")
ITEMS = ("parameters", "gradients", "moments", "activations", "buffers")


def size(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def step(lab, rack, selectors, micro_batches=1, **residency):
    """One counted step of a stage; returns its bytes."""
    prefix = lab.train(rack, *selectors).prefix
    reside(rack, lab.cpu, **residency)
    optimizers = Optimizers(rack, lab.stage(rack, *selectors), lab.config(1).training)
    count = StepBytes(rack)
    with count.counting():
        for seed in range(micro_batches):
            lab.both_ways(rack, prefix, lab.ids(seed=seed))
    optimizers.step()
    result = count.result(optimizers)
    optimizers.zero_grad()
    held = {item: size for item, size in count.ledger.live.items() if size and item != "buffers"}
    assert not held, "everything is let go of"
    return result


def test_a_resident_step_holds_everything(lab):
    rack = lab.rack(3)
    counted = step(lab, rack, ("all",))
    tensors = len(list(rack.parameters()))
    assert counted["parameters"] == counted["gradients"] == size(rack)
    assert counted["moments"] == 2 * size(rack) + 4 * tensors
    assert counted["buffers"] == 0
    assert counted["total"] == sum(counted[item] for item in ITEMS)
    assert not any(counted["host"].values())


def test_a_streamed_step_holds_two_blocks_one_blocks_gradients_and_one_blocks_inside(lab):
    rack = lab.rack(3)
    block = rack.blocks()[0]
    around = size(rack.embedding, rack.norm, rack.head)
    counted = step(lab, rack, ("all",), **STREAMED)
    assert counted["parameters"] == around
    assert counted["buffers"] == 2 * packed_bytes(block)
    assert counted["gradients"] == size(rack.norm, rack.head, block) + size(rack.embedding)
    assert counted["moments"] == 2 * around + 4 * 3
    blocks = 4 * size(block)
    x = 3 * 12 * 16 * 4
    assert counted["host"] == {
        "parameters": blocks,
        "mapped": 0,
        "gradients": blocks,
        "moments": 2 * blocks + 4 * 4 * len(list(block.parameters())),
        "boundaries": 4 * x,
    }
    whole = step(lab, lab.rack(1, tail=0), ("all",))["activations"]
    head = 2 * x + 3 * 12 * 4 + 3 * 12 * lab.vocab * 4  # in and out of the norm, its scales, the logits
    assert (
        counted["activations"] == whole - head + x
    )  # and the input of the block before comes back ahead of use


@pytest.mark.parametrize(
    ("selectors", "residency"),
    [
        (("all",), STREAMED),
        (APPEND, {"frozen": "streamed"}),
        (APPEND, STREAMED),
        (("stack:0",), {"frozen": "streamed"}),
        (("stack:1",), STREAMED),
    ],
    ids=["end to end", "append", "append, all streamed", "prepend", "cyclic"],
)
def test_device_bytes_do_not_grow_with_the_stacks(lab, selectors, residency):
    counted = [step(lab, lab.rack(n), selectors, **residency) for n in (4, 8, 16)]
    for item in (*ITEMS, "total", "peak"):
        assert len({result[item] for result in counted}) == 1, item
    assert counted[2]["host"]["parameters"] > 3 * counted[0]["host"]["parameters"]
    resident = step(lab, lab.rack(16), selectors)
    assert counted[2]["peak"] < 0.6 * resident["peak"]


def test_mapped_weights_are_in_no_memory(lab, tmp_path):
    rack = lab.rack(3)
    counted = step(lab, rack, APPEND, frozen="mapped", folder=tmp_path)
    assert counted["host"]["mapped"] == size(rack.stacks[0], rack.stacks[1])
    assert counted["host"]["parameters"] == 0


def test_recomputation_holds_the_inputs_of_all_blocks_and_the_inside_of_one(lab):
    plain, x = [], 3 * 12 * 16 * 4
    for n in (3, 6):
        whole = step(lab, lab.rack(n), ("all",))["activations"]
        plain.append((whole, step(lab, lab.rack(n), ("all",), recompute=True)["activations"]))
    inside = (plain[1][0] - plain[0][0]) / 3
    assert plain[1][1] - plain[0][1] == 3 * x
    assert plain[0][1] > inside > 3 * x


def test_the_peak_is_what_is_held_at_once(lab):
    rack = lab.rack(6)
    for micro_batches in (1, 2):
        counted = step(lab, copy.deepcopy(rack), ("all",), micro_batches)
        base = counted["parameters"] + counted["moments"]
        if micro_batches == 1:  # activations go as gradients come
            assert counted["peak"] < counted["total"]
            assert counted["peak"] >= base + max(counted["activations"], counted["gradients"])
        else:  # the second pass begins with all gradients there
            assert counted["peak"] == counted["total"]


def test_gradients_that_are_used_up_in_the_backward_pass_are_held_one_at_a_time(lab):
    rack = lab.rack(3)

    def use(parameter):
        parameter.grad = None

    for parameter in rack.parameters():
        parameter.register_post_accumulate_grad_hook(use)
    counted = step(lab, rack, ("all",))
    assert counted["gradients"] == max(p.nbytes for p in rack.parameters())


@pytest.mark.parametrize("residency", [{}, {"recompute": True}, STREAMED], ids=str)
def test_counting_changes_no_number_and_nothing_else(lab, residency):
    rack = lab.rack(3, dropout=0.1)
    twin = copy.deepcopy(rack)
    for each in (rack, twin):
        lab.train(each, "all")
        reside(each, lab.cpu, **residency)
    runner = rack.runner
    with StepBytes(rack).counting():
        lab.both_ways(rack)
    lab.both_ways(twin)
    assert rack.runner is runner
    assert (runner is recompute_block) == ("recompute" in residency)
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))
    assert not any(p._post_accumulate_grad_hooks for p in rack.parameters())


def test_moments_kept_on_the_host_visit_the_device_one_parameter_at_a_time(lab):
    rack = lab.rack(2)
    settings = lab.config(1).training
    settings.optimizer.state_device = "host"
    lab.train(rack, "all")
    optimizers = Optimizers(rack, lab.stage(rack, "all"), settings)
    count = StepBytes(rack)
    with count.counting():
        lab.both_ways(rack)
    optimizers.step()
    counted = count.result(optimizers)
    largest = max(p.nbytes for p in rack.parameters())
    assert counted["host"]["moments"] == 2 * size(rack)
    assert counted["moments"] == 2 * largest + 4 * len(list(rack.parameters()))


def test_the_counted_peak_is_that_of_the_living_tensors_up_to_passing_ones(lab):
    """What operations make and drop within a block is not counted: the difference does not know the depth."""
    from stackwise.planning.live import LiveBytes

    def passing(n, **residency):
        rack = lab.rack(n)
        lab.train(rack, "all")
        reside(rack, lab.cpu, **residency)
        lab.both_ways(rack)  # tables and buffers are there
        rack.zero_grad()
        live, count, ids = LiveBytes([*rack.parameters(), *rack.buffers()]), StepBytes(rack), lab.ids()
        with live:
            lab.both_ways(rack, ids=ids)
        rack.zero_grad()
        with count.counting():
            lab.both_ways(rack, ids=ids)
        return live.peak - count.ledger.peak

    assert torch.is_grad_enabled()
    for residency in ({}, {"recompute": True}):
        few, many = passing(2, **residency), passing(8, **residency)
        assert 0 < few == pytest.approx(many, rel=0.01)
